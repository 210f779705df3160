"""What a bundle says to people: README, licence, and whose data the weights were made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from splitpeer.export.configs import TITLES
from splitpeer.export.half import DECODER, ENCODERS, MASKS, WHOLE
from splitpeer.results.segmentation import NOT_A_DEVICE

Facts = Mapping[str, Any]


def readme(facts: Facts, missing: Sequence[str] = ()) -> str:
    """`docs/README.md`."""
    kind = facts["kind"]
    if kind == MASKS:
        return _of_masks(facts)
    lines = [
        f"# {facts['job']}: {TITLES[kind]}",
        "",
        f"**{NOT_A_DEVICE}**",
        "",
        {
            ENCODERS: f"The encoders of site {facts['party']}: an image in, feature maps out. They segment nothing by "
            "themselves.",
            DECODER: "Fusion, bottleneck and decoder: feature maps of all seats in, logits out. No encoder is in here.",
            WHOLE: "All encoders and the decoder: images in, a mask out.",
        }[kind],
        *missing,
        "",
        "## Use",
        "",
        "Needs torch, MONAI (with `fire` for its command line), nibabel and safetensors; nothing of splitproto.",
        "",
        "```sh",
        *_use(facts),
        "```",
        "",
        *_how(facts),
        "",
        "## What it is",
        "",
        *_table(facts),
        "",
        "## What it gives away",
        "",
        *given_away(facts),
        "",
    ]
    return "\n".join(lines)


def given_away(facts: Facts) -> list[str]:
    """What a holder of the bundle can do with it, in sentences."""
    patients = (
        "The weights were learned from patients' images and masks: treat them as personal data. Membership of a "
        "patient in the training, and more, may be read from them."
    )
    if facts["kind"] == MASKS:
        return [
            "Nothing: no weights are in here. It says whether the decoder, which learned from this site's masks, may "
            "become part of a whole network."
        ]
    if facts["kind"] == DECODER:
        return [patients]
    inversion = (
        "Anyone who has an encoder and the feature maps that it sent (a recording, a coordinator's feature bank) can "
        "rebuild the images behind them: early levels almost to the voxel."
    )
    if facts["kind"] == ENCODERS:
        return [inversion, patients, "Keep the file as you keep a checkpoint, and off the coordinator."]
    lines = [inversion, "All encoders are in this bundle, so this holds for every site at once.", patients]
    if facts["sum"] is not None:
        lines.append(
            "The run was private: its coordinator had only sums over the sites, and no encoder. **Joining ends that "
            "for everyone who holds both this bundle and the sums**: they train an inverse network, and rebuild from "
            "the sum of a window as much as the table in docs/private.md shows for an adversary with all encoders."
        )
    if facts["secret"]:
        lines.append(
            "Encoders that sites drew or pretrained for themselves were a secret on which their protection rests; they "
            "protect nothing any more, in later runs either: make new ones before the next run."
        )
    return lines


def data_license(facts: Facts) -> str:
    """`docs/data_license.txt`: MONAI's place for the terms of the training data."""
    return (
        f"The weights were trained on patients of the hospitals of the federation {facts['federation']}. The images\n"
        "and masks are neither part of this bundle nor licensed by it. Whether and how the weights may be used,\n"
        "passed on or published is for the parties to say, under the law and the consent that hold for their\n"
        "patients.\n"
    )


def licence(facts: Facts) -> str:
    """`LICENSE`: of the code in `scripts/`, and of the weights."""
    party = "the parties named in docs/README.md" if facts["kind"] == WHOLE else f"{facts['party']}"
    return (
        "scripts/: Apache License, Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0), from splitproto, without "
        f"warranty.\n\nmodels/: no licence is granted by this file. The weights belong to {party}; see "
        f"docs/data_license.txt.\n\n{NOT_A_DEVICE}\n"
    )


# --- inside --------------------------------------------------------------------------------------------------


def _of_masks(facts: Facts) -> str:
    lines = [
        f"# {facts['job']}: {TITLES[MASKS]}",
        f"**{NOT_A_DEVICE}**",
        f"Site {facts['party']} had the masks of this run, and no encoder. {given_away(facts)[0]}",
        "\n".join(_table(facts)),
    ]
    return "\n\n".join(lines) + "\n"


def _use(facts: Facts) -> list[str]:
    if facts["kind"] == DECODER:
        return [
            "python -m monai.bundle run --config_file configs/inference.json --levels_file levels.safetensors"
        ]
    return [
        "python -m monai.bundle run --config_file configs/inference.json --dataset_dir images --output_dir out"
    ]


def _how(facts: Facts) -> list[str]:
    if facts["kind"] == DECODER:
        inputs = ", ".join(f"`{seat}/{name}`" for seat in facts["decoder"]["seats"] for name in facts["cut"])
        return [f"`levels.safetensors` holds {inputs}, each [windows, channels, *spatial]."]
    modalities = [name for held in facts["seats"].values() for name in held]
    result = (
        "`out/PATIENT.nii.gz`, a mask on the grid of the patient's own image"
        if facts["kind"] == WHOLE
        else '`out/PATIENT.safetensors`, with a tensor "SEAT/LEVEL" for each level, window beside window'
    )
    lines = [
        f"Images: {', '.join(f'`images/{name}/PATIENT.nii.gz`' for name in modalities)}, all of a patient on one grid. "
        f"Result: {result}."
    ]
    if facts["kind"] == WHOLE and len(facts["seats"]) > 1:
        seat = next(iter(facts["seats"]))
        lines.append(
            f"A patient without a seat's images: add `--absent \"['{seat}']\"`; how much worse masks then are depends "
            "on how the network was trained."
        )
    return lines


def _table(facts: Facts) -> list[str]:
    seats = "; ".join(f"{seat} ({', '.join(held)})" for seat, held in facts["seats"].items())
    rules = ", ".join(f"{name}: {rule}" for name, rule in facts["normalisation"].items())
    rows = {
        "job, run": f"{facts['job']}, {facts['run']}",
        "step": f"{facts['step']} of {facts['steps']}",
        "joined by"
        if facts["kind"] == WHOLE
        else "of": f"{facts['party']}, federation {facts['federation']}",
        "seats": seats,
        "normalisation": rules,
        "spacing": f"{' x '.join(map(str, facts['spacing']))} mm" if facts["spacing"] else "as stored",
        "window": " x ".join(map(str, facts["window"])),
        "terms": facts["terms"],
        **facts["weights"],
    }
    if task := facts.get("task"):
        rows["mask values"] = "0 background, " + ", ".join(f"{v} {n}" for n, v in task["values"].items())
        rows["mask values"] += f" (convention {task['convention']})" if task["convention"] else ""
        rows["regions"] = "; ".join(f"{n}: {', '.join(map(str, v))}" for n, v in task["regions"].items())
        rows["regions are"] = (
            "exclusive (softmax)" if task["exclusive"] else "independent (sigmoid, above .5)"
        )
    if facts.get("defences"):
        rows["defences of the site, not in here"] = ", ".join(facts["defences"])
    if facts.get("parties"):
        rows["agreed by"] = ", ".join(facts["parties"])
        rows["may be held by"] = ", ".join(facts["holders"])
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
