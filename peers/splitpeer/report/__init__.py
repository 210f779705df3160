"""What attacks found, for people: run folders in, one self-contained page and its JSON out."""

from splitpeer.report.model import AuditRun, Entry
from splitpeer.report.store import load_run, save_run

__all__ = ["AuditRun", "Entry", "load_run", "save_run"]
