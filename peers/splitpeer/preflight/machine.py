"""This machine: clock, folders, disk, descriptors, address, environment, and the images."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from splitpeer.daemon.lock import holder
from splitpeer.data import layouts
from splitpeer.data.consent import Consent
from splitpeer.data.files import Found
from splitpeer.data.pseudonym import load_salt, salt_check
from splitpeer.errors import PeerError
from splitpeer.preflight.finding import Finding
from splitpeer.settings.peer import PeerConfig
from splitpeer.storage import reading
from splitproto.lanes.addresses import parse_address

LEAST_DISK, WARN_DISK = 64 << 20, 1 << 30
"""Bytes free in [peer] state: below the first no checkpoint may fit, below the second a run will fill it."""
LEAST_FILES, WARN_FILES = 64, 1024
"""Open files: a coordinator keeps one for every connection, including strangers'."""
SET_BACK_S = 300.0
"""A daemon's file this much newer than the clock shows that the clock was set back."""
_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def check_salt(config: PeerConfig) -> Iterator[Finding]:
    """The federation's salt."""
    if config.data.salt is None:
        return
    try:
        salt = load_salt(config.data.salt)
    except PeerError as error:
        yield Finding("salt", "problem", str(error))
    else:
        # For comparing by telephone: a wrong salt shows only when patients are matched.
        yield Finding("salt", "ok", f"{config.data.salt}, check value {salt_check(salt).hex()}")


def check_data(config: PeerConfig) -> Iterator[Finding]:
    """The folder of images or masks, that the layout finds patients in it, and who of them has withdrawn consent."""
    data, images = config.data, config.data.images is not None
    key = "images" if images else "labels"
    folder = data.images or data.labels
    if folder is None:
        return
    listed = data.layout == "csv"
    if not (folder.is_file() if listed else folder.is_dir()):
        yield Finding(
            "data",
            "problem",
            f"{config.source}: [data] {key}: {folder} is not a {'file' if listed else 'folder'}: correct the path, or "
            "mount it",
        )
        return
    try:
        if images:
            found = layouts.find_all(folder, data.layout, config.peer.modalities)
        else:
            found = {"": layouts.find(folder, data.layout, None)}
    except (PeerError, OSError) as error:
        yield Finding("data", "problem", str(error))
        return
    for modality, kind in found.items():
        of = f" of {modality}" if len(found) > 1 else ""
        patients = f"{folder}: {len(kind.cases)} patients{of}; splitpeer data check reads every voxel"
        yield Finding("data", "ok", patients)
    if left_out := {one for kind in found.values() for one in kind.left_out}:
        skipped = "1 file was" if len(left_out) == 1 else f"{len(left_out)} files were"
        yield Finding("data", "warning", f"{folder}: {skipped} skipped: splitpeer data check shows why")
    if images and data.withdrawn is not None:
        yield from _consent(data.withdrawn, found)


def _consent(path: Path, found: Mapping[str, Found]) -> Iterator[Finding]:
    """The list of patients who have withdrawn consent, and that it is about patients of this site."""
    cases = {case.patient.encode(): case for kind in found.values() for case in kind.cases}
    consent = Consent(path, cases)
    try:
        withdrawn = consent.withdrawn()
    except PeerError as error:
        yield Finding("consent", "problem", str(error))
        return
    for text in consent.findings():
        yield Finding("consent", "warning", text)
    if not consent.findings():
        yield Finding(
            "consent", "ok", f"{path}: {len(withdrawn)} of {len(cases)} patients have withdrawn consent"
        )


def check_weights(config: PeerConfig) -> Iterator[Finding]:
    """The files of pretrained weights; whether they fit is seen with a job."""
    weights = config.model.weights if config.model is not None else None
    if weights is None:
        return
    for path in weights.values() if isinstance(weights, Mapping) else (weights,):
        if path.is_file():
            yield Finding("weights", "ok", str(path))
        else:
            yield Finding(
                "weights",
                "problem",
                f"{path}: no such file: make it with splitpeer pretrain, or correct [model] weights",
            )


def check_state(config: PeerConfig) -> Iterator[Finding]:
    """The state folder: that it can be written and has room."""
    folder = next(path for path in (config.peer.state, *config.peer.state.parents) if path.exists())
    if not folder.is_dir():
        yield Finding("state", "problem", f"{folder}: is not a folder: move it away, or change [peer] state")
        return
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding(
            "state",
            "problem",
            f"{folder}: cannot be written ({error.strerror}): give it to the daemon's user, or change [peer] state",
        )
        return
    text = f"{config.peer.state}: {reading.size(free)} free"
    if free < LEAST_DISK:
        yield Finding(
            "disk", "problem", f"{text}, too little for a checkpoint: make room, or change [peer] state"
        )
    elif free < WARN_DISK:
        yield Finding("disk", "warning", f"{text}, which a run's checkpoints may fill: make room")
    else:
        yield Finding("disk", "ok", text)


def check_clock(config: PeerConfig) -> Iterator[Finding]:
    """Whether the clock runs, and in step: certificates and lists end by it."""
    now = time.time()
    newest = max((path.stat().st_mtime for path in _written(config.peer.state)), default=0.0)
    if newest > now + SET_BACK_S:
        yield Finding(
            "clock",
            "problem",
            f"{config.peer.state}: files there are {(newest - now) / 3600:.1f} hours newer than the clock: it was set "
            "back: set it (timedatectl set-ntp true)",
        )
    elif not _synchronised():
        yield Finding(
            "clock",
            "warning",
            "the clock is not kept in step with a time server: run timedatectl set-ntp true",
        )
    else:
        yield Finding("clock", "ok", "kept in step with a time server")


def _written(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError:
        return []


def _synchronised() -> bool:
    """What the kernel says; True where it cannot be asked."""
    try:
        # A struct timex of zeros asks and changes nothing; it has 208 bytes.
        return bool(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) != _UNSYNCHRONISED)
    except (OSError, AttributeError):
        return True


def check_descriptors(config: PeerConfig) -> Iterator[Finding]:
    """How many files a coordinator may open; `serve` raises the soft limit to the hard one."""
    if config.peer.role != "coordinator":
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{most} open files"
    fix = "raise the limit (LimitNOFILE= in the unit, ulimit -Hn in a shell)"
    if most == resource.RLIM_INFINITY or most >= WARN_FILES:
        yield Finding("descriptors", "ok", text)
    elif most < LEAST_FILES:
        yield Finding("descriptors", "problem", f"{text} are too few for a job: {fix}")
    else:
        yield Finding("descriptors", "warning", f"{text}: strangers' idle connections may use them up: {fix}")


def check_address(config: PeerConfig) -> Iterator[Finding]:
    """Whether a coordinator can listen where it should."""
    if config.network.listen is None:
        return
    host, port = parse_address(config.network.listen)
    if holder(config.peer.state) is not None:
        yield Finding("listen", "ok", f"{config.network.listen}: the daemon runs")
        return
    try:
        with _bound("" if host == "*" else host, port):
            pass
    except OSError as error:
        cause = {
            errno.EADDRINUSE: f"port {port} is in use: stop what listens there, or choose another",
            errno.EADDRNOTAVAIL: f"this machine has no such address: use one of its own, or tcp://*:{port}",
            errno.EACCES: f"port {port} is for root only: choose one above 1023",
        }.get(error.errno or 0, f"{error.strerror or error}: correct the address")
        yield Finding(
            "listen", "problem", f"{config.source}: [network] listen {config.network.listen}: {cause}"
        )
    else:
        yield Finding("listen", "ok", config.network.listen)


def _bound(host: str, port: int) -> socket.socket:
    if host in (name for _, name in socket.if_nameindex()):
        host = ""  # ZeroMQ listens on an interface by its name
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def check_environment(config: PeerConfig, environ: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """A web proxy, which is not used."""
    environ = os.environ if environ is None else environ
    named = next((name for name in _PROXIES if environ.get(name)), None)
    if named and config.network.coordinator is not None:
        yield Finding(
            "proxy",
            "warning",
            f"{named} is set, but this program uses no web proxy: it needs a direct connection to "
            f"{config.network.coordinator}: have the firewall let it through",
        )
