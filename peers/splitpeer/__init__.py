"""splitpeer: the daemon that hospitals run, built on `splitproto`."""
