"""Inference at the coordinator: requests of the sites, in turn (SP-11.19)."""
