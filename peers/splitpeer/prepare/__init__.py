"""A hospital's scans onto the common atlas, at the hospital alone; and masks from there back onto the scans."""
