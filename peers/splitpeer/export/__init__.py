"""What a party holds of a run, as a folder for other programs: a MONAI bundle, and ONNX."""
