"""How much a coordinator may ask of a site: the numbers of [policy], with their defaults.

A file of its own because those who heed the numbers (`federation/terms.py`, `site/`) take them alone: a site with no
[policy] has the defaults, and a test of a bound needs no `peer.toml`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from splitpeer.settings.loading import Section


class Bounds(Section):
    """Part of [policy]. The defaults fit a full-size BasicUNet on BraTS volumes, with room to spare."""

    max_voxels: PositiveInt = 32_000_000
    """Voxels of one volume on the job's grid; while it is resampled, it takes about 60 bytes per voxel."""
    max_parameters: PositiveInt = 20_000_000
    """Parameters of the encoder; 12 bytes each in a checkpoint. A full-size 3-D encoder has 4 million."""
    max_memory_mib: PositiveInt = 8192
    """Estimated memory that the job needs: one volume, the encoder with its optimiser, the feature maps of a batch,
    and the images of that batch and those read ahead."""
    max_runs: PositiveInt = 16
    """Run folders in [peer] state, the present one included; which are removed first, see `run_folders.make_room`."""
    max_state_mib: PositiveInt = 4096
    """All run folders together, and `released.jsonl`."""
    max_gradient_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the encoder's gradient in one step; none: any that is finite."""
    beyond_norm: Literal["clip", "refuse"] = "clip"
    """What happens to a larger one."""
    max_step_repeats: PositiveInt = 100
    """How often one training step of a run may be asked for."""
    max_window_evaluations: PositiveInt = 1000
    """How often one window may be asked for in evaluations of a run."""
    max_inferences_per_day: PositiveInt = 200
    """Requests for segmentations that this site takes part in within 24 hours, its own included."""
    max_rollbacks: PositiveInt = 1000
    """Most rollbacks in one run."""
    max_messages_per_s: PositiveInt = 1000
    """From the coordinator, on average; ten seconds' worth may come at once."""
    max_runs_per_day: PositiveInt = 100
    """New runs that are taken up within 24 hours."""
    releases: Literal["any", "once"] = "any"
    """once: an encoder shows a patient in one run only, each window in one answer. Jobs that train encoders are
    declined: every step would be another view of the same window."""
    max_overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """With ``releases = "once"``: how much of a window its neighbours may repeat, on each axis. Windows of a patient
    that lie closer are refused: each would be another view of the same place."""
    max_runs_per_patient: PositiveInt | None = None
    """In how many runs a patient may be shown, whatever the encoder; none: in any number. Jobs that train encoders are
    counted while it is set."""
    max_range_refusals: PositiveInt = 3
    """How often this site says that the range of a sum does not suit its values, over all runs: each time tells the
    coordinator something of them. Then it declines secure sums, until this is raised."""
    max_key_days: Annotated[float, Field(ge=1)] = 30
    """Age at which a key of this site's masks is deleted, and that of a service replaced, whatever the coordinator
    says. A run whose training, or sending of windows, takes longer fails."""
    max_record_mib: PositiveInt = 64
    """Size of `released.jsonl` in [peer] state, and of a run's `answers.jsonl`: nothing leaves that they do not hold.
    Reading one takes up to twenty times as much memory."""
