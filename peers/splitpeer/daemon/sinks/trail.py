"""Happenings as lines of the audit trail: what a data owner may ask about later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.budgets import TrailBudget
from splitpeer.daemon.sinks.log import handles, second_link
from splitpeer.logs import handle

_AS_THEY_ARE: dict[type[h.Happening], str] = {
    h.CodingsChosen: "codings.chosen",
    h.JobEnded: "job.ended",
    h.SiteJobEnded: "job.ended",
    h.PatientWithdrawn: "patient.withdrawn",
    h.JobDeclined: "job.declined",
    h.SiteDeclined: "job.declined",
    h.SiteRefused: "site.refused",
    h.CaptureStarted: "capture.started",
    h.CaptureEnded: "capture.ended",
    h.PeerLinked: "link.up",
    h.PeerAnnounced: "peer.announced",
    h.SiteRolledBack: "job.rollback",
    h.EncoderShared: "encoder.shared",
    h.PartnersProven: "fusion.partners",
    h.MaskKeyDeleted: "fusion.key_deleted",
    h.ServiceKeyReplaced: "service.key_replaced",
    h.ServiceKeyDeleted: "service.key_deleted",
    h.ReleasesEnded: "job.released",
    h.ReleasesRemoved: "bank.dropped",
    h.PatientLocated: "inference.located",
    h.SegmentationAsked: "inference.asked",
    h.SegmentationFailed: "inference.failed",
    h.SegmentationServed: "inference.served",
    h.SegmentationCancelled: "inference.cancelled",
}
"""Names of lines that hold every field of their happening."""


class TrailSink:
    """Appends to the audit trail, within the budget of what others can cause.

    Args:
        note: writes a line: its name, and its fields by keyword.
    """

    def __init__(self, note: Callable[..., None]) -> None:
        self._note, self._budget = note, TrailBudget()

    def __call__(self, happening: h.Happening) -> None:
        if (found := entry(happening)) is not None and (more := self._budget.take(happening)) is not None:
            name, fields = found
            self._note(name, **fields, **more)


def entry(happening: h.Happening) -> tuple[str, dict[str, Any]] | None:
    """Name and fields of the line; None: the trail says nothing of it."""
    if (name := _AS_THEY_ARE.get(type(happening))) is not None:
        return name, vars(happening)
    match happening:
        case h.SiteAbsent(site=site, cause=cause):
            return "site.absent", {"site": site, "cause": cause}
        case h.SecondLink(outcome=outcome):
            return f"site.{outcome}", second_link(happening)
        case h.LinkRefused(source=source, cause=cause):
            return "link.refused", {"source": source, "cause": cause}
        case h.CheckpointCommitted(run, step, digests):
            shown = [f"{site} {digest}" for site, digest in digests.items()]
            return "job.checkpoint", {"run": run, "step": step, "digests": shown}
        case h.PrivacySpent(epsilon=epsilon, alone=alone):
            rounded = {"epsilon": round(epsilon, 4), "alone": round(alone, 4)}
            return "privacy.spent", {**vars(happening), **rounded}
        case h.AskedTooMuch(cause=cause):
            return "policy.refused", {"cause": cause}
        case h.JobAccepted(levels=levels, seats=seats):
            fields = {**vars(happening), "levels": list(levels), "seats": list(seats)}
            if not happening.weights:
                del fields["weights"]
            # The inventory is not part of the terms.
            del fields["patients"]
            return "job.accepted", fields
        case h.ReleasesCleared(run, keys, octets, cause):
            about = {"patients": handles(keys), "octets": octets, "cause": cause}
            return "bank.cleared", {"run": run, **about}
        case h.PredictionsRemoved(run, keys):
            return "predictions.removed", {"run": run, "patients": handles(keys)}
        case h.SegmentationCame():
            fields = vars(happening)
            return "inference.done", {
                **fields,
                "seats": list(happening.seats),
                "missing": list(happening.missing),
            }
        case h.SiteSaved(run=run, step=step, digest=digest):
            return "job.checkpoint", {"run": run, "step": step, "digest": digest}
        case h.SiteNotSaved(run=run, step=step):
            return "job.checkpoint_failed", {"run": run, "step": step}
        case h.PatientOut(by=by, run=run, key=key, step=step, cause=cause):
            about = {"run": run, "patient": handle(key), "step": step, "cause": cause}
            return f"patient.{by}", about
    return None
