"""Synthetic patients: anatomy, lesions, rendering, cohort."""
