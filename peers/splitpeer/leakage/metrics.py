"""How much of one image is in another: SSIM, PSNR and NMI, plain and inside the body.

Images are [1, *spatial] or [*spatial], 2-D or 3-D, in the site's normalised intensities: mean 0 and standard
deviation 1 over the body, background exactly 0. All figures are taken after `align`, since instance
normalisation removes gain and offset while the structure returns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import pdist, squareform
from skimage.metrics import normalized_mutual_information, structural_similarity

Image = NDArray[np.floating]
Mask = NDArray[np.bool_]

DATA_RANGE = 6.0
"""Width of normalised intensities, three standard deviations to both sides. Fixed, so that figures of
different attacks, modalities and runs can be compared."""
PSNR_MOST = 100.0
"""dB of a perfect copy, where PSNR itself has no value."""
SMALLEST = 11
"""Voxels along every axis: the width of SSIM's Gaussian window."""


def brain_mask(image: Image) -> Mask:
    """Where `image` is not exactly 0, holes filled. Same shape."""
    filled: NDArray[np.bool_] = ndimage.binary_fill_holes(np.asarray(image) != 0)
    return filled


def align(image: Image, truth: Image, mask: Mask) -> Image:
    """`gain * image + offset` closest to `truth` inside `mask` in least squares; float64. The gain may be negative.

    NaN and infinity become the mean of the other values. An image that is constant inside the mask has no
    gain: it becomes the truth's mean, which is what one knows without seeing anything.
    """
    return _fitted(image, truth, mask, matched=False)


def match(image: Image, truth: Image, mask: Mask) -> Image:
    """As `align`, with the gain that gives `image` the deviation of `truth` inside `mask`.

    Least squares shrink a noisy image towards the mean, and SSIM counts the contrast lost as unlikeness; an adversary
    looks at full contrast. The sign is that of `align`.
    """
    return _fitted(image, truth, mask, matched=True)


def _fitted(image: Image, truth: Image, mask: Mask, *, matched: bool) -> Image:
    image = np.asarray(image, dtype=np.float64)
    finite = np.isfinite(image)
    if not finite.all():
        image = np.where(finite, image, image[finite].mean() if finite.any() else 0.0)
    inside, wanted = image[mask], np.asarray(truth, dtype=np.float64)[mask]
    centred, aimed = inside - inside.mean(), wanted - wanted.mean()
    power, shared = float(centred @ centred), float(centred @ aimed)
    # Below rounding there is no structure, only noise of the arithmetic.
    tiny = len(inside) * (1e-7 * max(abs(inside.mean()), 1e-30)) ** 2
    gain = 0.0
    if power > tiny:
        gain = float(np.copysign(np.sqrt(aimed @ aimed / power), shared)) if matched else shared / power
    aligned: Image = gain * (image - inside.mean()) + wanted.mean()
    return aligned


def ssim(truth: Image, aligned: Image, mask: Mask) -> tuple[float, float, float]:
    """(inside, deep inside, whole image): structural similarity (Wang et al., IEEE TIP 13, 600-612, 2004), at most 1.

    Gaussian 11 x 11 window with sigma 1.5, k 0.01 and 0.03, `DATA_RANGE`. Inside: the map averaged over `mask`,
    with the truth's own background around both, so that an attack is neither punished nor praised for it there. Deep
    inside: over the voxels of `mask` whose window holds no background at all, which would be right for free; NaN where
    there is none.
    """
    _, inside = _ssim(truth, np.where(mask, aligned, truth))
    whole, _ = _ssim(truth, aligned)
    # The window ends at the image's edge, which is no background.
    deep = ndimage.binary_erosion(mask, np.ones((SMALLEST,) * mask.ndim, dtype=bool), border_value=1)
    return float(inside[mask].mean()), float(inside[deep].mean()) if deep.any() else float("nan"), whole


def _ssim(truth: Image, image: Image) -> tuple[float, Image]:
    if min(truth.shape) < SMALLEST:
        raise ValueError(f"SSIM needs {SMALLEST} voxels along every axis, not {truth.shape}")
    mean, local = structural_similarity(
        np.asarray(truth, dtype=np.float64),
        image,
        data_range=DATA_RANGE,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        K1=0.01,
        K2=0.03,
        full=True,
    )
    return float(mean), local


def psnr(truth: Image, aligned: Image) -> float:
    """10 log10(`DATA_RANGE`^2 / mean squared error) in dB, `PSNR_MOST` at most; any equal shapes."""
    error = float(np.mean((np.asarray(truth, dtype=np.float64) - aligned) ** 2))
    least = DATA_RANGE**2 / 10 ** (PSNR_MOST / 10)
    return float(10 * np.log10(DATA_RANGE**2 / max(error, least)))


def nmi(truth: Image, aligned: Image) -> float:
    """(H(A) + H(B)) / H(A, B) over 100 bins (Studholme et al., Pattern Recognition 32, 71-86, 1999), 1 to 2.

    1 is nothing shared, 2 the same up to any one-to-one change of intensities; 1 where either image is constant.
    With few voxels unrelated images score above 1 too: compare with the floors.
    """
    truth = np.asarray(truth, dtype=np.float64)
    if np.ptp(truth) == 0 or np.ptp(aligned) == 0:
        return 1.0
    return float(normalized_mutual_information(truth, aligned))


def similarities(truth: Image, image: Image) -> dict[str, float]:
    """Every figure of one pair of images [*spatial] after alignment inside the truth's body.

    Keys: ssim, psnr, nmi inside the body; ssim_deep inside it and away from its border, NaN in a small one;
    ssim_plain, psnr_plain, nmi_plain over the whole image. SSIM is the larger one of two alignments, `align` and
    `match`.

    Raises:
        ValueError: shapes differ, or an axis is shorter than `SMALLEST`.
    """
    if truth.shape != image.shape:
        raise ValueError(f"the truth is {truth.shape}, the reconstruction {image.shape}")
    mask = brain_mask(truth)
    if not mask.any():
        raise ValueError("the true image is empty: there is no body to compare inside of")
    aligned = align(image, truth, mask)
    both = (ssim(truth, shown, mask) for shown in (aligned, match(image, truth, mask)))
    inside, deep, whole = (max(pair) for pair in zip(*both, strict=True))
    return {
        "ssim": inside,
        "ssim_deep": deep,
        "psnr": psnr(truth[mask], aligned[mask]),
        "nmi": nmi(truth[mask], aligned[mask]),
        "ssim_plain": whole,
        "psnr_plain": psnr(truth, aligned),
        "nmi_plain": nmi(truth, aligned),
    }


def distance_correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Distance correlation of two samples [N, ...] paired by row, 0 to 1 (Székely et al., Ann. Stat. 35, 2007).

    With unsquared Euclidean distances: the squared ones that some code uses see linear dependence alone. Biased
    upwards for small N: compare with the value of shuffled pairs. 0 where either sample is constant.

    Raises:
        ValueError: other counts, or fewer than two rows.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"distance correlation needs two paired samples of two or more, not {len(a)}, {len(b)}"
        )
    first, second = (_double_centred(x) for x in (a, b))
    product = float((first * first).mean() * (second * second).mean())
    if product <= 0:
        return 0.0
    return float(np.sqrt(max(float((first * second).mean()), 0.0) / np.sqrt(product)))


def _double_centred(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    distances = squareform(pdist(np.reshape(rows, (len(rows), -1)).astype(np.float64)))
    centred: NDArray[np.float64] = (
        distances - distances.mean(0) - distances.mean(1)[:, None] + distances.mean()
    )
    return centred
