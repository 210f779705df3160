"""A recorded capture, played against a live peer."""
