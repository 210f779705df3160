"""Several processes under `torchrun` as one coordinator, or as one sweep."""
