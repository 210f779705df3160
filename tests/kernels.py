"""The numerics with the kernels of several kinds of CPU: `python -m tests.kernels [pytest arguments]`.

numpy's BLAS and torch choose their kernels when they start, by the CPU that they find. The variables below make them
choose those of another. A result that a test expects must not depend on that choice: sums are rounded in another order.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

NUMERICS = [
    *(
        f"tests/splitpeer/{part}"
        for part in (
            "defences",
            "training",
            "attacks",
            "leakage",
            "models",
            "privacy",
            "data",
            "audit",
            "pretraining",
            "ranks",
        )
    ),
    *(
        f"tests/splitpeer/roles/test_{part}.py"
        for part in (
            "exactness",
            "codings",
            "averaging",
            "seats",
            "frozen",
            "secure_sum",
            "inference",
            "private_inference",
            "export",
            "segment",
        )
    ),
    "tests/benchmarks",
]
KERNELS: dict[str, tuple[dict[str, str], str]] = {
    # name: (variables, the flag in /proc/cpuinfo without which this CPU cannot run them)
    "OpenBLAS Haswell": ({"OPENBLAS_CORETYPE": "Haswell"}, "avx2"),
    "OpenBLAS SkylakeX": ({"OPENBLAS_CORETYPE": "SkylakeX"}, "avx512vl"),
    "OpenBLAS Prescott": ({"OPENBLAS_CORETYPE": "Prescott"}, "sse2"),
    "ATen default": ({"ATEN_CPU_CAPABILITY": "default"}, "sse2"),
    "ATen avx2": ({"ATEN_CPU_CAPABILITY": "avx2"}, "avx2"),
}
_MINE = ("OPENBLAS_", "ATEN_")


def environment(variables: dict[str, str]) -> dict[str, str]:
    """This process's, with no other choice of kernels than `variables`."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith(_MINE)}
    return {**usual, **variables}


def flags() -> frozenset[str]:
    """What this CPU can do; empty where it is no x86-64."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def main(arguments: list[str]) -> int:
    able, outcomes = flags(), {}
    for name, (variables, needed) in KERNELS.items():
        if needed not in able:
            outcomes[name] = f"left out: this CPU has no {needed}"
            continue
        print(f"== {name}: {' '.join(f'{key}={value}' for key, value in variables.items())}", flush=True)
        command = [sys.executable, "-m", "pytest", *(arguments or NUMERICS)]
        code = subprocess.run(command, env=environment(variables), check=False).returncode
        outcomes[name] = "failed" if code else "passed"
    for name, outcome in outcomes.items():
        print(f"{name:18} {outcome}")
    return int("failed" in outcomes.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
