"""What attacks found, for people: run folders in, one self-contained page and its JSON out."""

from splitpeer.report.model import Entry, Run
from splitpeer.report.store import load_run, save_run

__all__ = ["Entry", "Run", "load_run", "save_run"]
