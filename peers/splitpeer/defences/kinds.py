"""Every defence as data: how it is written, what it promises, its traits, and the class that implements it.

Importing this module imports neither torch nor any of those classes; `DefenceKind.load` does.
"""

from __future__ import annotations

from splitpeer.defences.specs import (
    DefenceKind,
    Noise,
    Parameter,
    Place,
    Spec,
    Written,
    check_order,
    check_place,
    parse,
)

_BOTH: frozenset[Place] = frozenset({"activations", "gradients"})
_GRADIENTS: frozenset[Place] = frozenset({"gradients"})
_IMAGE: frozenset[Place] = frozenset({"image"})
_HE = "He, Zhang, Lee, IEEE Internet of Things Journal 2020, doi 10.1109/JIOT.2020.3022358"
_LI = "Li et al. 2021, arXiv 2102.08504, per voxel"
_UNDONE = "another pose, other weights or another window undo it"
_KEPT = Parameter(
    False, meaning=f'draw once per sample and reuse it every time; for releases = "once" only: {_UNDONE}'
)
_SCALE = Parameter(1.0, 0.0, 1000.0, "noise as a multiple of the tensor's root mean square")
_AVERAGED = (
    "No guarantee: blurs what one release shows. Fresh noise is averaged over releases of one sample; kept noise is "
    "eliminated by anyone who knows the weights and has the sample in two poses or from two sets of weights."
)

# --- values left out -------------------------------------------------------------------------------------

DROPOUT = DefenceKind(
    name="dropout",
    made="activation.masks:Dropout",
    title="Dropout, always on",
    promise=(
        "No guarantee: exact zeros give the mask away, and an attacker fits the values that are left; other poses of a "
        "sample lose other values, even with a mask that is kept."
    ),
    source=_HE,
    places=_BOTH,
    options={
        "rate": Parameter(0.5, 0.0, 1.0, "share of the values that are dropped"),
        "kept": Parameter(
            False, meaning=f'draw the mask once per sample; for releases = "once" only: {_UNDONE}'
        ),
        "rescale": Parameter(False, meaning="divide the remaining values by 1 - rate"),
    },
    sparse=True,
    drops="rate",
)
TOPK = DefenceKind(
    name="topk",
    made="activation.masks:TopK",
    title="Only the largest values",
    promise=(
        "No guarantee: a compression; the positions of the large values show structure, and other poses of a sample "
        "show other values."
    ),
    source="standard sparsification, as in Aji & Heafield 2017, arXiv 1704.05021",
    places=_BOTH,
    options={"share": Parameter(0.05, 1e-6, 1.0, "share of the values that are kept")},
    sparse=True,
)
WITHHOLD = DefenceKind(
    name="withhold",
    made="activation.masks:Withhold",
    title="A level withheld",
    promise="Guaranteed: the levels named are constant and show nothing. No guarantee for the other levels.",
    source="constant output",
    guarantee=True,
    needs_levels=True,
)

# --- noise -----------------------------------------------------------------------------------------------

GAUSSIAN = DefenceKind(
    name="gaussian",
    made="activation.noise:Gaussian",
    title="Gaussian noise",
    promise=_AVERAGED,
    source=_HE,
    places=_BOTH,
    options={"scale": _SCALE, "kept": _KEPT},
    additive_noise=Noise("gaussian", "rms"),
)
LAPLACE = DefenceKind(
    name="laplace",
    made="activation.noise:Laplace",
    title="Laplace noise",
    promise=_AVERAGED,
    source=_HE,
    places=_BOTH,
    options={"scale": _SCALE, "kept": _KEPT},
    additive_noise=Noise("laplace", "rms"),
)
PERCENTILE = DefenceKind(
    name="percentile",
    made="activation.noise:Percentile",
    title="Noise from a percentile",
    promise="No guarantee: the width follows the data and nothing is clipped.",
    source="Hatamizadeh et al. 2022, arXiv 2202.06924 (there of weight updates)",
    places=_BOTH,
    options={
        "scale": Parameter(0.1, 0.0, 1000.0, "noise as a multiple of the percentile"),
        "percentile": Parameter(95.0, 0.0, 100.0, "which percentile of the non-zero magnitudes"),
        "kept": _KEPT,
    },
    additive_noise=Noise("gaussian", "percentile"),
)
DP_GAUSSIAN = DefenceKind(
    name="dp-gaussian",
    made="activation.dp:DPGaussian",
    title="Differential privacy (Gaussian)",
    promise=(
        "Guaranteed: an observer of everything sent can tell a patient's images from any others only as well as "
        "epsilon allows, counted over every record that depends on the patient (a budget in the policy counts and "
        "stops)."
    ),
    source="Dwork and Roth 2014, Appendix A; Balle and Wang 2018, arXiv 1805.06530",
    guarantee=True,
    private=True,
    options={
        "clip": Parameter(100.0, 1e-9, 1e9, "largest L2 norm of a record, all levels together"),
        "noise": Parameter(12.0, 1e-3, 1e6, "standard deviation of the noise as a multiple of clip"),
        "frozen": Parameter(
            False, meaning="the encoder is not trained: a patient pays for its own windows only"
        ),
        "shared": Parameter(
            1, 1, 4096, "sites of a secure sum that share the noise: each adds noise / sqrt(shared)"
        ),
        "honest": Parameter(
            1, 1, 4096, "how many of them, this one included, are counted on to tell nobody their noise"
        ),
    },
    additive_noise=Noise("gaussian", "clip"),
)

# --- form ------------------------------------------------------------------------------------------------

CLIP = DefenceKind(
    name="clip",
    made="activation.shape:Clip",
    title="Clipped norm",
    promise="No guarantee by itself: it bounds the weight of one record, which differential privacy needs.",
    source="Abadi et al. 2016, arXiv 1607.00133",
    places=_BOTH,
    options={"norm": Parameter(100.0, 1e-9, 1e9, "largest L2 norm of a record")},
)
QUANTISE = DefenceKind(
    name="quantise",
    made="activation.shape:Quantise",
    title="Fewer bits",
    promise="No guarantee: a compression; other poses and gains of a sample are rounded otherwise, and average out.",
    source="symmetric absmax quantisation; straight-through gradients after arXiv 1308.3432",
    places=_BOTH,
    options={"bits": Parameter(8, 2, 16, "bits per value")},
    rounds="bits",
)
PROJECTION = DefenceKind(
    name="projection",
    made="activation.shape:Projection",
    title="Secret rotation of channels",
    promise="No guarantee: stops an attacker that does not learn the rotation; inverse networks absorb it.",
    source="random orthogonal projection, compare arXiv 2605.13265",
    options={"fraction": Parameter(0.5, 1e-6, 1.0, "share of the channels that are sent")},
    channel_mixing=True,
)
BOTTLENECK = DefenceKind(
    name="bottleneck",
    made="activation.shape:Bottleneck",
    title="Narrow cut",
    promise="No guarantee: fewer numbers leave, but those show what training finds useful.",
    source="1 x 1 bottleneck (Eshratifar et al. 2019, arXiv 1902.01000)",
    offline=False,
    structural=True,
    options={"channels": Parameter(2, 1, 4096, "channels per level that carry data")},
)

# --- learned ---------------------------------------------------------------------------------------------

NOPEEK = DefenceKind(
    name="nopeek",
    made="activation.learned:NoPeek",
    title="NoPeek (decorrelation)",
    promise="No guarantee: correlation decreases, but the content may remain.",
    source="Vepakomma et al. 2020, arXiv 2008.09161; unsquared distances",
    offline=False,
    options={"weight": Parameter(0.5, 0.0, 1000.0, "weight of the correlation, added to the loss")},
)
SHREDDER = DefenceKind(
    name="shredder",
    made="activation.learned:Shredder",
    title="Shredder (learned noise)",
    promise="No guarantee: noise goes where the task can bear it; many releases can be averaged.",
    source="Mireshghallah et al. 2020, arXiv 1905.11814",
    offline=False,
    options={
        "reward": Parameter(0.01, 0.0, 1000.0, "weight of the mean noise width, subtracted from the loss"),
        "start": Parameter(0.2, 1e-3, 100.0, "noise width at the first step, at most half of `most`"),
        "most": Parameter(5.0, 1e-2, 1000.0, "largest width"),
    },
)
ADVERSARY = DefenceKind(
    name="adversary",
    made="activation.learned:Adversary",
    title="Site-local adversary",
    promise="No guarantee: resists the inverse networks it was trained against; others may do better.",
    source="this project; gradient reversal after Ganin & Lempitsky 2015, arXiv 1409.7495",
    offline=False,
    options={
        "weight": Parameter(1.0, 0.0, 1000.0, "weight of what the networks recover, added to the loss"),
        "networks": Parameter(3, 1, 16, "inverse networks trained at the same time"),
        "restart": Parameter(150, 1, 1_000_000, "steps after which a network is reinitialised"),
        "width": Parameter(16, 1, 256, "feature maps of each network"),
    },
)

# --- images ----------------------------------------------------------------------------------------------

VOXEL_NOISE = DefenceKind(
    name="voxel-noise",
    made="image.noise:VoxelNoise",
    title="Kept noise on the image",
    promise="No guarantee, but nothing to average on one voxel grid: many views show one noisy image.",
    source="permanent randomised response: Erlingsson et al. 2014, arXiv 1407.6981",
    places=_IMAGE,
    options={
        "scale": Parameter(1.0, 0.0, 1000.0, "noise in standard deviations of the normalised image"),
        "background": Parameter(
            False, meaning="also add noise where the image is zero, which hides the outline"
        ),
    },
)

# --- gradients -------------------------------------------------------------------------------------------

MAX_NORM = DefenceKind(
    name="max-norm",
    made="gradient.voxels:MaxNorm",
    title="max-norm noise",
    promise="No guarantee: the length of a gradient no longer shows the tumour, its direction may.",
    source=_LI,
    places=_GRADIENTS,
)
ISO = DefenceKind(
    name="iso",
    made="gradient.voxels:Iso",
    title="isotropic gradient noise",
    promise="No guarantee: noise as strong as the batch's strongest gradient, times s.",
    source=_LI,
    places=_GRADIENTS,
    options={"s": Parameter(1.0, 0.0, 1e6, "noise power relative to that of the longest vector")},
)
MARVELL = DefenceKind(
    name="marvell",
    made="gradient.voxels:Marvell",
    title="Marvell gradient noise",
    promise=(
        "No guarantee: one voxel's gradient, seen once, would leave at least this error to the best detector if the "
        "gradients of tumour and of the rest were isotropic Gaussians; neighbouring voxels and later epochs add up."
    ),
    source=_LI,
    places=_GRADIENTS,
    options={
        "error": Parameter(0.3, 0.01, 0.49, "remaining detection error: mean of the false positive and negative rates"),
        "power": Parameter(0.0, 0.0, 1e6, "noise power relative to |Delta|^2; 0: as much as `error` needs"),
    },
    needs_labels=True,
)  # fmt: skip

KINDS: dict[str, DefenceKind] = {
    kind.name: kind
    for kind in (
        DROPOUT, TOPK, WITHHOLD, GAUSSIAN, LAPLACE, PERCENTILE, DP_GAUSSIAN, CLIP, QUANTISE, PROJECTION, BOTTLENECK,
        NOPEEK, SHREDDER, ADVERSARY, VOXEL_NOISE, MAX_NORM, ISO, MARVELL,
    )
}  # fmt: skip
"""By name, in the order of `splitpeer defences`."""


def parse_all(written: Written, place: Place) -> tuple[Spec, ...]:
    """Several defences, in order; what was read already is only checked again.

    Raises:
        ConfigError: see `specs.parse`; or a part of the network is written after another defence.
    """
    parts = written.split("+") if isinstance(written, str) else written
    specs = []
    for part in parts:
        if isinstance(part, Spec):
            check_place(part.kind, place)
            specs.append(part)
        elif part.strip():
            specs.append(parse(part, place, KINDS))
    check_order(specs)
    return tuple(specs)
