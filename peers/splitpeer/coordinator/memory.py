"""What a site has applied and saved, as far as the coordinator knows, and what it lost when it restarted."""

from __future__ import annotations

from collections.abc import Collection

from splitpeer.errors import JobFailed
from splitproto.messages import JobAccept

RESTARTS = 10
"""A site that restarts more often since its last checkpoint has failed: each time, all may have to go back."""


class SiteRestarted(Exception):
    """A site came back without its memory: all must go back to a checkpoint that they have in common."""


class Memory:
    """The progress of one site.

    Args:
        site: its name.
    """

    def __init__(self, site: str) -> None:
        self.site = site
        self.applied = 0
        """The last step that it is known to have applied, or to have advanced to."""
        self.checkpoints: tuple[int, ...] = ()
        """Steps that it has on disk."""
        self.restarts = 0
        """Since the last checkpoint that it wrote with the others."""
        self.lost = False
        """It restarted, and has not rolled back to a checkpoint since."""
        self._incarnation = b""
        self._lost_at = 0  # `applied` when it restarted
        self._undone: int | None = None  # the others went back to here while it was absent

    def hear(self, accept: JobAccept, *, absent: bool) -> None:
        """Take down how far the site says it is, on a new link.

        Args:
            absent: the run continues without it.
        """
        if self._incarnation and accept.incarnation != self._incarnation:
            # A new process: anything not on disk is gone.
            self.restarts += 1
            self._lost_at = self._lost_at if self.lost else self.applied
            self.lost = True
        # Absent since before this coordinator started: the content of its memory is unknown.
        self.lost |= absent and not self._incarnation
        self._incarnation = accept.incarnation
        self.applied, self.checkpoints = accept.applied, accept.checkpoints

    def note_saved(self, step: int, keep: Collection[int]) -> None:
        """It wrote a checkpoint of `step`, and kept those of `keep`."""
        self.checkpoints = tuple(sorted({held for held in self.checkpoints if held in keep} | {step}))

    def note_rolled_back(self, step: int) -> None:
        """It has gone back to its checkpoint of `step`; later ones are gone."""
        self.applied, self.lost = step, False
        self.checkpoints = tuple(saved for saved in self.checkpoints if saved <= step)

    def note_undone(self, step: int) -> None:
        """While it was absent, the others went back to `step`: what it applied beyond never was."""
        self._undone = step if self._undone is None else min(step, self._undone)

    def note_caught_up(self) -> None:
        """It is where the others are."""
        self._undone = None

    def write_off(self) -> None:
        """All go back, this site too: what it lost is not asked of it any more."""
        self.lost = False

    def forgive(self) -> None:
        """It wrote a checkpoint with the others: its restarts before do not count any more."""
        self.restarts = 0

    def restore_point(self, computed: int) -> int:
        """SP-11-34: the step to which a site that lost its memory goes back alone, as it is all that it had applied.

        Args:
            computed: what it is asked needs that it remembers its activations of this step; 0: nothing.

        Raises:
            SiteRestarted: no such step: all go back.
            JobFailed: it restarts again and again.
        """
        if self.restarts > RESTARTS:
            raise JobFailed(
                f"site {self.site} has restarted {self.restarts} times since its last checkpoint: its log says why"
            )
        if computed > self._lost_at or self._lost_at not in self.checkpoints:
            raise SiteRestarted(self.site)
        return self._lost_at

    def return_point(self, committed: int) -> int | None:
        """SP-11-36: the checkpoint from which a site that was absent continues; None: from where it is.

        Args:
            committed: the step that the others are at.

        Raises:
            JobFailed: it has none that still counts.
        """
        # Steps beyond a rollback of the others, or beyond the committed step, no longer exist.
        most = committed if self._undone is None else min(committed, self._undone)
        if not self.lost and self.applied <= most:
            return None
        usable = [saved for saved in self.checkpoints if saved <= most]
        if not usable:
            raise JobFailed(f"site {self.site} has no checkpoint of step {most} or before to continue from")
        return max(usable)
