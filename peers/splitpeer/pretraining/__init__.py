"""A site's encoder before its first run: trained on its own, without a wire (`splitpeer pretrain`)."""
