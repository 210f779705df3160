"""The party that gathers sites, trains and evaluates."""
