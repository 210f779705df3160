"""Everything that can go wrong with a link: one `LocalError` is one wire code.

    SplitprotoError
    ├── LocalError              found on this side; `code` and `reason` are sent to the peer
    │   ├── EnvelopeError, CarrierVersionError, SequenceGap, LinkReset, LinkLost, TooManyLinks      0x01xx carrier
    │   ├── SecureChannelError, ChannelTruncated, IdentityError, CertificateEnded                   0x02xx channel
    │   ├── FrameError, CodecError, TensorError, MessageTooLarge, FlowControlError                  0x03xx encoding
    │   ├── VersionMismatch, FeatureMissing, NotAuthorised, BindingMismatch, Superseded,
    │   │     SecondHolder                                                                        0x04xx admission
    │   ├── UnexpectedMessage, StepMismatch, Misaligned, SchemaMismatch, PolicyRefused,
    │   │     SiteFailed                                                                          0x05xx conversation
    │   └── DeadlineExceeded, Draining, InternalError                                               0x06xx service
    ├── RemoteError             the peer told us; wraps the code it sent
    └── SetupError              before there is a link: AddressError, BindFailed; no code, never sent

A method that documents what it raises raises nothing else: any other exception is a bug.
"""

from __future__ import annotations

from typing import Literal, Self

from .text import printable

__all__ = ["BY_CODE", "LocalError", "RemoteError", "SetupError", "SplitprotoError", "printable"]


class SplitprotoError(Exception):
    """Root of this package's exceptions. `str(error)` is one line for a person."""

    name: str
    retry: bool
    """Whether dialling again, unchanged, may succeed."""

    def again(self) -> Self:
        """The same error without its traceback, to keep or to raise once more.

        A traceback holds the frames it went through, and those the link that keeps the error: a reference cycle, which
        would hold all memory of a dead link until a full garbage collection.
        """
        error = type(self).__new__(type(self), *self.args)
        error.__dict__.update(self.__dict__)
        return error


class LocalError(SplitprotoError):
    """An error found on this side.

    Args:
        reason: one line for people; it is also what the peer reads, so it names no path and no patient.
        detail: more, for the local log only; never sent.
    """

    code: int
    retry = False

    def __init__(self, reason: str, detail: str = "") -> None:
        reason = printable(reason)
        super().__init__(f"{reason} ({printable(detail)})" if detail else reason)
        self.reason = reason


class RemoteError(SplitprotoError):
    """The peer ended the link and said why."""

    def __init__(self, code: int, reason: str) -> None:
        known = BY_CODE.get(code)
        self.code = code
        self.name = known.name if known else f"unknown-{code:#06x}"
        self.retry = known.retry if known else False
        self.reason = reason = printable(reason)
        super().__init__(f"the peer says: {reason}" if reason else f"the peer says: {self.name}")


class SetupError(SplitprotoError):
    """Dialling or listening cannot begin until something on this side is changed.

    Args:
        reason: one line for people, with the fix.
    """

    retry = False

    def __init__(self, reason: str) -> None:
        self.reason = reason = printable(reason)
        super().__init__(reason)


class AddressError(SetupError, ValueError):
    """Text that is not an address, or not one for this purpose."""

    name = "address"


class BindFailed(SetupError):
    """A listener cannot have its address: it is in use, not this machine's, or not allowed."""

    name = "bind-failed"


# --- 0x01xx carrier -------------------------------------------------------------------------------


class EnvelopeError(LocalError):
    """Bytes that are not an envelope: another program, or garbage."""

    code, name = 0x0101, "envelope-malformed"


class CarrierVersionError(LocalError):
    """An envelope of a carrier version this side does not speak."""

    code, name = 0x0102, "carrier-version"


class SequenceGap(LocalError):
    """An envelope was lost, repeated or reordered; TLS cannot continue."""

    code, name, retry = 0x0103, "sequence-gap", True


class LinkReset(LocalError):
    """The peer does not know this link (it restarted, or gave the link up)."""

    code, name, retry = 0x0104, "link-unknown", True


class TooManyLinks(LocalError):
    """Too many half-open links; try again later."""

    code, name, retry = 0x0105, "busy", True


class LinkLost(LocalError):
    """The connection below the link is gone."""

    code, name, retry = 0x0106, "link-lost", True


# --- 0x02xx secure channel ------------------------------------------------------------------------


class SecureChannelError(LocalError):
    """TLS failed: version, certificate, or damaged records.

    Args:
        refused: "ours": the peer refuses our certificate, and said so where nobody else can. "theirs": what answered
            showed one that we refuse. Empty: it may be damage done on the way.
    """

    code, name = 0x0201, "tls-failed"

    def __init__(self, reason: str, detail: str = "", *, refused: Literal["", "theirs", "ours"] = "") -> None:
        super().__init__(reason, detail)
        self.refused = refused


class ChannelTruncated(LocalError):
    """TLS ended without close_notify: bytes may be missing."""

    code, name, retry = 0x0202, "tls-truncated", True


class IdentityError(LocalError):
    """A certificate that names no splitproto identity, or no longer does: it was revoked."""

    code, name = 0x0203, "identity-malformed"


class CertificateEnded(LocalError):
    """A certificate of this link has reached its end; who has a new one dials again, who has none is refused then. Or
    that of a partner in a secure sum (SP-11.18-8), who is away: dialling again waits for it."""

    code, name, retry = 0x0204, "certificate-ended", True


# --- 0x03xx encoding ------------------------------------------------------------------------------


class FrameError(LocalError):
    """A frame that breaks the framing rules."""

    code, name = 0x0301, "frame-malformed"


class CodecError(LocalError):
    """Bytes that are not one strict msgpack value, or a message without its fields."""

    code, name = 0x0302, "codec"


class TensorError(LocalError):
    """A tensor descriptor that is unknown, inconsistent or too large."""

    code, name = 0x0303, "tensor"


class MessageTooLarge(LocalError):
    """A message beyond the negotiated size."""

    code, name = 0x0304, "message-too-large"


class FlowControlError(LocalError):
    """More bytes than credit was given for."""

    code, name = 0x0305, "flow-control"


# --- 0x04xx admission -----------------------------------------------------------------------------


class VersionMismatch(LocalError):
    """The two sides share no protocol version."""

    code, name = 0x0401, "protocol-version"


class FeatureMissing(LocalError):
    """One side requires a feature that the other does not offer."""

    code, name = 0x0402, "feature-missing"


class NotAuthorised(LocalError):
    """A valid certificate, but not one this side works with: role, federation or allow-list."""

    code, name = 0x0403, "not-authorised"


class BindingMismatch(LocalError):
    """The two sides saw different certificates: something sits in between."""

    code, name = 0x0404, "binding-mismatch"


class Superseded(LocalError):
    """Another link of the same site counts: a newer one that proved itself, or an older one that still answers."""

    code, name, retry = 0x0405, "superseded", True


class SecondHolder(LocalError):
    """Another holder of the site's certificate has this site's part in the run."""

    code, name = 0x0406, "second-holder"


# --- 0x05xx conversation --------------------------------------------------------------------------


class UnexpectedMessage(LocalError):
    """A message that the state tables do not allow now."""

    code, name = 0x0501, "unexpected-message"


class StepMismatch(LocalError):
    """A step number out of order."""

    code, name = 0x0502, "step-mismatch"


class Misaligned(LocalError):
    """The two sides hold different samples for one batch."""

    code, name = 0x0503, "misaligned"


class SchemaMismatch(LocalError):
    """Tensors do not have the agreed names, dtypes or shapes."""

    code, name = 0x0504, "schema-mismatch"


class PolicyRefused(LocalError):
    """A site's policy does not allow what was asked."""

    code, name = 0x0505, "policy-refused"


class SiteFailed(LocalError):
    """A site cannot continue: its data or its computation failed."""

    code, name = 0x0506, "site-failed"


class FusionMismatch(LocalError):
    """A partner's key for secure fusion is not proven, or has changed; or masks do not cancel."""

    code, name = 0x0507, "fusion-mismatch"


# --- 0x06xx service -------------------------------------------------------------------------------


class DeadlineExceeded(LocalError):
    """A wait ended; the reason names what was waited for."""

    code, name, retry = 0x0601, "deadline", True


class Draining(LocalError):
    """This side is shutting down in good order."""

    code, name, retry = 0x0602, "draining", True


class InternalError(LocalError):
    """A defect on this side; details stay in its log."""

    code, name = 0x0603, "internal"


BY_CODE: dict[int, type[LocalError]] = {cls.code: cls for cls in LocalError.__subclasses__()}
"""The registry: wire code to exception class."""
