"""Fixed sentences of the page: names of figures, the glossary, what is never tested."""

from __future__ import annotations

from collections.abc import Collection

METRICS = {
    "ssim": "Likeness inside the body (SSIM)",
    "tumour_dice": "Target found in it (Dice)",
    "tumour_presence": "Target told to be there or not (share)",
    "tumour_volume": "Size of the target (smaller over larger)",
    "tumour_side": "Side of the target (share)",
    "reidentification": "Patient picked out (share)",
    "psnr": "PSNR inside the body (dB)",
    "nmi": "Shared information inside the body (NMI, 1 to 2)",
    "distance_correlation": "Distance correlation of the set",
    "advantage_ssim": "More than the helping hospitals' images show (SSIM)",
    "ssim_deep": "Likeness away from the body's border (SSIM)",
    "ssim_plain": "Likeness, whole image (SSIM)",
    "psnr_plain": "PSNR, whole image (dB)",
    "nmi_plain": "Shared information, whole image (NMI)",
    "dfil": "Fisher information of the noise (dFIL)",
    "auc": "Target distinguished from the rest of the body (AUC)",
    "advantage_auc": "More than the own image shows (AUC)",
    "advantage_dice": "More than the own image shows (Dice)",
    "auc_window": "Target distinguished, air included (AUC)",
    "dice_otsu": "Overlap with the true outline (Dice)",
    "dice_oracle": "Overlap at the best threshold (Dice)",
    "member_auc": "Training patients told from others (AUC)",
    "member_tpr": "Training patients found at 1 % false alarms (share)",
}
MAIN = (
    "ssim", "advantage_ssim", "tumour_dice", "tumour_presence", "tumour_volume", "tumour_side", "reidentification",
    "auc", "advantage_auc", "advantage_dice", "dice_otsu", "dice_oracle",
)  # fmt: skip
DECIBEL = ("psnr", "psnr_plain")

MEMBERSHIP = "Membership inference: whether a patient was among those that the network learned from."
COLLUSION = (
    "Parties that work together, such as the coordinator and a hospital that share what they received."
)
NEIGHBOURS = "neighbouring slices"
"""In what a view reads, where it reads them."""
UNLESS_TESTED = (MEMBERSHIP, COLLUSION)
"""What a run says that did not test it."""
NEVER_TESTED = (
    "Attacks that nobody has published yet, and more effort than was spent here: more computation, more views, "
    "more images of other patients.",
    "A coordinator that breaks the protocol, unless an attack of that kind is listed above.",
    "What sizes and times of messages reveal to an eavesdropper; the schedule itself tells the hospitals which slices "
    "are used.",
    "Break-ins: stolen keys, checkpoints or captures.",
    "What the trained network itself remembers of the patients it was trained on.",
)

_GLIOMA = ("WT, TC, ET", "Whole tumour, tumour core, enhancing tumour: the outlines that the network learns.")
_GLOSSARY = (
    ("Activations", "The numbers that a hospital's encoder computes from an image and sends. There are several levels: "
     "x0 has the image's full resolution, x4 is the smallest and most abstract."),
    ("Adversary", "A party that follows the protocol and looks closely at what it legitimately receives "
     "(honest but curious). Adaptive: it knows which defences run and acts accordingly. Naive: it ignores them."),
    ("AUC", "How well a map tells the target from the rest: the chance that a target point scores higher than another "
     "point. 0.5 is guessing, 1 is perfect."),
    ("Capture", "A recording of what one party received and sent, made by that party; attacks here ran on it."),
    ("Confidence interval", "Where the mean would lie in 95 of 100 repetitions with other patients (of a share the "
     "exact one; of a mean by Student's t for few patients, by bootstrap for many). Wide means few or "
     "unlike patients."),
    ("Coordinator", "The party that fuses the hospitals' activations, decodes and often holds the labels."),
    ("Defence", "Something that changes what is sent, so that it reveals less: noise, dropping values, withholding a "
     "level."),
    ("Dice", "Overlap of two outlines, from 0 (none) to 1 (the same)."),
    ("Epsilon, delta", "The size of a privacy budget: by seeing what was sent, the odds of any guess about one "
     "protected unit change by a factor of at most e to the epsilon, but for a probability of delta."),
    ("Floor", "What an adversary reaches without the traffic: for images by showing an average image or another "
     "patient, for outlines by the usual place or by what the hospital's own image shows to a network that "
     "learned from other patients' labels. Only the excess over it was learnt from the traffic."),
    ("Gradients", "The numbers that come back to a hospital in training: how its activations should change."),
    ("Likeness (SSIM)", "How alike two images are in brightness, contrast and structure, 1 being identical. Taken "
     "inside the body after the best fit of brightness and contrast."),
    ("Patient picked out", "Share of reconstructions whose best match, among the true image and images of other "
     "patients at the same level, is the true one."),
    ("Pareto front", "The configurations for which no other has both more Dice and less leakage."),
    ("Sample", "One slice (or block) of one patient, as it is sent."),
    ("Target", "What the network is trained to outline: a tumour and its parts, say, or an organ."),
    ("Worst tenth", "Mean over the tenth of the patients who leak most; averages hide them."),
)  # fmt: skip


def glossary(regions: Collection[str]) -> list[tuple[str, str]]:
    """Words and their meanings, by the alphabet; `regions`: names that stand in the page's tables."""
    return sorted((*_GLOSSARY, *([_GLIOMA] if "WT" in regions else [])), key=lambda entry: entry[0].lower())
