"""Happenings as lines of the log. A line has a dotted name that collectors and people know: it is kept.

A happening whose line holds every field says so itself (`Happening.line`); the others are put into words here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import Any

from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.budgets import LogBudget
from splitpeer.logs import event, handle
from splitpeer.storage.reading import size


@dataclass(frozen=True)
class Line:
    """One line."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    level: int = INFO


class LogSink:
    """Writes to the log of the module that tells, within the budget of what others can cause.

    Args:
        log: its logger.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._budget = log, LogBudget()

    def __call__(self, happening: h.Happening) -> None:
        written = list(lines(happening))
        if written and (more := self._budget.take(happening)) is not None:
            for line in written:
                event(self._log, line.name, line.level, **line.fields, **more)


def lines(happening: h.Happening) -> Iterator[Line]:
    """What the log says of it; often nothing."""
    if happening.line is not None:
        yield Line(happening.line, vars(happening), happening.level)
    yield from _of_a_start(happening)
    yield from _of_a_run(happening)
    yield from _of_a_remote_site(happening)
    yield from _of_recording(happening)
    yield from _of_a_link(happening)
    yield from _of_a_site(happening)


def _by_site(values: Mapping[str, Any]) -> str:
    """One field for all sites: a site may be called `step`, which must not take the place of a field."""
    return ", ".join(f"{site} {value}" for site, value in values.items())


def handles(keys: Iterable[bytes]) -> str:
    """Patients in one field."""
    return ", ".join(sorted(map(handle, keys)))


def _who_has_whom(matched: h.PatientsMatched) -> dict[str, Any]:
    """The table in a line, counts only."""
    every = len(matched.seats)
    return {
        "shared": matched.shared,
        "labels": matched.labels,
        "sites": _by_site(matched.sites),
        "complete": matched.complete,
        "held_out": matched.held_out,
        "with_seats": ", ".join(f"{n} of {every}: {count}" for n, count in matched.with_seats.items()),
        "fills": ", ".join(
            f"{site} {seat} {count}" for site, seats in matched.fills.items() for seat, count in seats.items()
        ),
    }


def _of_a_start(happening: h.Happening) -> Iterator[Line]:
    match happening:
        case h.SiteStarted():
            yield Line("peer.start", {"role": "client", **vars(happening)})
        case h.CoordinatorStarted(run=run):
            yield Line("peer.start", {"role": "coordinator", **vars(happening), "run": run[:12]})
        case h.RunLeft(run):
            cause = "job.toml has changed since that run, which is not complete: this is a new one"
            yield Line("run.left", {"run": run[:12], "cause": cause}, WARNING)
        case h.RunFound(run):
            yield Line("run.resumed", {"run": run[:12], "hint": "--fresh starts a new run"})
        case h.AlreadyComplete(job=job, run=run):
            hint = "--fresh starts another run"
            yield Line("job.was_complete", {"job": job, "run": run[:12], "hint": hint})
        case h.PredictionsRemoved(keys=keys):
            yield Line("predictions.removed", {"patients": handles(keys)})
        case h.PatientNamed(patient, file):
            yield Line("patient.file", {"patient": patient, "file": str(file)}, WARNING)
        case h.SiteOverlaps(site, patients, shared, few, hint):
            about = {"site": site, "patients": patients, "shared": shared}
            if few:
                yield Line("site.overlap", {**about, "hint": hint}, WARNING)
            else:
                yield Line("site.overlap", about)
        case h.PatientsMatched():
            yield Line("job.patients", _who_has_whom(happening))


def _of_a_run(happening: h.Happening) -> Iterator[Line]:
    match happening:
        case h.BankPlanned(folder, windows, octets, kept, encrypted):
            about = {"folder": folder, "windows": windows, "kept": kept, "size": size(octets)}
            yield Line("bank.planned", {**about, "encrypted": "yes" if encrypted else "no"})
        case h.BankComplete(windows, octets):
            hint = "the sites may stop: the decoder is trained from the bank"
            yield Line("bank.complete", {"windows": windows, "size": size(octets), "hint": hint})
        case h.ReleasesCleared(keys=keys, octets=octets, cause=cause):
            yield Line("bank.cleared", {"patients": handles(keys), "size": size(octets), "cause": cause})
        case h.EvaluationSkipped(step):
            cause = "no site here has the feature evaluate"
            yield Line("job.not_evaluated", {"step": step, "cause": cause}, WARNING)
        case h.Evaluated(step, volumes, dice, made_from, missing, hd95, volume_ml):
            about = {"step": step, "volumes": volumes, **dice, "made_from": " ".join(made_from)}
            yield Line("job.evaluated", about)
            if hd95:
                yield Line("job.distances", {"step": step, "unit": "mm", **hd95})
            if volume_ml:
                shown = {name: f"{of['predicted']:.4g} of {of['true']:.4g}" for name, of in volume_ml.items()}
                yield Line("job.volumes", {"step": step, "unit": "ml", **shown})
            for seat, scores in missing.items():
                yield Line("job.evaluated_without", {"step": step, "missing": seat, **scores})
        case h.CheckpointCommitted(step=step, digests=digests):
            yield Line(
                "job.checkpoint",
                {"step": step, "sites": _by_site({name: d[:12] for name, d in digests.items()})},
            )
        case h.SeatsAveraged(step, averaged):
            averages = _by_site({seat: " + ".join(sites) for seat, sites in averaged.items()})
            yield Line("job.averaged", {"after_step": step, "seats": averages})
        case h.CheckpointMissed(step, sites, cause):
            why = {"cause": cause} if cause else {"sites": ", ".join(sites)}
            yield Line("job.checkpoint_failed", {"step": step, **why}, WARNING)
        case h.RunRolledBack(step=step, before=before, cause=cause):
            yield Line("job.rollback", {"step": step, "before": before, "cause": cause}, WARNING)
        case h.PatientWithdrawn(site=site, patient=patient, step=step, cause=cause):
            about = {"site": site or "coordinator", "patient": patient, "step": step, "cause": cause}
            yield Line("patient.withdrawn", about, WARNING)


def _of_a_remote_site(happening: h.Happening) -> Iterator[Line]:
    match happening:
        case h.SiteJoined(site, seats, patients, unusable, applied, tls=tls, address=address, serial=serial):
            who = {"site": site, "seats": seats, "patients": patients}
            if unusable:
                who["unusable"] = unusable
            link = {"tls": tls, "address": address, "serial": serial}
            yield Line("site.joined", {**who, "applied": applied, **link})
        case h.SiteLost(site, cause, waiting_for, patience_s):
            asked = {"waiting_for": waiting_for} if waiting_for else {}
            patience = {} if patience_s is None else {"patience_s": patience_s}
            yield Line("site.lost", {"site": site, "cause": cause, **asked, **patience}, WARNING)
        case h.SecondLink(outcome=outcome):
            yield Line(f"site.{outcome}", second_link(happening), WARNING)
        case h.LinkRefused(source, cause, not_shown):
            more = {"not_shown": not_shown} if not_shown else {}
            yield Line("link.refused", {"source": source, "cause": cause, **more}, WARNING)


def _of_recording(happening: h.Happening) -> Iterator[Line]:
    match happening:
        case h.PeerAnnounced(peer, recorded, defences):
            said = {True: "yes", False: "no", None: "not said"}[recorded]
            shown = "not said" if defences is None else " + ".join(defences) or "none"
            yield Line("peer.announced", {"peer": peer, "recorded": said, "defences": shown})
        case h.CaptureStarted(file, encrypted):
            yield Line("capture.started", {"file": file, "encrypted": encrypted})
        case h.CaptureEnded(file, reason, messages, octets, lost, chain):
            about = {"file": file, "reason": reason, "messages": messages, "octets": octets, "lost": lost}
            yield Line("capture.closed", {**about, "chain": chain[:12]})


def second_link(happening: h.SecondLink) -> dict[str, Any]:
    """What log and trail say of it."""
    return {name: value for name, value in vars(happening).items() if name != "outcome" and value is not None}


def _of_a_link(happening: h.Happening) -> Iterator[Line]:
    match happening:
        case h.JobDeclined(job=job, cause=cause):
            yield Line("job.declined", {"job": job, "cause": cause}, WARNING)
        case h.JobAccepted(job=job, seats=seats, levels=levels, precision=precision, patients=patients):
            terms = {
                "job": job,
                "seats": ", ".join(seats),
                "levels": ",".join(levels),
                "precision": precision,
            }
            if happening.weights:
                terms["weights"] = ", ".join(happening.weights)
            yield Line("job.accepted", {**terms, "applied": happening.applied, "patients": patients})
        case h.JobComplete(job, step):
            yield Line("job.complete", {} if job is None else {"job": job, "step": step})
        case h.SiteStopped():
            yield Line("peer.stop", {"cause": "asked to stop"})


def _of_a_site(happening: h.Happening) -> Iterator[Line]:
    match happening:
        case h.SiteSaved(step=step):
            yield Line("job.checkpoint", {"step": step})
        case h.EncoderShared(step=step, seat=seat):
            yield Line("encoder.shared", {"seat": seat, "after_step": step})
        case h.PartnersProven(partners=partners):
            yield Line("fusion.partners", {"partners": partners})
        case h.MaskKeyDeleted(run, cause):
            yield Line("fusion.key_deleted", {"run": run, "cause": cause})
        case h.ServiceKeyReplaced(run, epoch, cause):
            yield Line("service.key_replaced", {"run": run, "epoch": epoch, "cause": cause})
        case h.ServiceKeyDeleted(run, cause):
            yield Line("service.key_deleted", {"run": run, "cause": cause})
        case h.ValuesClipped(step, clipped, values, so_far, most):
            yield Line(
                "fusion.clipped",
                {"step": step, "clipped": clipped, "values": values, "so_far": so_far, "range": most},
                WARNING,
            )
        case h.SiteNotSaved(step=step, cause=cause):
            yield Line("job.checkpoint_failed", {"step": step, "cause": cause}, WARNING)
        case h.SiteRolledBack(step=step, before=before):
            yield Line("job.rollback", {"step": step, "before": before}, WARNING if before > step else INFO)
        case h.FiguresTold(step, steps, values):
            figures = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            yield Line("job.progress", {"step": f"{step}/{steps}", "figures": figures})
        case h.MissingChanged(step=step, gone=gone, back=back):
            for seat, cause in gone.items():
                about = {"seat": seat, "after_step": step, "cause": cause}
                yield Line("job.without", about, WARNING)
            for seat in back:
                yield Line("job.with_again", {"seat": seat, "after_step": step})
        case h.PatientOut(by=by, key=key, step=step, cause=cause, file=file):
            about = {"patient": handle(key), "step": step, "cause": cause}
            # SP-11.13-8: by its file only where it is this site's that is bad.
            yield Line(f"patient.{by}", about if file is None else {**about, "file": str(file)}, WARNING)
