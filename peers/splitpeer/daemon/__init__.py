"""The running process: its lock, its status file, its log of record, systemd."""
