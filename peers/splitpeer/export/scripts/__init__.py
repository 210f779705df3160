"""Code of an exported bundle: torch, MONAI and safetensors alone."""
