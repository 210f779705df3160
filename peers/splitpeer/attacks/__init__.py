"""Attacks on what a curious peer saw. They read captures, never a live peer."""

from __future__ import annotations
