"""The keys with which a site masks what it sends in a run: one for training, and one for each epoch of the service.

What somebody recorded can be read with a key for as long as the key exists. So the key of training goes when training
is over, and that of an epoch with its last request, as the coordinator says (SP-11.18-16, SP-11.18-18); if it does not
say so, both go when the policy's time is over, which the coordinator cannot postpone (SP-11.18-19).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitpeer.daemon import happenings as h
from splitpeer.errors import DataError, PeerError
from splitpeer.site.answers import ANSWERS
from splitpeer.site.run_folders import (
    folders,
    forget_all_keys,
    is_complete,
    mark_complete,
    run_of,
    write_file,
)
from splitpeer.site.secret import FUSION_KEY, SERVICE_KEY, own_file, own_secret
from splitpeer.storage import durable, reading
from splitproto import fusion
from splitproto.errors import FusionMismatch, PolicyRefused
from splitproto.fusion import MOST_EPOCHS, SECRET_BYTES, Masking
from splitproto.messages import Settled
from splitproto.partners import Keys

PUBLIC = "fusion.public"
"""In the folder of a run: public keys, and when they were made. It outlives the keys."""
DAY_S = 86_400.0
SKEW_S = 86_400.0
"""Seconds by which a key may be dated in the future."""
PURPOSE = "the key of this site's masks"
LOST = "its run cannot continue, begin a new one"


class OtherEpoch(PolicyRefused):
    """The service asked in an epoch whose key this site does not have. The link ends; the site stays."""


@dataclass(frozen=True)
class ServiceKeys:
    """The keys of one epoch, with all that those of the next are made of."""

    masking: Masking
    epoch: int
    since: float
    """When this site entered it."""

    def following(self, epoch: int, now: float) -> ServiceKeys:
        """A later epoch; what was before cannot be computed from it."""
        masking = self.masking
        for number in range(self.epoch + 1, epoch + 1):
            masking = masking.following(number)
        return ServiceKeys(masking, epoch, now)

    @classmethod
    def read(cls, path: Path, public: bytes) -> ServiceKeys | None:
        """None: the partners have not proven themselves yet. Raises DataError."""
        said = _document(path)
        if "secret" in said:
            return None

        def parse() -> ServiceKeys:
            partners, shared = (
                {str(name): bytes.fromhex(key) for name, key in said[field].items()}
                for field in ("partners", "shared")
            )
            masking = Masking(bytes.fromhex(said["run"]), str(said["site"]), public, partners, shared)
            return cls(masking, int(said["epoch"]), float(said["since"]))

        found: ServiceKeys = _parsed(path, parse)
        return found

    def write(self, path: Path) -> None:
        """Durable when this returns. Raises DataError."""
        masks = self.masking
        keys = {
            field: {name: key.hex() for name, key in of.items()}
            for field, of in (("partners", masks.partners), ("shared", masks.shared))
        }
        said = {"run": masks.run.hex(), "site": masks.site, "epoch": self.epoch, "since": self.since, **keys}
        write_file(path, json.dumps(said).encode())


class MaskKeys:
    """Of one run.

    Args:
        folder: of the run.
        days: `[policy] max_key_days`.
        report: told when a key has gone.
        now: seconds, as `time.time`.

    Raises:
        PolicyRefused: the run is complete.
        DataError: a file in the folder is missing, or cannot be read or written.
    """

    def __init__(
        self, folder: Path, days: float, report: h.Reporter, now: Callable[[], float] = time.time
    ) -> None:
        self._folder, self._days, self._report, self._now = folder, days, report, now
        if is_complete(folder):
            _forget(folder, report)
            raise PolicyRefused("the run is complete at this site, and the key of its masks was deleted")
        _check_answers(folder)
        if not (folder / PUBLIC).exists():
            _make(folder, now())
        written = _document(folder / PUBLIC)
        self.public = _parsed(folder / PUBLIC, lambda: Keys.read(written["keys"]))
        """What partners are shown, also when the secrets are gone."""
        self._since: float = _parsed(folder / PUBLIC, lambda: float(written["since"]))
        self._training: Masking | None = None
        self._service: ServiceKeys | None = None
        self._told: Settled | None = None
        _expire(folder, days, report, now())
        # Now, not when the partners have proven themselves.
        if (folder / FUSION_KEY).exists():
            self._secret()
        if (folder / SERVICE_KEY).exists():
            own_file(folder / SERVICE_KEY, PURPOSE)

    def begin_link(self) -> None:
        """What was said and proven on another link does not count on this one."""
        self._told = self._training = self._service = None

    def agree(self, run: bytes, site: str, partners: Mapping[str, Keys]) -> None:
        """These partners have proven themselves on a new link.

        Raises:
            FusionMismatch: a key is not usable.
            DataError: a file cannot be read or written.
        """
        self.begin_link()
        if (self._folder / FUSION_KEY).exists():
            training = {name: keys.training for name, keys in partners.items()}
            self._training = Masking.agreed(run, site, self._secret(), training)
        if (self._folder / SERVICE_KEY).exists():
            self._take_service(run, site, {name: keys.service for name, keys in partners.items()})

    def masking(self, mode: str) -> Masking:
        """With what an answer in this mode is masked.

        Raises:
            OtherEpoch: this epoch's key was deleted, or does not exist yet.
            PolicyRefused: the key was deleted, and no other follows.
            DataError: one whose time is over cannot be removed.
        """
        self.expire()
        told = self._told
        if mode == "infer" or (mode == "release" and told is not None and told.trained):
            # SP-11.18-18: all parties are in one epoch, or their masks do not cancel.
            service = self._service
            if service is None and not (self._folder / SERVICE_KEY).exists():
                raise PolicyRefused(
                    "the key of the service was deleted at this site, which answers no more requests of this run"
                )
            if service is None or told is None or told.epoch != service.epoch:
                raise OtherEpoch(_no_key(told, service))
            return service.masking
        if self._training is None:
            raise PolicyRefused(
                "the key of the run's training was deleted at this site, which answers no more questions of that kind"
            )
        return self._training

    def settle(self, told: Settled) -> None:
        """SP-11.18-16, SP-11.18-18: what the coordinator says is over.

        Raises:
            PolicyRefused: too many epochs are passed over.
            DataError: a file cannot be written or removed.
        """
        self._told, service = told, self._service
        if told.trained:
            self._end_training("the coordinator does not need it any more")
        if service is not None and told.epoch > service.epoch:
            if told.epoch > service.epoch + MOST_EPOCHS:
                raise PolicyRefused(
                    f"epoch {told.epoch} of the service, where {service.epoch} is this site's"
                )
            self._replace(service, told.epoch, self._now(), "the coordinator does not need the one before")

    def expire(self) -> None:
        """SP-11.18-19: what is older than the policy allows goes. Raises DataError."""
        now, service = self._now(), self._service
        if why := _over(self._since, self._days, now):
            self._end_training(why)
        if service is not None and (why := _over(service.since, self._days, now)):
            self._replace(service, service.epoch + 1, now, why)

    # --- inside ----------------------------------------------------------------------------------------

    def _end_training(self, why: str) -> None:
        self._training = None
        if _remove(self._folder / FUSION_KEY):
            self._report(h.MaskKeyDeleted(run_of(self._folder), why))

    def _secret(self) -> bytes:
        path = self._folder / FUSION_KEY
        found = own_secret(path, SECRET_BYTES, PURPOSE, LOST)
        if fusion.public_of(found) != self.public.training:
            raise DataError(f"{path}: is not the key that the run began with; {LOST}")
        return found

    def _take_service(self, run: bytes, site: str, partners: Mapping[str, bytes]) -> None:
        """The epoch that an earlier link or process was in; at first, from the secret, which then goes."""
        path = self._folder / SERVICE_KEY
        own_file(path, PURPOSE)
        found = ServiceKeys.read(path, self.public.service)
        if found is None:
            secret = _parsed(path, lambda: bytes.fromhex(_document(path)["secret"]))
            if len(secret) != SECRET_BYTES or fusion.public_of(secret) != self.public.service:
                raise DataError(f"{path}: is not the key that the run began with; {LOST}")
            now = self._now()
            self._keep(ServiceKeys(Masking.agreed(run, site, secret, partners), 0, now).following(1, now))
        elif (found.masking.run, found.masking.site, found.masking.partners) != (run, site, partners):
            raise FusionMismatch("the keys of the service are of other partners: begin a new run")
        else:
            self._service = found

    def _replace(self, service: ServiceKeys, epoch: int, now: float, why: str) -> None:
        self._keep(service.following(epoch, now))
        self._report(h.ServiceKeyReplaced(run_of(self._folder), epoch, why))

    def _keep(self, service: ServiceKeys) -> None:
        service.write(self._folder / SERVICE_KEY)
        self._service = service


def forget_keys(state: Path, days: float, report: h.Reporter, now: Callable[[], float] = time.time) -> None:
    """In all runs of a site: what a crash left undone between the mark of a complete run and its keys (SP-11.18-5),
    and keys older than `days` (SP-11.18-19). What cannot be read or removed is reported, and the rest looked at."""
    for folder in folders(state):
        if is_complete(folder):
            if (folder / FUSION_KEY).exists() or (folder / SERVICE_KEY).exists():
                mark_complete(folder, report)
            continue
        try:
            _expire(folder, days, report, now())
        except (PeerError, OSError) as error:
            report(h.DataWarning(str(error)))


def _expire(folder: Path, days: float, report: h.Reporter, now: float) -> None:
    """SP-11.18-19, where the partners of a run have not proven themselves to this process. Raises DataError."""
    public, key = folder / PUBLIC, folder / SERVICE_KEY
    if not public.exists():
        return
    said = _document(public)
    run, over = run_of(folder), _over(_parsed(public, lambda: float(said["since"])), days, now)
    if over and _remove(folder / FUSION_KEY):
        report(h.MaskKeyDeleted(run, over))
    if not key.exists():
        return
    keys = _parsed(public, lambda: Keys.read(said["keys"]))
    service = ServiceKeys.read(key, keys.service)
    if service is None and over:
        # Partners may have masked with the public half, although they have proven nothing here.
        if _remove(key):
            report(h.ServiceKeyDeleted(run, over))
    elif service is not None and (why := _over(service.since, days, now)):
        service.following(service.epoch + 1, now).write(key)
        report(h.ServiceKeyReplaced(run, service.epoch + 1, why))


def _over(since: float, days: float, now: float) -> str:
    """Why a key that was made at `since` is too old; empty: it is not."""
    if now - since > days * DAY_S:
        return f"it was made more than {days:g} days ago ([policy] max_key_days)"
    # A clock that was wrong once must not keep a key alive. `not <=` also catches NaN.
    if not since - now <= SKEW_S:
        return "its file has a time in the future: the clock was wrong then or is now, so its age is unknown"
    return ""


def _no_key(told: Settled | None, service: ServiceKeys | None) -> str:
    why = "the key of this epoch of the run's inference was deleted at this site"
    if told is None or service is None or told.epoch > service.epoch:
        return why
    return (
        f"{why}: the coordinator is in epoch {told.epoch}, the site in {service.epoch}. Was the coordinator restored "
        "from a backup? Each request takes it one epoch further; the site answers when it has caught up"
    )


# --- files ----------------------------------------------------------------------------------------------


def _make(folder: Path, now: float) -> None:
    """SP-11.18-5: both secrets, and last what shows that they were made."""
    training = own_secret(folder / FUSION_KEY, SECRET_BYTES, PURPOSE, LOST)
    # Nobody has seen the public half yet, so what a crash has left is made anew.
    service = secrets.token_bytes(SECRET_BYTES)
    write_file(folder / SERVICE_KEY, json.dumps({"epoch": 0, "secret": service.hex()}).encode())
    keys = Keys(fusion.public_of(training), fusion.public_of(service))
    write_file(folder / PUBLIC, (json.dumps({"keys": keys.written(), "since": now}) + "\n").encode())


def _check_answers(folder: Path) -> None:
    """SP-11.18-13: nobody knows what was answered under these masks. Raises DataError."""
    answers = folder / ANSWERS
    if answers.exists():
        return
    if any((folder / name).exists() for name in (FUSION_KEY, SERVICE_KEY, PUBLIC)):
        raise DataError(
            f"{answers}: is missing, and only it tells what {FUSION_KEY} has masked: begin a new run (an older copy "
            "does not tell what came after it)"
        )
    # Before the keys, so that keys without it mean that answers were lost.
    write_file(answers, b"")


def _forget(folder: Path, report: h.Reporter) -> None:
    try:
        forget_all_keys(folder, report)
    except OSError as error:
        raise durable.refusal(error, f"{folder}:", "[peer] state") from None


def _remove(path: Path) -> bool:
    """Durably; whether it was there. Raises DataError."""
    try:
        path.unlink()
        durable.sync_folder(path.parent)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise durable.refusal(error, f"{path}:", "[peer] state") from None
    return True


def _document(path: Path) -> Any:
    try:
        return reading.document(path)
    except (OSError, ValueError):
        raise DataError(f"{path}: cannot be read: restore it, or begin a new run") from None


def _parsed(path: Path, parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except (ValueError, TypeError, LookupError, AttributeError):
        raise DataError(f"{path}: cannot be read: restore it, or begin a new run") from None
