"""DICOM in: the series of a folder, which of them is meant, and its voxels with an affine. No torch."""
