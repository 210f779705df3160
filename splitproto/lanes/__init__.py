"""What moves envelopes, and nothing more: one module for each kind of lane, their interface, and addresses."""
