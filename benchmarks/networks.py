"""Each network at the demo's size: Dice of the patients held out, octets on the wire, seconds.

Four sites and a coordinator as daemons with TLS 1.3 on this machine, the phantom's patients, the demo's job with
another `[model]`. Octets are those of activations and gradients of training, as computed from the cut and the job.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from splitpeer.data.phantom.cohort import write_phantom
from splitpeer.demo.federation import SITES, DemoJob, Federation
from splitpeer.models import Cut, make_backbone
from splitpeer.models.registry import NETWORKS

SETTINGS: dict[str, dict[str, Any]] = {
    "basic-unet": {"features": [8, 8, 16, 32, 64, 8]},
    "residual-unet": {"features": [8, 8, 16, 32, 64]},
    "swin-unetr": {"feature_size": [12], "num_heads": [2, 4, 8, 16]},
}
"""At the demo's size; a network that is not here is made with its defaults."""


@dataclass(frozen=True)
class NetworkJob(DemoJob):
    """The demo's job with another network."""

    model: dict[str, Any] = field(default_factory=dict)

    def toml(self) -> dict[str, Any]:
        """`job.toml` as a dict."""
        return {**super().toml(), "model": self.model}

    def policy(self, site: str) -> dict[str, Any]:
        """Every level of the network may leave."""
        return {**super().policy(site), "levels": list(range(len(self.cut().levels)))}

    def cut(self) -> Cut:
        """All levels of the network."""
        settings = {
            name: value for name, value in self.model.items() if name not in ("network", "dimensions")
        }
        return make_backbone(self.model["network"], 2, settings).cut


def octets(job: NetworkJob) -> int:
    """Activations up and gradients down in the whole training, all sites together."""
    shapes = job.cut().shapes(job.batch, job.toml()["data"]["window"])
    values = sum(math.prod(shape) for shape in shapes.values())
    return 2 * 4 * values * len(SITES) * job.steps


def trained(job: NetworkJob, folder: Path, patients: Path) -> dict[str, Any]:
    """Dice, octets and seconds of one run in a new folder, with patients that are there."""
    folder.mkdir()
    federation = Federation(folder, job)
    federation.data.symlink_to(patients)
    federation.set_up()
    began = time.perf_counter()
    federation.run()
    seconds = time.perf_counter() - began
    result = json.loads((federation.results / "result.json").read_text())
    return {
        "network": job.model["network"],
        "dice": result["dice"],
        "octets": octets(job),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--patients", type=int, default=124)
    parser.add_argument("--validation", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        patients = Path(folder) / "patients"
        write_phantom(patients, given.patients, seed=DemoJob.seed)
        for name in given.networks:
            model = {"network": name, "dimensions": 2, **SETTINGS.get(name, {})}
            job = NetworkJob(
                patients=given.patients, validation=given.validation, steps=given.steps, batch=given.batch,
                evaluations=1, model=model,
            )  # fmt: skip
            rows.append(trained(job, Path(folder) / name, patients))
    if given.json:
        json.dump(rows, sys.stdout, indent=1)
        return
    table = Table(title=f"{given.patients} patients, {given.steps} steps of {given.batch}")
    for column in ("network", "Dice", "MiB", "seconds"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        mean = row["dice"].get("mean")
        shown = "-" if mean is None else f"{mean:.3f}"
        table.add_row(row["network"], shown, f"{row['octets'] / 2**20:.0f}", f"{row['seconds']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
