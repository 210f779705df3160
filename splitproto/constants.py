"""Every number of the wire, with its reason. `spec/registry.toml` lists the same; a test compares them."""

from __future__ import annotations

# --- envelope (SP-4): what no version may change ----------------------------------------------------
MAGIC = b"SPLT"
CARRIER_VERSION = 1
ENVELOPE_HEADER = 32
MAX_ENVELOPE_BODY = 1 << 20
"""1 MiB: ZeroMQ's high-water marks count messages, so messages of bounded size make them bound bytes."""
LINK_ID_BYTES = 16
MAX_RESET_TEXT = 200

# --- secure channel (SP-6) -----------------------------------------------------------------------------
TLS_FEED = 256 * 1024
"""Plaintext given to TLS per write; memory BIOs slow down about seven times when fed far more."""
ENVELOPE_FILL = 512 * 1024
"""Ciphertext in an envelope after which no more is added."""
MAX_HANDSHAKE_BYTES = 64 * 1024
"""TLS bytes taken from a peer before it is authenticated; flights are about 3 KiB."""
RECORD_BUDGET = 1 << 24
"""Records per direction and key; RFC 8446 5.5 allows 2^24.5 full AES-GCM records."""
BYTE_BUDGET = 256 << 30
"""Bytes per direction and key."""
STREAM_BUDGET = 1 << 31
"""A side whose next stream id is this high asks for a new link: half of all ids are left for what is under way."""
LINK_LIFETIME = 86_400.0
"""Seconds that one TLS key is used: limits a stolen key, or an unnoticed revocation, to 25 hours."""
ROTATION_GRACE = 3600.0
"""Seconds that a peer may keep a link that is to be replaced: it may be in the middle of a step."""
RECHECK_INTERVAL = 30.0
"""Seconds between two looks at the certificates of links that are open."""

# --- frames (SP-7) ---------------------------------------------------------------------------------------
FRAME_HEADER = 12
MAX_FRAME_PAYLOAD = 256 * 1024 - FRAME_HEADER
MAX_STREAMS = 16
"""Messages that may be half received at once."""

# --- messages (SP-8) --------------------------------------------------------------------------------------
PROTOCOL_VERSIONS = (1,)
MAX_DEPTH = 8
MAX_ITEMS = 65_536
"""Entries of one map or array."""
MAX_TEXT = 4_096
MAX_TENSORS = 256
MAX_DIMENSIONS = 6
MAX_TENSOR_BYTES = (1 << 32) - 1
"""A msgpack `bin` cannot be longer."""
DEFAULT_MAX_MESSAGE = 1 << 30
"""Tensor bytes of one message this side takes; the receiver's memory is bounded by it."""

# --- probes (SP-11.22) ------------------------------------------------------------------------------------
MAX_PROBE = 1 << 22
"""Octets that a probe or its answer carries: a tenth of a second at 300 Mb/s, and less than one batch."""
MAX_PROBES = 8
"""On one link."""

# --- time, in seconds ---------------------------------------------------------------------------------------
HANDSHAKE_TIMEOUT = 10.0
"""From the first envelope to WELCOME."""
HEARTBEAT_INTERVAL = 5.0
"""A silent side sends PING after this."""
PEER_TIMEOUT = 20.0
"""A peer that sent nothing for this long is lost."""
CLOSE_TIMEOUT = 2.0
"""From our last message to giving up on the peer's close_notify."""

# --- admission ---------------------------------------------------------------------------------------------
MAX_HALF_OPEN = 64
"""Links between first envelope and WELCOME, all sources together."""
MAX_HALF_OPEN_PER_SOURCE = 16
"""The same two caps hold for TCP connections without an admitted link."""
