"""What kind of machine computes: results repeat bit for bit on one kind, and to rounding on another."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

_FILLING: Any = torch.utils.deterministic  # its setting is not in the stubs
_CPUINFO = Path("/proc/cpuinfo")
_MOST = 80  # characters of a model's name


def kind(device: torch.device) -> str:
    """All that decides the last bits, such as "x86_64 AMD EPYC 7763, AVX2, torch 2.9.0, 1 thread".

    Architecture and model choose the kernels of oneDNN and BLAS and their block sizes, the capability those of torch
    itself, and the number of threads how sums are divided.
    """
    threads = torch.get_num_threads()
    parts = [
        f"{platform.machine()} {_model()}".strip(),
        torch.backends.cpu.get_cpu_capability(),
        f"torch {torch.__version__}",
        f"{threads} thread{'s' if threads != 1 else ''}",
    ]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    return ", ".join(parts)


class _Order:
    """Torch's switch for sums in a fixed order: one for the process, on while any thread wants it."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before = (0, True)

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before = (torch.get_deterministic_debug_mode(), _FILLING.fill_uninitialized_memory)
                # use_deterministic_algorithms would do, but tells torch's compiler too, and so imports it.
                torch.set_deterministic_debug_mode("warn")
                _FILLING.fill_uninitialized_memory = False

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                mode, filling = self._before
                torch.set_deterministic_debug_mode(mode)
                _FILLING.fill_uninitialized_memory = filling


_ORDER = _Order()


@contextmanager
def in_order() -> Iterator[None]:
    """Gradients of values that are looked up (Swin's bias tables) are summed in a fixed order.

    On several threads torch adds them up in whatever order the threads arrive, so that no two runs agree. Several
    threads of a process may be inside at once.
    """
    _ORDER.enter()
    try:
        yield
    finally:
        _ORDER.leave()


@cache
def _model() -> str:
    """The processor's own name; empty where the system does not tell it, as on most ARM machines."""
    try:
        lines = _CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    named = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return " ".join(next(named, "").split())[:_MOST]
