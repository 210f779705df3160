"""Why a patient, or one side's data as a whole, cannot be used: the closed vocabulary of SP-11.13-2.

A cause travels by its name, and is shown to people by its phrase; neither names a file, a folder or a patient.
"""

from __future__ import annotations

CONSENT = "consent"
MISSING = "missing"
SHOWN = "shown"
OF_A_PATIENT = {
    MISSING: "the file is gone",
    "unreadable": "the file cannot be read",
    "truncated": "the file is truncated or damaged",
    "malformed": "the file is not a volume of the expected kind",
    "too-large": "the volume is larger than the site allows",
    "not-finite": "the volume holds values that are not finite",
    "empty": "the volume is zero throughout",
    "grid": "the volume's grid cannot be used or differs",
    "mask-values": "the mask holds values outside its convention",
    CONSENT: "consent was withdrawn",
    SHOWN: "another run has shown the patient",
}
"""Causes of one patient, which `withdraw` may name."""

OF_A_SIDE = {
    "data": "its data cannot be used",
    "disk-full": "its disk is full",
    "disk-failed": "its disk fails",
    "memory": "it is out of memory",
    "descriptors": "it has too many open files",
    "settings": "its settings do not fit",
    "internal": "a defect of its software",
}
"""Causes of everything that a side holds; no patient is withdrawn for these."""

CAUSES = {**OF_A_PATIENT, **OF_A_SIDE}
