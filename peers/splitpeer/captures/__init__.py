"""The curious peer: record what a role legitimately sees, and read it again. Knows no sockets and no model."""
