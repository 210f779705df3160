"""Inference: how long one patient takes, how many patients a minute, and what bounds it.

A federation of real processes (a coordinator, and a site per modality) trains one step, and then serves. Requests go
through the spool, as those of `splitpeer segment` do. First one at a time: latency. Then several at once, from all
sites: patients a minute. CPU seconds are of each process with all threads, from /proc. After each request the same
network computes the same windows in this process, with as many threads as there are cores, as the sites compute side by
side: what a request takes longer is wire and queue, files and whatever else is not computing. The sites have read and
normalised the images before, and keep them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rows import Found, Line, at_most, ratios, spread

from splitpeer.daemon.spool import Spool, folder_of
from splitpeer.daemon.spooled import SpoolRequest, now
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import job_on_wire, seat_descriptors
from splitpeer.models import build_split_network, unet_backbone
from splitpeer.settings.job import JobConfig
from splitpeer.settings.loading import to_toml
from splitproto import pki
from splitproto.allocator import keep_freed_memory
from splitproto.tensors import body_bytes

MODALITIES = ("flair", "t1", "t1ce", "t2")
WAIT_S = 600.0
TICK_S = 0.01


@dataclass(frozen=True)
class Case:
    """What is segmented."""

    shape: tuple[int, int, int]
    window: tuple[int, ...]
    batch: int

    def job(self, features: list[int], sites: list[str], port: int) -> dict[str, dict[str, object]]:
        return {
            "job": {"name": "bench"},
            "sites": {f"site-{one}": one for one in sites},
            "model": {"dimensions": len(self.window), "features": features},
            "data": {"window": list(self.window), "validation": 1, "augment": False},
            "training": {"steps": 1, "batch": 1},
            "evaluation": {"overlap": 0.5, "batch": self.batch},
            "inference": {"max_queue": 256},
        }


CASES = {
    "2-D, 96 x 96 x 20": Case((96, 96, 20), (96, 96), 20),
    "2-D, 240 x 240 x 155": Case((240, 240, 155), (240, 240), 8),
    "3-D, 96 x 96 x 96": Case((96, 96, 96), (96, 96, 96), 1),
}
PATIENTS = 2
TARGET = 1.1
"""Of a request by the computation of its windows: wire and queue take a tenth."""


@dataclass(frozen=True)
class Figures:
    """Of one case."""

    latencies: list[float]
    """Seconds of each request, from its file to its answer."""
    computed: list[float]
    """Seconds that its windows take in one process, encoders and decoder, after each request."""
    computed_cpu: list[float]
    """The CPU seconds of the same."""
    requested_cpu: list[float]
    """CPU seconds of all processes for each request."""
    served_s: float
    """Median, of that at the coordinator: sites, wire and decoder."""
    site_cpu_s: float
    """CPU of one site for one patient."""
    hub_cpu_s: float
    """The same of the coordinator."""
    mib: float
    """Activations of all sites for one patient."""
    per_minute: float
    """With all requests at once."""
    together: int
    """How many these were."""

    @property
    def latency_s(self) -> float:
        """Median."""
        return statistics.median(self.latencies)


class Federation:
    """Files and processes of one case; the folder is new."""

    def __init__(
        self, folder: Path, case: Case, sites: list[str], features: list[int], patients: int, port: int
    ) -> None:
        self.folder, self.case, self.sites, self.features = folder, case, sites, features
        self.names = [f"P{number}" for number in range(patients)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        moment = datetime.now(UTC)
        pki.create_ca(folder / "pki", "bench", now=moment)
        pki.issue(folder / "pki", "coordinator", "hub", hosts=["127.0.0.1"], now=moment)
        for one in sites:
            pki.issue(folder / "pki", "client", f"site-{one}", now=moment)
        self._render()
        self._write("hub", "coordinator", {"network": {"listen": f"tcp://127.0.0.1:{port}"}, "data": {
            "labels": str(folder / "data" / "labels"), "convention": "msd"}, "log": {"format": "json"}})  # fmt: skip
        (folder / "hub" / "job.toml").write_text(to_toml(case.job(features, sites, port)))
        everyone = [f"site-{one}" for one in sites]
        for one in sites:
            self._write(f"site-{one}", "client", {
                "peer": {"modality": one}, "network": {"coordinator": f"tcp://127.0.0.1:{port}"},
                "data": {"images": str(folder / "data" / one)},
                "policy": {"coordinators": ["hub"], "inference": "listed", "inference_for": everyone,
                           "max_inferences_per_day": 10_000},
            })  # fmt: skip

    def _write(self, site: str, role: str, over: dict[str, dict[str, object]]) -> None:
        keys, here = self.folder / "pki", self.folder / site
        here.mkdir()
        usual: dict[str, dict[str, object]] = {
            "peer": {"role": role, "site": site, "federation": "bench"},
            "tls": {
                "ca": str(keys / "ca.crt"),
                "certificate": str(keys / f"{site}.crt"),
                "key": str(keys / f"{site}.key"),
            },
            "data": {"salt": str(keys / "federation.salt")},
        }
        for section, more in over.items():
            usual.setdefault(section, {}).update(more)
        (here / "peer.toml").write_text(to_toml(usual))

    def _render(self) -> None:
        source = np.random.default_rng(0)
        for name in self.names:
            mask = np.zeros(self.case.shape, np.uint8)
            mask[20:40, 20:40, 4:16] = 1
            mask[25:35, 25:35, 6:12] = 3
            for kind in ("labels", *self.sites):
                values = (
                    mask
                    if kind == "labels"
                    else (source.normal(100, 20, self.case.shape) + mask).astype(np.float32)
                )
                path = self.folder / "data" / kind / f"{name}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(values, np.eye(4)), path)

    def start(self) -> None:
        """All processes; returns when the service is ready."""
        for who in ("hub", *(f"site-{one}" for one in self.sites)):
            role = ["--role", "coordinator", "--job", "job.toml"] if who == "hub" else ["--role", "client"]
            with (self.folder / f"{who}.log").open("wb") as log:
                self.processes[who] = subprocess.Popen(
                    [sys.executable, "-m", "splitpeer.cli", "serve", *role],
                    cwd=self.folder / who, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
        self._until(lambda: "inference.ready" in (self.folder / "hub.log").read_text(), "the service")

    def stop(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()

    def spool(self, site: str) -> Spool:
        return Spool(folder_of(self.folder / f"site-{site}" / "state"))

    def ask(self, site: str, patient: str) -> str:
        return self.spool(site).ask(SpoolRequest(patient=patient, created=now(), asker="bench"))

    def wait(self, site: str, name: str) -> None:
        here = self.spool(site)
        self._until(lambda: here.status(name).final, "a segmentation")
        if (status := here.status(name)).state != "done":
            raise SystemExit(f"no segmentation: {status.reason}; see {self.folder}")

    def served(self) -> list[float]:
        """Seconds of each request at the coordinator, so far."""
        lines = (self.folder / "hub.log").read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [one["seconds"] for one in found if one.get("event") == "inference.served"]

    def cpu(self) -> dict[str, float]:
        """CPU seconds of each process."""
        tick = os.sysconf("SC_CLK_TCK")
        found = {}
        for who, process in self.processes.items():
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            found[who] = (int(fields[11]) + int(fields[12])) / tick
        return found

    def computing(self) -> Callable[[], tuple[float, float]]:
        """What computes the windows of a patient in this process, and returns its seconds, and CPU seconds."""
        case, windows = self.case, self.windows()
        network = build_split_network(
            unet_backbone(len(case.window), self.features), tuple(self.sites), job_seed=0
        )
        network.eval()
        rows = [min(case.batch, windows - at) for at in range(0, windows, case.batch)]
        images = [{one: torch.randn(n, 1, *case.window) for one in self.sites} for n in rows]

        def seconds() -> tuple[float, float]:
            began, spent = time.monotonic(), time.process_time()
            with torch.no_grad():
                for batch in images:
                    network(batch)
            return time.monotonic() - began, time.process_time() - spent

        return seconds

    def windows(self) -> int:
        """Of one patient."""
        return self.case.shape[2] if len(self.case.window) == 2 else 1

    def mib(self) -> float:
        """Activations of one patient, all sites."""
        settings = JobConfig.load(self.folder / "hub" / "job.toml")
        job, seats = job_on_wire(settings), seats_of(settings)
        octets = sum(
            body_bytes(seat_descriptors(job, seats.of(site), dict.fromkeys(filled, self.windows())))
            for site, filled in seats.filled.items()
        )
        return octets / 2**20

    def _until(self, holds: Callable[[], bool], what: str) -> None:
        ends = time.monotonic() + WAIT_S
        while not holds():
            for who, process in self.processes.items():
                if process.poll() is not None:
                    said = (self.folder / f"{who}.log").read_text()[-1500:]
                    raise SystemExit(f"{who} ended:\n{said}")
            if time.monotonic() > ends:
                raise SystemExit(f"{what} did not come within {WAIT_S:g} s: see {self.folder}")
            time.sleep(TICK_S)


def measure(federation: Federation, times: int, together: int) -> Figures:
    """Requests one at a time, then all at once."""
    first, computing = federation.sites[0], federation.computing()
    for name in federation.names:
        federation.wait(first, federation.ask(first, name))
    computing()
    known, spent = len(federation.served()), dict.fromkeys(federation.processes, 0.0)
    latencies, requested_cpu, computed = [], [], []
    for turn in range(times):
        before, began = federation.cpu(), time.monotonic()
        federation.wait(first, federation.ask(first, federation.names[turn % len(federation.names)]))
        latencies.append(time.monotonic() - began)
        after = federation.cpu()
        spent = {who: spent[who] + (after[who] - before[who]) / times for who in after}
        requested_cpu.append(sum(after.values()) - sum(before.values()))
        computed.append(computing())
    served = federation.served()[known:]
    began, asked = time.monotonic(), []
    for turn in range(together):
        site = federation.sites[turn % len(federation.sites)]
        asked.append((site, federation.ask(site, federation.names[turn % len(federation.names)])))
    for site, name in asked:
        federation.wait(site, name)
    minutes = (time.monotonic() - began) / 60
    return Figures(
        latencies,
        [wall for wall, _ in computed],
        [cpu for _, cpu in computed],
        requested_cpu,
        statistics.median(served),
        statistics.mean(cpu for who, cpu in spent.items() if who != "hub"),
        spent["hub"],
        federation.mib(),
        together / minutes,
        together,
    )


def bound(figures: Figures) -> str:
    """What most of the time of many requests goes to."""
    a_patient = 60 / figures.per_minute
    if figures.hub_cpu_s > 0.7 * a_patient:
        return "the coordinator's processor"
    if figures.site_cpu_s > 0.7 * a_patient:
        return "a site's processor"
    if (figures.hub_cpu_s + figures.site_cpu_s) > 0.7 * a_patient:
        return "processors, one after the other"
    return "waiting: wire, files, other work on the machine"


ABOUT = (
    "A request for one patient, from the spool to the result: a coordinator and two sites, processes of one thread",
    "each on two cores. It is compared with encoders and decoder on the same windows in one process of two threads.",
    "Sites have read and normalised the images before.",
)


def rows(found: Found) -> Iterator[Line]:
    """Requests for one patient, from the spool to the result."""
    for case, told in found.items():
        patient = f"{spread(told['latencies'])} s a patient, {told['per_minute']:.0f} patients a minute"
        yield Line(f"inference, {case}", "", f"{patient}, {told['mib']:.0f} MiB of activations", None)
        yield at_most(f"{case}: request / computation", ratios(told["latencies"], told["computed"]), TARGET)
        by_cpu = spread(ratios(told["requested_cpu"], told["computed_cpu"]))
        yield Line(f"{case}: CPU seconds of a request / of the computation", "", by_cpu, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    parser.add_argument(
        "--features", type=int, nargs=6, default=[8, 8, 16, 32, 64, 8], help="widths of the U-Net"
    )
    parser.add_argument("--sites", type=int, default=2, choices=range(1, 5))
    parser.add_argument("--times", type=int, default=3, help="requests, one at a time")
    parser.add_argument("--together", type=int, default=4, help="requests at once")
    parser.add_argument("--port", type=int, default=17443)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()
    found: dict[str, Figures] = {}
    for name in asked.case or list(CASES):
        with tempfile.TemporaryDirectory() as folder:
            federation = Federation(
                Path(folder),
                CASES[name],
                list(MODALITIES[: asked.sites]),
                asked.features,
                PATIENTS,
                asked.port,
            )
            try:
                federation.start()
                found[name] = measure(federation, asked.times, asked.together)
            finally:
                federation.stop()
    if asked.json:
        print(json.dumps({name: asdict(one) for name, one in found.items()}, indent=1))
        return
    table = Table(title=f"{asked.sites} sites, widths {asked.features}")
    for head in ("patient", "latency (worst)", "computation", "at the coordinator", "CPU: site", "CPU: coordinator",
                 "activations", "patients a minute", "bound by"):  # fmt: skip
        table.add_column(head, justify="left" if head in ("patient", "bound by") else "right")
    for name, one in found.items():
        table.add_row(
            name, f"{one.latency_s:.2f} s ({max(one.latencies):.2f})",
            f"{statistics.median(one.computed):.2f} s", f"{one.served_s:.2f} s", f"{one.site_cpu_s:.2f} s",
            f"{one.hub_cpu_s:.2f} s", f"{one.mib:.0f} MiB", f"{one.per_minute:.0f} ({one.together} at once)",
            bound(one),
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
