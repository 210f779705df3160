"""Defences: what a party does to its tensors before they leave. A name with parameters, one class each."""

from __future__ import annotations

from splitpeer.defences.base import Defence, Parameter, Release, Stack, make_stack
from splitpeer.defences.image import ImageStack, make_image_stack
from splitpeer.defences.network import Defended, build_network, defend

__all__ = [
    "Defence",
    "Defended",
    "ImageStack",
    "Parameter",
    "Release",
    "Stack",
    "build_network",
    "defend",
    "make_image_stack",
    "make_stack",
]
