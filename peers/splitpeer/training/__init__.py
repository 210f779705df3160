"""Training without sockets: loss, learning rates, the two halves of a step, metrics, windows, checkpoints."""
