"""Defences: what a party does to its tensors before they leave. A name with parameters, one class each."""

from __future__ import annotations

from splitpeer.defences.base import Defence, Parameter, Release, Stack, make_stack

__all__ = ["Defence", "Parameter", "Release", "Stack", "make_stack"]
