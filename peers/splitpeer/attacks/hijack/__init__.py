"""A coordinator that cheats, and what a site can notice of it."""
