"""The daemons: the only place that knows both the protocol and the network being trained."""
