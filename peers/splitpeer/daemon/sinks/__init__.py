"""Where happenings go: a file for each place, which says what is seen there of which happening."""
