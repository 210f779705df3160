"""Writes the test vectors next to it: `python spec/vectors/generate.py` (`--check` only compares).

Deterministic: no clock, no randomness. Expectations are written by hand; the library only packs octets. What
both sides derive is computed from the words of the specification, not by the library that is tested with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import asking
import captures
import certificates
import coding
import derive
import fusing
import holding
import images
import learning as learn
import releasing
import talk
import wire
from common import Case

HERE = Path(__file__).parent

FAMILIES: dict[str, tuple[str, Callable[[], Iterator[Case]]]] = {
    "envelope": (
        "One ZeroMQ message (SP-4). `repeat`: [octets, times] to append to `input`.",
        wire.envelopes,
    ),
    "framing": ("One frame header (SP-7).", wire.frame_headers),
    "streams": (
        "What a client in state working sends inside TLS; streams 1 to 99 are used up, the coordinator takes "
        "messages of 8192 octets and has taken none yet. `answer`: octets it sends back.",
        wire.streams,
    ),
    "codec": ("One value of the data model (SP-8.1).", wire.values),
    "tensors": ("Descriptors, bin heads, bodies, bfloat16 (SP-8.3).", wire.tensors),
    "codings": ("Samples as coded, and back (SP-11.21).", coding.codings),
    "messages": ("The payload of a HEAD frame (SP-8.4).", talk.heads),
    "certificates": (
        "The chain that a peer's handshake shows (SP-6-2 to SP-6-5). `dialled`: it is the listener, under this name; "
        "null: it is the dialler. The key of every leaf is `common.key`, known to everybody and for tests only.",
        certificates.certificates,
    ),
    "negotiation": ("Two offers (SP-10).", talk.agreements),
    "states": (
        "Both machines of a link (SP-9), where `features` were agreed. `say`: side, message, its `mode` or nothing. "
        "An error happens at the last word.",
        talk.conversations,
    ),
    "digests": ("What both sides compute by themselves (SP-6-8, SP-11.5 to SP-11.8).", derive.derivations),
    "learning": (
        "A job's terms (SP-11.1, SP-11.8); learning rates, to 1e-12 relative, and weights after each step, to 2e-6 "
        "absolute (SP-11.10); losses, and on whom they may be taken (SP-11.20).",
        learn.learning,
    ),
    "holder": ("Who holds a site's part in a run (SP-11.14).", holding.proofs),
    "fusion": (
        "Secure fusion (SP-11.18): integers, keys, masks, the sum of three sites, and the proof of their keys.",
        fusing.fusion,
    ),
    "releases": (
        "What a coordinator asks of a site with frozen encoders, one question after the other, each answered "
        "before the next (SP-11.17-3, SP-11.17-4). `answered`: windows that have left; an error is of the last one.",
        releasing.questions,
    ),
    "inference": (
        "For whom a site computes (SP-11.19-4), and what it is asked for a request (SP-11.19-8): `windows` that were "
        "asked for; an error is of the last that was said.",
        asking.inference,
    ),
    "data": (
        "Files of data/ -> grids, to 1e-5, and windows: of images to 1e-4, of masks exactly (SP-11.12, SP-11-23); "
        "and which grids agree.",
        images.images,
    ),
    "capture": (
        "One file of a capture (capture.md), with its `key` where one is given. `intact`: records read before the "
        "error; those that hold tensors are read with them.",
        captures.captures,
    ),
}


SHARED = {"certificates": certificates.common}
"""What all cases of a family have in common."""


def render(family: str) -> str:
    """The text of one file."""
    about, cases = FAMILIES[family]
    listed = list(cases())
    names = [case["name"] for case in listed]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"{family}: two cases have one name: {', '.join(sorted(twice))}")
    shared = f' "common": {json.dumps(SHARED[family]())},\n' if family in SHARED else ""
    lines = ",\n".join(f"  {json.dumps(case)}" for case in listed)
    return (
        f'{{\n "family": "{family}",\n "about": {json.dumps(about)},\n{shared} "cases": [\n{lines}\n ]\n}}\n'
    )


def main() -> int:
    """Write all files; with --check, only say which differ."""
    stale = []
    written = {f"{family}.json": render(family).encode() for family in FAMILIES}
    usable = images.files() | {name: file for name, (_, file) in images.unusable().items()}
    written |= {f"data/{name}": file.octets() for name, file in usable.items()}
    for name, octets in written.items():
        path = HERE / name
        if "--check" not in sys.argv[1:]:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(octets)
        elif not path.exists() or path.read_bytes() != octets:
            stale.append(name)
    if stale:
        print(f"differ from what generate.py writes: {', '.join(stale)}")
    return bool(stale)


if __name__ == "__main__":
    raise SystemExit(main())
