"""What a coordinator reads off activations: the images."""
