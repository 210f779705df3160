"""All figures of one attack: what of the images, or of the outline of what is segmented, an adversary recovered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitpeer.leakage import masks
from splitpeer.leakage.floors import Floors, Gallery, Others, compare
from splitpeer.leakage.metrics import Image, distance_correlation
from splitpeer.leakage.scores import Score, number, summarise

CHANCE = "chance"
SHUFFLED = "shuffled patients"
RANDOM = "random score"
OTHER_MASKS = "mean mask of other patients"
INSIDE = "inside the body"
OWN_IMAGE = "own image and other patients' labels"
SHUFFLES = 20


def score_images(
    truth: Image,
    reconstructed: Image,
    patients: Sequence[Any],
    *,
    floors: Floors | Others | None = None,
    z: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, Score]:
    """What reconstructions tell of the true images, each figure with its floors.

    Args:
        truth: float [N, 1, *spatial], normalised intensities, background exactly 0.
        reconstructed: the same shape; any gain and offset. Not-a-numbers count as knowing nothing there.
        patients: [N]; who each sample is of.
        floors: images of other patients, or the floors made from them once; None: the other patients of `truth`.
        z: [N]; where each slice lies, so that floors and gallery take the same level of other patients.
        seed: of bootstrap and choices.

    Returns:
        ssim, psnr, nmi (inside the body), ssim_deep (away from its border), ssim_plain, psnr_plain, nmi_plain (whole
        image), reidentification (rank 1: share of samples whose nearest image in the gallery is the true one, with an
        exact interval), distance_correlation (of the whole set, without interval).

    Raises:
        ValueError: shapes or counts differ.
    """
    truth, reconstructed = np.asarray(truth), np.asarray(reconstructed)
    if truth.ndim < 4 or truth.shape[1] != 1 or len(truth) != len(patients):
        raise ValueError(
            f"the truth must be [N, 1, *spatial] of N samples, not {truth.shape} of {len(patients)}"
        )
    if not isinstance(floors, Floors):
        floors = Floors.make(truth, patients, floors, z, seed)
    scores = {
        name: summarise(
            values,
            patients,
            floors={
                floor: summarise(found[name], patients).mean
                for floor, found in floors.values.items()
                if name in found
            },
            most=1.0 if name.startswith("ssim") else np.inf,
            seed=seed,
        )
        for name, values in compare(truth, reconstructed).items()
    }
    scores["reidentification"] = reidentification(truth, reconstructed, patients, floors.others, z, seed)
    scores["distance_correlation"] = correlated(truth, reconstructed, patients, seed)
    return scores


def reidentification(
    truth: Image,
    reconstructed: Image,
    patients: Sequence[Any],
    others: Others,
    z: Sequence[float] | None = None,
    seed: int = 0,
) -> Score:
    """Rank 1 among patients: is the gallery image that fits a reconstruction best the true one?

    The gallery of a sample is its true image, and of every other patient (of `truth` and `others`) the slice at the
    same level, or all slices where levels are unknown. Fit: variance explained after alignment inside the
    candidate's body. Equal fits share the hit, so an image without content scores chance.
    """
    known = set(patients)
    new = [row for row, patient in enumerate(others.patients) if patient not in known]
    levels: Sequence[float] | None = z
    if z is not None and new:
        levels = None if others.z is None else [*z, *(others.z[row] for row in new)]
    pool = Others(
        np.concatenate([truth, np.asarray(others.images[new], dtype=truth.dtype)]),
        [*patients, *(others.patients[row] for row in new)],
        levels,
    )
    gallery = Gallery(pool.images)
    hits, chances = [], []
    for i, image in enumerate(reconstructed):
        rivals = pool.choose(patients[i], None if z is None else z[i])
        if not len(rivals) or not truth[i].any():
            hits.append(np.nan)
            continue
        fit = gallery.match(image)
        best = max(fit[i], fit[rivals].max())
        tied = int((fit[rivals] >= best - 1e-9).sum())
        hits.append(1.0 / (1 + tied) if fit[i] >= best - 1e-9 else 0.0)
        chances.append(1.0 / (1 + len(rivals)))
    floors = {CHANCE: float(np.mean(chances)) if chances else None}
    return summarise(hits, patients, floors=floors, most=1.0, shares=True, seed=seed)


def correlated(truth: Image, reconstructed: Image, patients: Sequence[Any], seed: int = 0) -> Score:
    """Distance correlation over the set, and its value for shuffled pairs, which is not 0 for a small set."""
    images = np.asarray(reconstructed, dtype=np.float64)
    means = np.nanmean(
        np.where(np.isfinite(images), images, 0.0), axis=tuple(range(1, images.ndim)), keepdims=True
    )
    images = np.where(np.isfinite(images), images, means)
    count = len(set(patients))
    if len(truth) < 2:
        return Score(None, patients=count, samples=len(truth))
    random = np.random.default_rng(seed)
    shuffled = [distance_correlation(truth, images[random.permutation(len(images))]) for _ in range(SHUFFLES)]
    return Score(
        number(distance_correlation(truth, images)),
        patients=count,
        samples=len(truth),
        floors={SHUFFLED: number(float(np.mean(shuffled)))},
    )


def score_masks(
    target: NDArray[Any],
    scores: NDArray[np.floating],
    patients: Sequence[Any],
    *,
    parts: Sequence[str] = (),
    inside: NDArray[np.bool_] | None = None,
    own: NDArray[np.floating] | None = None,
    others: Others | None = None,
    z: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, Score]:
    """What a map of scores tells of the outline of what is segmented.

    Args:
        target: 0/1 [N, 1 + parts, *spatial] (all that is segmented, then its parts) or [N, *spatial].
        scores: float [N, *spatial]; higher where the target is likely. A map that points the wrong way reveals as
            much: all maps are turned around together if their mean AUC is below one half.
        patients: [N].
        parts: names of the parts, in order.
        inside: bool [N, *spatial]; score only these voxels (the body), since air is no target for anybody; None: the
            whole window.
        own: float [N, *spatial]; what the site finds in its own images without a gradient (`own_image.OwnImage`).
        others: masks bool [M, *spatial] of patients not under attack; None: the other patients of `target`.
        z: [N]; where each slice lies, if `others` says it too.
        seed: of bootstrap and of the random floor.

    Returns:
        auc (leak-AUC, max(AUC, 1 - AUC), after Li et al., arXiv 2102.08504), dice_otsu (threshold without the truth)
        and dice_oracle (best threshold, chosen with the truth) of all that is segmented; auc_TC and so on of
        the parts; with `inside`, auc_window over the whole window; with `own`, advantage_auc and advantage_dice: auc
        and dice_oracle less those of the own image, patient by patient. Samples without any of it do not count.

    Raises:
        ValueError: shapes or counts differ.
    """
    regions, scores = _fitting(target, masks.finite(scores), patients, parts)
    everywhere = np.ones(scores.shape, dtype=bool)
    visible = everywhere if inside is None else np.asarray(inside, dtype=bool)
    blind = _blind(scores.shape, None if inside is None else visible, own, seed)
    found: dict[str, Score] = {}
    for number_of, part in enumerate(("", *parts)):
        mask = regions[:, number_of]
        usual = others if others is not None and not part else Others(mask, patients, z)
        known = blind | _mean_masks(usual, patients, z)
        values, low = _judged(mask, scores, known, patients, visible)
        found |= {
            f"{name}_{part}" if part else name: _with_floors(name, each, low, patients, seed)
            for name, each in values.items()
        }
        if part:
            continue
        if own is not None:
            found["advantage_auc"] = _advantage("auc", values, low, patients, seed)
            found["advantage_dice"] = _advantage("dice_oracle", values, low, patients, seed)
        if inside is not None:
            wide, low = _judged(mask, scores, known, patients, everywhere)
            found["auc_window"] = _with_floors("auc", wide["auc"], low, patients, seed)
    return found


def _fitting(
    target: NDArray[Any], scores: NDArray[np.float64], patients: Sequence[Any], parts: Sequence[str]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Regions bool [N, 1 + parts, *spatial] and maps. Raises ValueError: they do not fit each other."""
    target = np.asarray(target) != 0
    regions = target[:, None] if target.ndim == scores.ndim else target
    fit = (len(regions), 1 + len(parts), *scores.shape[1:]) == regions.shape and len(patients) == len(scores)
    if len(regions) != len(scores) or not fit:
        raise ValueError(
            f"masks {target.shape} of {len(parts)} parts and maps {scores.shape} of {len(patients)} samples do not fit"
        )
    return regions, scores


def _blind(
    shape: tuple[int, ...], inside: NDArray[np.bool_] | None, own: NDArray[np.floating] | None, seed: int
) -> dict[str, NDArray[np.float64]]:
    """The maps of adversaries who were sent no gradient, by the name of their floor."""
    blind = {RANDOM: np.random.default_rng(seed).random(shape)}
    if inside is not None:
        blind[INSIDE] = inside.astype(np.float64)
    if own is not None:
        blind[OWN_IMAGE] = masks.finite(own)
    return blind


MaskValues = dict[str, list[float]]
"""Figure to its values, one per sample."""


def _mean_masks(
    others: Others, patients: Sequence[Any], z: Sequence[float] | None
) -> dict[str, NDArray[np.float64]]:
    rows = [others.choose(patient, None if z is None else z[i]) for i, patient in enumerate(patients)]
    if not all(len(row) for row in rows):
        return {}
    return {OTHER_MASKS: np.stack([others.images[row].mean(axis=0, dtype=np.float64) for row in rows])}


def _judged(
    mask: NDArray[np.bool_], scores: NDArray[np.float64], known: dict[str, NDArray[np.float64]],
    patients: Sequence[Any], visible: NDArray[np.bool_],
) -> tuple[MaskValues, dict[str, MaskValues]]:  # fmt: skip
    """Values of a map, and of each floor."""
    low = {floor: _mask_values(mask, other, patients, visible) for floor, other in known.items()}
    return _mask_values(mask, scores, patients, visible), low


def _with_floors(
    name: str, values: list[float], low: dict[str, MaskValues], patients: Sequence[Any], seed: int
) -> Score:
    floors = {floor: summarise(other[name], patients).mean for floor, other in low.items()}
    return summarise(values, patients, floors=floors, most=1.0, seed=seed)


def _advantage(
    name: str, values: MaskValues, low: dict[str, MaskValues], patients: Sequence[Any], seed: int
) -> Score:
    """What the map tells beyond the own image: below 0 where it tells less."""
    gained = np.asarray(values[name]) - np.asarray(low[OWN_IMAGE][name])
    return summarise(gained, patients, floors={OWN_IMAGE: 0.0}, most=1.0, seed=seed)


def _mask_values(
    target: NDArray[np.bool_],
    scores: NDArray[np.float64],
    patients: Sequence[Any],
    visible: NDArray[np.bool_],
) -> MaskValues:
    areas = [masks.auc(t[v], s[v]) for t, s, v in zip(target, scores, visible, strict=True)]
    mean = summarise(areas, patients).mean
    if mean is not None and mean < 0.5:
        areas, scores = [1 - area for area in areas], -scores
    otsu, oracle = [], []
    for t, s, v in zip(target, scores, visible, strict=True):
        otsu.append(masks.dice(t[v], masks.otsu(s[v])))
        oracle.append(masks.oracle_dice(t[v], s[v]))
    return {"auc": areas, "dice_otsu": otsu, "dice_oracle": oracle}
