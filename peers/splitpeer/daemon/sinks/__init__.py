"""The sinks: a module for each place where events are shown, which says how each event appears there."""
