"""Happenings as figures of `status.json`."""

from __future__ import annotations

import time

from splitpeer.daemon import happenings as h
from splitpeer.daemon.board import Board
from splitpeer.daemon.status_schema import PatientTable, ServedCounts
from splitpeer.storage.reading import size


class BoardSink:
    """Keeps `board` up to date."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def __call__(self, happening: h.Happening) -> None:
        self._daemon(happening)
        self._run(happening)
        self._remote_site(happening)
        self._site(happening)

    def _daemon(self, happening: h.Happening) -> None:
        board = self._board
        match happening:
            case h.PhaseBegan(phase):
                board.phase(phase)
            case h.TrainingBegan(step, steps):
                board.phase("training", step=step, steps=steps)
            case h.Dialling(patience_s):
                board.phase("dialling")
                # A rate is that of the work: the time without a coordinator is none of it.
                board.pause()
                board.waits("the coordinator to answer", deadline_s=patience_s)
            case h.Awaited(what, deadline_s):
                board.waits(what, deadline_s=deadline_s)
            case h.NotAwaited():
                board.waits(None)
            case h.DrainBegan():
                board.phase("draining")
            case h.JobComplete():
                board.phase("done")
            case h.Ready(address) | h.CoordinatorStarted(listen=address):
                board.set(address=address)
                board.ready()
            case h.AlreadyComplete(step=step):
                board.ready()
                board.phase("done", step=step)

    def _run(self, happening: h.Happening) -> None:
        board = self._board
        match happening:
            case h.RunChosen(job, run, steps, absence):
                board.set(job=job, run=run, steps=steps, absence=absence)
            case h.PatientsMatched():
                board.set(patients=_table(happening))
            case h.BankGrew(kept, windows, octets, of_octets):
                board.set(bank=f"{kept} of {windows} windows, {size(octets)} of {size(of_octets)}")
            case h.RunResumes(step, steps):
                board.set(step=step, steps=steps)
            case h.StepCommitted(step=step, loss=loss):
                board.set(step=step, loss=loss)
            case h.Evaluated(dice=dice, made_from=made_from, hd95=hd95, volume_ml=volume_ml):
                board.set(dice=dice, made_from=list(made_from), hd95=hd95, volume_ml=volume_ml)
            case h.CheckpointsHeld(steps_held):
                board.set(checkpoints=list(steps_held))
            case h.RunRolledBack(step=step, checkpoints=checkpoints):
                board.set(step=step, checkpoints=list(checkpoints))
            case h.WithdrawnInAll(patients=patients):
                board.set(withdrawn=patients)
            case h.RequestsStand(run, step, serves, waiting, running, ended, last, askers):
                counts = ServedCounts(waiting=waiting, running=running, finished=ended, askers=askers)
                board.serving(run, step, last, serves=serves, **counts)

    def _remote_site(self, happening: h.Happening) -> None:
        board = self._board
        match happening:
            case h.SiteStands(site, seats, state):
                board.site(site, seats=seats, state=state)
            case h.SiteJoined(site=site, tls=tls, applied=applied, checkpoints=checkpoints):
                now = time.monotonic()
                board.site(site, link_since=now, tls=tls, applied=applied, checkpoints=list(checkpoints))
            case h.SiteAbsent(site=site, cause=cause):
                board.site(site, absent_since=time.monotonic(), cause=cause)
            case h.SiteAwaited(site, what, deadline_s):
                board.waits(what, who=site, deadline_s=deadline_s)
            case h.SiteNotAwaited(site):
                board.waits(None, who=site)
            case h.SiteProgressed(site, applied, checkpoints, octets_in, octets_out):
                board.site(
                    site,
                    applied=applied,
                    checkpoints=list(checkpoints),
                    octets_in=octets_in,
                    octets_out=octets_out,
                )

    def _site(self, happening: h.Happening) -> None:
        board = self._board
        match happening:
            case h.LinkUp(coordinator, tls):
                board.waits(None)
                board.set(coordinator=coordinator, tls=tls)
            case h.JobJoined(job, run, step, steps, checkpoints, seats):
                board.set(
                    job=job, run=run, step=step, steps=steps, checkpoints=list(checkpoints), seats=seats
                )
            case h.StepApplied(step, octets_in, octets_out):
                board.set(step=step, octets_in=octets_in, octets_out=octets_out)
            case h.WindowsReleased(windows, octets_in, octets_out):
                board.set(released=windows, octets_in=octets_in, octets_out=octets_out)
            case h.PrivacySpent(epsilon=epsilon, alone=alone, budget=budget):
                others = f" ({alone:.3g} if all others tell their noise)" if alone > epsilon else ""
                board.set(privacy=f"epsilon {epsilon:.3g} of {budget:g} spent{others}")
            case h.StepCounted(step) | h.SiteRolledBack(step=step):
                board.set(step=step)
            case h.SiteSaved(checkpoints=checkpoints):
                board.set(checkpoints=list(checkpoints))
            case h.MissingChanged(missing=missing):
                board.set(missing=list(missing))
            case h.SiteRequestsStand(policy, serves, waiting, running, ended, last, answered, answered_last):
                board.inference(
                    last,
                    answered_last,
                    policy=policy,
                    serves=serves,
                    waiting=waiting,
                    running=running,
                    segmented=ended["segmented"],
                    cancelled=ended["cancelled"],
                    failed=ended["failed"],
                    askers=answered,
                )


def _table(matched: h.PatientsMatched) -> PatientTable:
    return {
        "used": matched.shared,
        "complete": matched.complete,
        "held_out": matched.held_out,
        "held_out_complete": matched.held_out_complete,
        "seats": list(matched.seats),
        "with_seats": {str(seats): count for seats, count in matched.with_seats.items()},
        "fills": {site: dict(seats) for site, seats in matched.fills.items()},
    }
