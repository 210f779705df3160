"""Registration of one image to the atlas: rigid or affine, by mutual information, coarse to fine, repeatable.

Mattes' estimate of mutual information (Mattes et al., IEEE TMI 22, 2003) is maximised; how well that went is judged by
Studholme's normalised form (`quality.py`). SimpleITK sees both images on grids along the axes only, so that oblique,
sheared and thick-sliced scans need nothing special; coordinates are RAS throughout.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from splitpeer.data.geometry import Triple
from splitpeer.data.regrid import onto, softened
from splitpeer.errors import DataError, needs
from splitpeer.prepare.atlas import Atlas, corners
from splitpeer.prepare.record import Kind

try:
    import SimpleITK as sitk
except ModuleNotFoundError:
    raise needs("registration", "SimpleITK", "register") from None

# Sums over threads depend on how work was split, and results on sums; also where filters set their own number.
sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)

WORKING_MM = 2.0
"""Of the grids on which images are compared. Half of it is not worth the time: what registration leaves is a millimetre
of anatomy that no affine map takes away."""
AROUND_MM = 8.0
"""The atlas is compared within so much of its brain: enough to see the edge."""
BINS = 32
"""Of the joint histogram, as Mattes et al. have it."""
SEED = 1
"""Of the places that are compared."""
MAX_WORKING = 2**25
"""Voxels of a scan on the working grid; 4 bytes each. A scan of half a metre in all directions has half as many."""


@dataclass(frozen=True)
class RegistrationStage:
    """One part of the way: how coarse, and how far in a step."""

    shrink: int
    """Working voxels per voxel."""
    sigma_mm: float
    share: float
    """Of the voxels around the atlas's brain, so many are compared."""
    step_mm: float
    """Length of the first step; it shrinks where the direction turns."""
    steps: int


RIGID = (
    RegistrationStage(4, 4.0, 1.0, 2.0, 80),
    RegistrationStage(2, 2.0, 0.4, 0.5, 100),
    RegistrationStage(1, 1.0, 0.12, 0.25, 60),
)
AFFINE = RIGID[1:]
"""From where the rigid way ended: begun after its coarsest stage, stretching led one phantom head in fifty away."""
LAST_STEP_MM = 0.01
_TRIAL = RegistrationStage(4, 4.0, 0.4, 2.0, 25)
STARTS = (
    (0.0, 0.0, 0.0),
    (0.5, 0.0, 0.0),
    (-0.5, 0.0, 0.0),
    (0.0, 0.5, 0.0),
    (0.0, -0.5, 0.0),
    (0.0, 0.0, 0.5),
    (0.0, 0.0, -0.5),
)
"""Rotations about each axis, in radians, from which a trial is made. A head is rarely turned by more than 45 degrees in
its scanner, and mutual information finds its way from about 20."""


class _Smoothed:
    """An image, and what smoothing makes of it: the same for all trials, and of the atlas for all scans."""

    def __init__(self, image: Any) -> None:
        self.image = image
        self._by: dict[float, Any] = {}

    def by(self, sigma_mm: float) -> Any:
        """Smoothed by a Gaussian."""
        if sigma_mm not in self._by:
            self._by[sigma_mm] = sitk.SmoothingRecursiveGaussian(self.image, sigma_mm)
        return self._by[sigma_mm]


class Registrar:
    """Registers many images to one atlas."""

    def __init__(self, atlas: Atlas) -> None:
        x, y, z = atlas.voxels.shape
        voxels, grid = _working(atlas.voxels, atlas.affine, (x, y, z))
        x, y, z = voxels.shape
        brain = np.asarray(onto(atlas.brain, atlas.affine, (x, y, z), grid, order=0), bool)
        near = ndimage.binary_dilation(brain, iterations=round(AROUND_MM / WORKING_MM))
        self._fixed = _Smoothed(_image(voxels, grid))
        self._near = sitk.Cast(_image(near.astype(np.float32), grid), sitk.sitkUInt8)

    def register(
        self, volume: NDArray[np.float32], affine: NDArray[np.float64], kind: Kind
    ) -> dict[Kind, NDArray[np.float64]]:
        """The rigid map from the scan's millimetres to the atlas's, RAS, 4x4; for `kind` affine also the affine map
        that begins there, unless it loses sight of the atlas.

        Begins with the centres of mass on each other, in the orientation that the scan's header gives and in `STARTS`
        from there: a header that confuses axes is not mended here, and shows in the quality.

        Raises:
            DataError: too large, or no rigid map was found.
        """
        x, y, z = volume.shape
        moving = _Smoothed(_image(*_working(volume, affine, (x, y, z))))
        try:
            rigid = self._begun(moving)
            for stage in RIGID:
                self._improve(rigid, moving, stage)
        except RuntimeError as error:
            # ITK says in many lines that the images do not overlap any more.
            raise DataError(f"registration failed ({_said(error)})") from None
        found: dict[Kind, NDArray[np.float64]] = {"rigid": _matrix(rigid)}
        if kind == "affine":
            stretched = _affine(rigid)
            with suppress(RuntimeError):  # the rigid one is left
                for stage in AFFINE:
                    self._improve(stretched, moving, stage)
                found["affine"] = _matrix(stretched)
        return found

    def _begun(self, moving: _Smoothed) -> Any:
        """The best of the trials."""
        centred = sitk.CenteredTransformInitializer(
            self._fixed.image,
            moving.image,
            sitk.Euler3DTransform(),
            sitk.CenteredTransformInitializerFilter.MOMENTS,
        )
        trials = []
        for angles in STARTS:
            trial = sitk.Euler3DTransform(centred)
            trial.SetRotation(*angles)
            with suppress(RuntimeError):  # out of sight of each other: another trial does better
                trials.append((self._improve(trial, moving, _TRIAL), trial))
        if not trials:
            raise RuntimeError("the scan and the atlas do not overlap from any start")
        return min(trials, key=lambda one: one[0])[1]

    def _improve(self, transform: Any, moving: _Smoothed, stage: RegistrationStage) -> float:
        """Move `transform`; returns the metric there, less is better. Raises RuntimeError."""
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(BINS)
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(stage.share, SEED)
        method.SetMetricFixedMask(self._near)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(
            stage.step_mm, LAST_STEP_MM, stage.steps, relaxationFactor=0.7, gradientMagnitudeTolerance=1e-8
        )
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetShrinkFactorsPerLevel([stage.shrink])
        method.SetSmoothingSigmasPerLevel([0.0])  # they are smooth
        method.SetInitialTransform(transform, True)
        method.Execute(self._fixed.by(stage.sigma_mm), moving.by(stage.sigma_mm))
        return float(method.GetMetricValue())


def n4(volume: NDArray[np.float32], affine: NDArray[np.float64]) -> NDArray[np.float32]:
    """The image without its smooth gain (N4, Tustison et al., IEEE TMI 29, 2010); 0 stays 0.

    The field is estimated at a quarter of the resolution, where it is as smooth, within what Otsu calls foreground.
    """
    image = _image(volume, np.diag([*np.linalg.norm(affine[:3, :3], axis=0), 1.0]))
    inside = sitk.OtsuThreshold(image, 0, 1, 128)
    factors = [max(1, min(4, n // 16)) for n in volume.shape]
    small = sitk.Shrink(image, factors)
    corrector = sitk.N4BiasFieldCorrectionImageFilter()
    corrector.SetMaximumNumberOfIterations([30, 30, 20])
    corrector.Execute(small, sitk.Shrink(inside, factors))
    field = sitk.GetArrayFromImage(corrector.GetLogBiasFieldAsImage(image)).transpose(2, 1, 0)
    out: NDArray[np.float32] = (volume / np.exp(field)).astype(np.float32)
    if not np.isfinite(out).all():
        raise DataError('bias_field = "n4" found no smooth field: set it to "none" for this image')
    return out


# --- inside ------------------------------------------------------------------------------------------------


def _working(
    volume: NDArray[np.float32], affine: NDArray[np.float64], shape: Triple
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The volume on a grid along the axes that holds all of it."""
    ends = corners(shape, affine)
    low, high = ends.min(axis=1), ends.max(axis=1)
    x, y, z = (int(n) for n in np.ceil((high - low) / WORKING_MM) + 1)
    if x * y * z > MAX_WORKING:
        raise DataError(
            f"{x * WORKING_MM:g} x {y * WORKING_MM:g} x {z * WORKING_MM:g} mm: is this a head?", "too-large"
        )
    grid = np.diag([WORKING_MM, WORKING_MM, WORKING_MM, 1.0])
    grid[:3, 3] = low
    out = onto(softened(volume, affine, grid), affine, (x, y, z), grid, order=1, fill=float(volume.min()))
    return out.astype(np.float32), grid


def _image(voxels: NDArray[np.float32], grid: NDArray[np.float64]) -> Any:
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.transpose(2, 1, 0)))
    image.SetSpacing([float(mm) for mm in np.diag(grid)[:3]])
    image.SetOrigin([float(mm) for mm in grid[:3, 3]])
    return image


def _affine(rigid: Any) -> Any:
    out = sitk.AffineTransform(3)
    out.SetCenter(rigid.GetCenter())
    out.SetMatrix(rigid.GetMatrix())
    out.SetTranslation(rigid.GetTranslation())
    return out


def _matrix(transform: Any) -> NDArray[np.float64]:
    """The other way round, 4x4: ITK maps the fixed image's points to the moving one's, x -> M (x - c) + t + c."""
    out = np.eye(4)
    out[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    centre, shift = np.array(transform.GetCenter()), np.array(transform.GetTranslation())
    out[:3, 3] = shift + centre - out[:3, :3] @ centre
    return np.linalg.inv(out).astype(np.float64, copy=False)


def _said(error: RuntimeError) -> str:
    """The last sentence of ITK's page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:160] if lines else "no reason given"
