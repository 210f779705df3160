"""A hospital: it dials, answers, and keeps what outlives a link."""
