"""Imports without the garbage collector: of a command, and of torch and what needs it.

They leave half a million objects that stay as long as the process. Looking through them again and again costs a fifth
of a start, and as much when the process ends, and none of them is ever garbage.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module


def load(*modules: str) -> None:
    """Import modules; the collector passes over what lives then from now on."""
    if all(module in sys.modules for module in modules):
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        for module in modules:
            import_module(module)
        gc.freeze()
    finally:
        if collecting:
            gc.enable()
