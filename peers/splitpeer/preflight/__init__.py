"""What can be wrong before a job begins: one function per check, each naming cause and fix.

`config check` and `serve` run the quick ones that read no voxel; `doctor` runs all, and dials.
"""

from __future__ import annotations

from datetime import UTC, datetime

from splitpeer.errors import ConfigError
from splitpeer.preflight.credentials import check_credentials
from splitpeer.preflight.finding import Finding, exit_code
from splitpeer.preflight.machine import (
    check_address,
    check_clock,
    check_data,
    check_descriptors,
    check_environment,
    check_salt,
    check_state,
    check_weights,
)
from splitpeer.preflight.policy import check_policy
from splitpeer.settings.peer import PeerConfig

__all__ = ["Finding", "exit_code", "notices", "preflight"]


def preflight(config: PeerConfig, *, online: bool = False) -> list[Finding]:
    """Every check of one peer, in the order in which a person would mend things."""
    found = check_credentials(config, datetime.now(UTC))
    for check in (
        check_salt,
        check_data,
        check_weights,
        check_policy,
        check_state,
        check_clock,
        check_descriptors,
        check_address,
        check_environment,
    ):
        found += check(config)
    # Without usable credentials there is nothing to dial with.
    if online and not any(finding.level == "problem" and finding.check == "certificate" for finding in found):
        from splitpeer.preflight.dial import check_coordinator

        found += check_coordinator(config)
    return found


def notices(config: PeerConfig) -> list[Finding]:
    """What a daemon should say when it starts; what it cannot start with, it finds itself."""
    try:
        config.credentials()
    except ConfigError:
        return []
    found = [*check_credentials(config, datetime.now(UTC)), *check_policy(config), *check_environment(config)]
    return [finding for finding in found if finding.level != "ok"]
