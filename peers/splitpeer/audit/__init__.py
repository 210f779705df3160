"""The audit: a site, or a researcher, plays all parts on data of its own and measures what leaks."""

from __future__ import annotations
