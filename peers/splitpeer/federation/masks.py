"""What masks are asked for where the labels are at a site: a task on the wire, and back (SP-11.20-2). No torch."""

from __future__ import annotations

import math

from splitpeer.data.task import CONVENTIONS, Region, Task, glioma
from splitpeer.settings.task import CONVENTION_OF_TASK, TaskSection
from splitproto import records
from splitproto.errors import PolicyRefused, SchemaMismatch
from splitproto.records import Job, Masks

LOGITS = "logits"
"""The tensor of a batch's logits, and of their gradient."""
MASK = "mask"
"""The tensor of a prediction."""
_ANY = "msd"
"""The regions of the preset are the same in every convention."""


def task_of(settings: TaskSection) -> Task:
    """The task of a job as a coordinator without masks needs it: regions, channels, classes."""
    return settings.task(CONVENTION_OF_TASK if settings.preset is None else _ANY)


def convention_of(settings: TaskSection, written: str | None) -> str:
    """What a coordinator's segmentations follow: its [data] convention; if it has no masks and writes none, the job's
    own values, or the newest convention of the preset. What is made of it says so."""
    return written or (CONVENTION_OF_TASK if settings.preset is None else "brats2023")


def masks_on_wire(settings: TaskSection) -> Masks:
    """What the site of the labels is asked for."""
    task, preset = task_of(settings), settings.preset
    return Masks(
        tuple(
            records.MaskRegion(region.name, () if preset else tuple(sorted(region.values)))
            for region in task.regions
        ),
        () if preset else tuple(sorted(task.names)),
        task.exclusive,
        preset,
    )


def task_from_wire(masks: Masks, convention: str | None) -> Task:
    """The meaning of this site's masks.

    Args:
        convention: `[data] convention` of this site.

    Raises:
        SchemaMismatch: no task, or not one that is known here.
        PolicyRefused: this site's masks follow another convention.
    """
    if masks.preset is None:
        if convention != CONVENTION_OF_TASK:
            raise PolicyRefused(
                f"the job names mask values of its own, and this site's masks follow {convention}: [data] convention "
                f'= "{CONVENTION_OF_TASK}" if they hold them'
            )
        try:
            return Task(
                {value: f"value {value}" for value in masks.values},
                tuple(Region(region.name, region.values) for region in masks.regions),
                exclusive=masks.exclusive,
            )
        except ValueError as error:
            raise SchemaMismatch(f"the job's masks: {error}") from None
    if masks.preset != "glioma":
        raise SchemaMismatch(f"masks of {masks.preset} are not known here")
    if convention not in CONVENTIONS:
        raise PolicyRefused(
            f'the job is about glioma, whose masks follow a convention: [data] convention is "{convention}" here'
        )
    task = glioma(convention)
    asked = tuple((region.name, region.values) for region in masks.regions)
    if asked != tuple((name, ()) for name in task.region_names) or masks.values or masks.exclusive:
        raise SchemaMismatch(
            f"glioma has the regions {', '.join(task.region_names)}, and no values of its own"
        )
    return task


def logits_shape(job: Job, channels: int, samples: int) -> tuple[int, ...]:
    """Of the logits of a batch: [samples, channels, x, y(, z)]."""
    return (samples, channels, *job.window)


def logits_octets(job: Job, channels: int) -> int:
    """Of those of a training batch."""
    return 4 * math.prod(logits_shape(job, channels, job.batch))
