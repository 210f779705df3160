"""A party's agreement that its half becomes part of one whole network: signed with its certificate's key.

`agreement.json` in a bundle holds the statement, the signature and the certificate. The statement names the run, the
digests of all that the bundle says and of its weights, who may hold the whole, and until when it may be made.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from splitpeer.errors import ConfigError, DataError
from splitpeer.export.half import EDITION, digest_of
from splitpeer.settings.peer import PeerConfig
from splitpeer.storage import reading
from splitproto import partners
from splitproto.errors import IdentityError
from splitproto.identity import Identity, check_name
from splitproto.partners import Trust

_LABEL = b"splitproto export agreement 1\n"
DAYS = 30
"""How long an agreement lasts by default."""
MOST_DAYS = 366
"""Whatever its party signed: a word that nobody can take back must end."""
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class ExportAgreement:
    """One that was checked."""

    identity: Identity
    holders: tuple[str, ...]
    until: datetime

    @property
    def party(self) -> str:
        """In words: who agreed."""
        return f"{self.identity.role} {self.identity.site}"


def sign(config: PeerConfig, facts: Facts, holders: Sequence[str], now: datetime, days: int = DAYS) -> bytes:
    """The content of `agreement.json`.

    Args:
        facts: of the bundle as it is written, digests of weights included.
        holders: sites, the coordinator's among them if it is one, that may hold the whole network.
        now: with its time zone.

    Raises:
        ConfigError: policy forbids it, or certificate and key cannot be used.
    """
    refuse_by_policy(config)
    try:
        named = sorted({check_name("site", name) for name in holders})
        credentials = config.credentials()
        key, chain = credentials.key.read_bytes(), credentials.certificate.read_bytes()
        statement = {
            "edition": EDITION, "run": facts["run"], "terms": facts["terms"], "step": facts["step"],
            "weights": facts["weights"], "facts": digest_of(facts), "holders": named,
            "signed": _written(now), "until": _written(now + timedelta(days=days)),
        }  # fmt: skip
        signature, certificates = partners.signed_statement(key, chain, _octets(statement))
    except IdentityError as error:
        raise ConfigError(f"the agreement cannot be signed: {error}") from None
    except OSError as error:
        raise ConfigError(f"[tls] certificate or key cannot be read: {error.strerror}") from None
    document = {
        "statement": statement,
        "signature": base64.b64encode(signature).decode(),
        "certificates": [base64.b64encode(der).decode() for der in certificates],
    }
    return (json.dumps(document, indent=4) + "\n").encode()


def refuse_by_policy(config: PeerConfig) -> None:
    """Raises ConfigError: a site's policy keeps its encoder out of any joined network."""
    policy = config.policy
    if policy is None or policy.joins:
        return
    why = (
        'preset = "private"'
        if policy.preset == "private"
        else "epsilon"
        if policy.epsilon
        else "join_encoder"
    )
    raise ConfigError(
        f"{config.source}: [policy] {why} keeps this site's encoder out of a joined network: anyone who holds it can "
        "invert "
        + (
            "what this site sends"
            if why != "epsilon"
            else "what this site sends, which the budget does not cover"
        )
        + ("" if why == "epsilon" else "; join_encoder = true allows it")
    )


def check(data: bytes, facts: Facts, trust: Trust, now: datetime) -> ExportAgreement:
    """Whether a bundle's party agreed to join it as it is.

    Args:
        data: content of `agreement.json`.
        facts: of the bundle, whose weights have the digests that it says.
        trust: the federation's.

    Raises:
        DataError: one line: not signed by the party, for another run or other weights, or over.
    """
    who = f"the agreement of {str(facts.get('party'))[:63]}"
    try:
        document = reading.parse(data)
        statement = document["statement"]
        signature = base64.b64decode(document["signature"], validate=True)
        chain = [base64.b64decode(one, validate=True) for one in document["certificates"]]
        holders, until = tuple(map(str, statement["holders"])), datetime.fromisoformat(statement["until"])
        signed = datetime.fromisoformat(statement["signed"])
        if not chain or statement["edition"] != EDITION or None in (until.tzinfo, signed.tzinfo):
            raise ValueError
        said = _octets(statement)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise DataError(f"{who} cannot be read: have it exported again with --agree") from None
    try:
        identity = partners.check_statement(chain, signature, said, trust, now)
    except IdentityError as error:
        raise DataError(f"{who} is not proven: {error.reason}: have it exported again with --agree") from None
    role = "coordinator" if facts["kind"] == "decoder" else "client"
    if (identity.site, identity.role) != (facts["party"], role):
        raise DataError(
            f"{who} is signed by {identity.role} {identity.site}: have {facts['party']} export it itself"
        )
    if statement["run"] != facts["run"]:
        raise DataError(f"{who} is for run {str(statement['run'])[:8]}, its bundle of run {facts['run'][:8]}")
    if statement["facts"] != digest_of(facts) or statement["weights"] != facts["weights"]:
        raise DataError(f"{who} is for another bundle than the one that it lies in: have it exported again")
    if until - signed > timedelta(days=MOST_DAYS):
        raise DataError(f"{who} lasts longer than {MOST_DAYS} days: have it exported again with --agree")
    if not signed - timedelta(minutes=5) <= now <= until:
        raise DataError(
            f"{who} ended on {until:%Y-%m-%d}: have it exported again with --agree"
            if now > until
            else f"{who} is of {signed:%Y-%m-%d %H:%M} UTC, which is not yet: check the clocks"
        )
    return ExportAgreement(identity, holders, until)


def _octets(statement: Mapping[str, Any]) -> Callable[[str], bytes]:
    """What is signed: the statement in one spelling, and for whom the certificate speaks."""
    text = json.dumps(statement, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return lambda uri: _LABEL + uri.encode() + b"\n" + text.encode()


def _written(moment: datetime) -> str:
    return moment.astimezone(UTC).replace(microsecond=0).isoformat()
