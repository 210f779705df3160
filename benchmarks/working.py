"""Shared by the benchmarks of the wire: certificates, links that have begun a job, and memory from /proc."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from splitproto import Credentials, Session, Timing, pki
from splitproto.messages import Begin, Inventory, JobAccept, JobOffer
from splitproto.records import Job, Level, Seat

MIB = 1 << 20
WAIT_S = 120.0
PATIENT = Timing(silence=600)
"""While others have their turn, a link may be silent."""
DIGEST = bytes(32)
HUB = "hub"
JOB = Job(
    name="benchmark",
    dimensions=2,
    network="none",
    settings=(),
    cut=(Level("x0", 8, (16, 16)),),
    levels=(0,),
    precision="f32",
    window=(96, 96),
    spacing=(),
    augment=False,
    batch=1,
    steps=1,
    optimiser="sgd",
    learning_rate=1.0,
    weight_decay=0.0,
    schedule="constant",
    seconds_per_step=1.0,
)


def certificates(folder: Path, sites: Sequence[str]) -> None:
    """A CA, a coordinator `HUB` at 127.0.0.1, and the sites."""
    now = datetime.now(UTC)
    pki.create_ca(folder, "benchmark", now=now)
    pki.issue(folder, "coordinator", HUB, hosts=["127.0.0.1"], now=now)
    for site in sites:
        pki.issue(folder, "client", site, now=now)


def credentials(folder: Path, name: str) -> Credentials:
    """Those of one party that `certificates` has made."""
    return Credentials(folder / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key")


async def begin(session: Session) -> None:
    """The coordinator's part of the exchange before the first batch."""
    await session.send(JobOffer(bytes(16), (Seat("t1", ("t1",)),), JOB, DIGEST))
    for _ in (JobAccept, Inventory):
        await session.receive(WAIT_S)
    await session.send(Begin(0, 0))


async def join(session: Session) -> None:
    """The site's part of `begin`."""
    await session.receive(WAIT_S)
    await session.send(JobAccept(bytes(16), 0, (), 0))
    await session.send(Inventory((), True, bytes(8)))
    await session.receive(WAIT_S)


def memory(pid: int, what: str = "VmRSS") -> int:
    """Octets that a process has in memory now; with `VmHWM`, its peak since `forget_peak`."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if found is None:
        raise LookupError(f"/proc/{pid}/status has no {what}")
    return int(found[1]) << 10


def forget_peak(pid: int) -> None:
    """Reset a process's peak to what it has in memory now (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
