"""TLS 1.3 over memory: ciphertext in, plaintext out, and back; no socket (SP-6).

Four properties of TLS shape this file. (1) It is a byte stream: the boundaries of ZeroMQ messages mean
nothing inside, so frames carry their own lengths. (2) A TLS 1.3 client believes the handshake complete before
the server has looked at its certificate; the refusal arrives with the first read, so nothing is trusted before
the in-band WELCOME. (3) Every call, also one that raises, may leave octets to send (alerts, key updates):
`drain` after each. (4) One lost, repeated or reordered record ends the session; there is no resynchronising.
"""

from __future__ import annotations

import ssl

from .constants import MAX_ENVELOPE_BODY, MAX_HANDSHAKE_BYTES
from .errors import ChannelTruncated, LocalError, SecureChannelError
from .identity import claims, explain, refused

RECORD = 16 * 1024
"""Plaintext octets of one full TLS record (RFC 8446 5.1)."""
_ENCODING_DER = 2
"""`_ssl.ENCODING_DER`, which `ssl` does not export."""


class Channel:
    """One TLS session.

    Args:
        context: from `Credentials.server_context()` or `client_context()`.
        server_side: whether this side listens.
        hostname: what the dialler dialled; the listener's certificate must name it.
    """

    def __init__(self, context: ssl.SSLContext, *, server_side: bool, hostname: str | None = None) -> None:
        self._server_side = server_side
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=hostname
        )
        self._handshake_bytes = 0
        self._broken: LocalError | None = None
        """Found behind octets that were still good."""
        self.secure = False
        """TLS has finished on this side; says nothing yet about what the peer thinks."""
        self.peer_closed = False
        """The peer sent close_notify: nothing was cut off."""
        self.shut = False
        """We said close_notify: nothing may follow it."""
        self.records_out = 0
        self.bytes_out = 0

    def feed(self, data: memoryview) -> None:
        """Take ciphertext.

        Raises:
            SecureChannelError: more than `MAX_HANDSHAKE_BYTES` before the handshake is done.
        """
        if not self.secure:
            self._handshake_bytes += len(data)
            # SP-6-7: bounded before anybody is authenticated.
            if self._handshake_bytes > MAX_HANDSHAKE_BYTES:
                raise SecureChannelError("too many octets before the TLS handshake was done")
        self._incoming.write(data)

    def handshake(self) -> bool:
        """Continue the handshake; True when this side is done.

        Raises:
            SecureChannelError: it failed; an alert for the peer waits in `drain`.
        """
        if not self.secure:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                return False
            except ssl.SSLError as error:
                raise self._failed(error) from None
            self.secure = True
        return True

    def read_into(self, target: memoryview) -> int:
        """Decrypt into `target` until it is full, more ciphertext is needed or the peer has closed.

        Returns:
            How many octets were written.

        Raises:
            SecureChannelError: an alert or a damaged record; what came before it was returned by the call before.
            ChannelTruncated: the stream ended without close_notify.
        """
        read, size, done = self._tls.read, len(target), 0
        try:
            # OpenSSL returns at most one record per call.
            while done < size and not self.peer_closed and self._broken is None:
                # The stubs do not know that a buffer makes `read` return a count.
                count: int = read(size - done, target[done:])  # type: ignore[assignment]
                done += count
                self.peer_closed = count == 0
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.peer_closed = True
        except ssl.SSLEOFError:
            self._broken = ChannelTruncated("TLS ended without close_notify")
        except ssl.SSLError as error:
            self._broken = self._failed(error)
        if self._broken is not None and not done:
            # Kept without a traceback, which would keep the link: see `again`.
            raise self._broken.again()
        return done

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt `data`; the ciphertext waits in `drain`.

        Raises:
            SecureChannelError: the session is over.
        """
        if not len(data):
            return
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise self._failed(error) from None
        self.bytes_out += len(data)
        self.records_out += -(-len(data) // RECORD)

    def close(self) -> None:
        """Say close_notify, once."""
        if self.shut or not self.secure:
            return
        self.shut = True
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            # SP-6-9: our close_notify is out; unwrap then waits for the peer's, or finds the session broken.
            return

    @property
    def waiting(self) -> int:
        """Octets that `drain` would return, if it were asked for all."""
        return self._outgoing.pending

    def lead(self, head: bytes) -> None:
        """Put `head` before the ciphertext of the next `write`, for `drain` to return; nothing may be waiting."""
        self._outgoing.write(head)

    def drain(self, most: int = MAX_ENVELOPE_BODY) -> bytes:
        """Ciphertext to send now, at most one envelope's worth; empty when there is none."""
        return self._outgoing.read(most)

    @property
    def peer_certificate(self) -> bytes:
        """DER of the peer's certificate; empty before the handshake."""
        return (self.secure and self._tls.getpeercert(binary_form=True)) or b""

    @property
    def description(self) -> str:
        """For logs: such as `TLSv1.3 TLS_AES_256_GCM_SHA384`."""
        cipher = self._tls.cipher()
        return f"{self._tls.version()} {cipher[0]}" if cipher else "no TLS yet"

    def _failed(self, error: ssl.SSLError) -> SecureChannelError:
        whose = refused(error)
        # Before that an alert is plaintext: anybody on the way can send one.
        if whose == "ours" and not self.secure:
            whose = ""
        text = explain(error, local_is_server=self._server_side)
        return SecureChannelError(
            text, self._refused_certificate() if whose == "theirs" else "", refused=whose
        )

    def _refused_certificate(self) -> str:
        """What the certificate that we refused says of itself, for our own log: nothing of it is proven."""
        # Public from Python 3.13, where it gives DER; the chain is there although it was not accepted.
        chain = getattr(self._tls, "get_verified_chain", None) or self._tls._sslobj.get_verified_chain  # type: ignore[attr-defined]
        shown = chain() or []
        if not shown:
            return ""
        first = shown[0]
        return claims(first if isinstance(first, bytes) else first.public_bytes(_ENCODING_DER))
