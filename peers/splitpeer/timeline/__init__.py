"""Where the time of a step goes: spans that peers record (`spans`), and the pictures that are made of them."""
