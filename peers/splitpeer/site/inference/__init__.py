"""Inference at a site: what it answers when others ask, and what it asks for its own people (SP-11.19)."""
