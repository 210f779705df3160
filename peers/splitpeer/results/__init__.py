"""What a segmentation becomes at the hospital that asked for it: NIfTI, DICOM SEG, a page to look at, figures.

Everything here is on the patient's own grid, that of the file or series at this hospital, and stays there.
"""
