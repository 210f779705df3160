"""``python -m splitpeer.cli``."""

from splitpeer.cli import main

main()
