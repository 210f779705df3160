"""What attacks found, for people: run folders in, one self-contained page and its JSON out."""
