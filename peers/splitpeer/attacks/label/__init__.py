"""What a site reads off gradients and the order of windows: the labels."""
