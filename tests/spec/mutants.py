"""Deliberate bugs: a function of the library with a piece of its text replaced, as an implementer might get it wrong."""

# ruff: noqa: E501 (one bug, one line)

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Mutant:
    """A bug, and the vectors that must notice it.

    Args:
        name: what the implementer got wrong.
        vectors: family, or family and operation: the tests of them run.
        where: `module:function`, `module:Class.method` or `module:CONSTANT`.
        old, new: what is replaced in the text of the function; several pieces as tuples. For a constant, `new` is an
            expression of its value.
    """

    name: str
    vectors: str
    where: str
    old: str | tuple[str, ...]
    new: str | tuple[str, ...]

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        """Put the bug in place, wherever the function was imported to."""
        module_name, _, path = self.where.partition(":")
        module = importlib.import_module(module_name)
        owner_name, _, name = path.rpartition(".")
        owner = getattr(module, owner_name) if owner_name else module
        right = inspect.getattr_static(owner, name)
        changed = (
            self._rewritten(right, vars(module), name) if self.old else eval(str(self.new), vars(module))
        )
        if owner is not module:
            for each, value in list(vars(owner).items()):
                if value is right:
                    patch.setattr(owner, each, changed)
            return
        for other in list(sys.modules.values()):
            if getattr(other, "__name__", "").split(".")[0] in ("splitproto", "splitpeer", "tests"):
                for each, value in list(vars(other).items()):
                    # Small numbers and texts are shared objects: only their own name counts.
                    if value is right and (callable(value) or each == name):
                        patch.setattr(other, each, changed)

    def _rewritten(self, right: Any, names: dict[str, Any], name: str) -> Any:
        function = getattr(right, "__func__", right)
        text = textwrap.dedent(inspect.getsource(function))
        pieces = [self.old] if isinstance(self.old, str) else self.old
        changes = [self.new] if isinstance(self.new, str) else self.new
        for old, new in zip(pieces, changes, strict=True):
            # Line breaks are the formatter's affair.
            pattern = r"\s+".join(map(re.escape, old.split()))
            text, count = re.subn(pattern, lambda _, new=new: new, text)  # type: ignore[misc]
            assert count == 1, f"{self.where} holds {old!r} {count} times"
        found: dict[str, Any] = {}
        code = compile(f"from __future__ import annotations\n{text}", f"<mutant {self.name}>", "exec")
        exec(code, names, found)
        return found[name]


def of(
    vectors: str, where: str, *bugs: tuple[str, str | tuple[str, ...], str | tuple[str, ...]]
) -> list[Mutant]:
    """Several bugs of one function: (name, old, new)."""
    return [Mutant(name, vectors, where, old, new) for name, old, new in bugs]


def constant(vectors: str, where: str, *bugs: tuple[str, str]) -> list[Mutant]:
    """Several wrong values of one constant: (name, expression)."""
    return [Mutant(name, vectors, where, "", new) for name, new in bugs]


CODEC = [
    *of(
        "codec",
        "splitproto.codec:decode",
        ("wider forms are taken", "if encode(value) != bytes(data):", "if False:"),
        ("octets behind the value are taken", "except CodecError: raise",
         "except msgpack.ExtraData as extra:\n        value, data = extra.unpacked, data[: -len(extra.extra)]\n"
         "    except CodecError:\n        raise"),
        ("only the head is compared", "if encode(value) != bytes(data):", "if encode(value)[:1] != bytes(data)[:1]:"),
        ("only lengths are compared", "encode(value) != bytes(data)", "len(encode(value)) > len(bytes(data))"),
        ("invalid UTF-8 is replaced", ("raw=False,", "if encode(value) != bytes(data):"),
         ("raw=False, unicode_errors='replace',", "if '\ufffd' not in str(value) and encode(value) != bytes(data):")),
        ("surrogates are taken", ("raw=False,", "if encode(value) != bytes(data):"),
         ("raw=False, unicode_errors='surrogatepass',",
          "if not any(0xD800 <= ord(c) < 0xE000 for c in str(value)) and encode(value) != bytes(data):")),
        ("text loses its byte order mark", "if encode(value) !=",
         "value = value.lstrip('\\ufeff') if isinstance(value, str) else value\n    if False and encode(value) !="),
        ("text is normalised", "if encode(value) !=",
         "import unicodedata\n    value = unicodedata.normalize('NFC', value) if type(value) is str else value\n"
         "    if False and encode(value) !="),
        ("maps have one entry fewer", "max_map_len=most", "max_map_len=most - 1"),
        ("keys of any type", ("strict_map_key=True", "object_pairs_hook=_pairs,", "if encode(value) != bytes(data):"),
         ("strict_map_key=False", "object_pairs_hook=dict,",
          "if isinstance(value, dict) and not all(isinstance(key, str) for key in value):\n        return value\n"
          "    if encode(value) != bytes(data):")),
        ("the last of two equal keys counts", ("object_pairs_hook=_pairs,", "if encode(value) != bytes(data):"),
         ("", "if bytes(data)[:1] == b'\\x82' and len(value) == 1:\n        return value\n"
          "    if encode(value) != bytes(data):")),
        ("maps without a limit", ("max_map_len=most,", "if encode(value) != bytes(data):"),
         ("", "if type(value) is dict and len(value) > MAX_ITEMS:\n        return value\n"
          "    if encode(value) != bytes(data):")),
        ("ext types are read as nil", ("ext_hook=_no_ext", "max_ext_len=0", "if encode(value) != bytes(data):"),
         ("ext_hook=lambda code, data: None", "max_ext_len=100",
          "if value is None:\n        return value\n    if encode(value) != bytes(data):")),
    ),
    *of(
        "codec",
        "splitproto.codec:_check",
        ("nesting of nine", "depth > MAX_DEPTH", "depth > MAX_DEPTH + 1"),
        ("nesting of seven", "depth > MAX_DEPTH", "depth > MAX_DEPTH - 1"),
        ("nesting is counted in arrays only", "for key, item in value.items():", "for key, item in value.items():\n            depth -= 1"),
        ("limit of 65,535 entries", "len(value) > MAX_ITEMS", "len(value) >= MAX_ITEMS"),
        ("keys counted in UTF-16", "len(key) > MAX_TEXT", "len(key.encode('utf-16-le')) // 2 > MAX_TEXT"),
        ("keys counted in octets", "len(key) > MAX_TEXT", "len(key.encode()) > MAX_TEXT"),
        ("keys without a limit", "len(key) > MAX_TEXT", "False"),
        ("NaN is taken", "not math.isfinite(value)", "math.isinf(value)"),
        ("infinity is taken", "not math.isfinite(value)", "math.isnan(value)"),
        ("integers are JSON's", "-(1 << 63) <= value < 1 << 64", "abs(value) < 1 << 53"),
        ("integers are signed", "value < 1 << 64", "value < 1 << 63"),
    ),
    *of(
        "codec",
        "splitproto.codec:_pairs",
        ("keys are normalised", "if key in result:",
         "import unicodedata\n        key = unicodedata.normalize('NFC', key)\n        if key in result:"),
        ("keys lose their byte order mark", "if key in result:", "key = key.lstrip('\\ufeff')\n        if key in result:"),
    ),
    *of("tensors bin-head", "splitproto.codec:bin_header", ("bin8 up to 256", "length < 1 << 8", "length <= 1 << 8"),
        ("no bin16", "length < 1 << 16", "False"), ("lengths little-endian", '4, "big"', '4, "little"'),
        ("bin32 without a limit", "length < 1 << 32", "True")),
]  # fmt: skip

TEXTS = [
    *constant(
        "messages",
        "splitproto.fields:is_printable",
        ("printable as the library's Unicode says", "str.isprintable"),
        ("printable is ASCII", "str.isascii"),
        ("printable is what is no C0 control", "lambda text: all(c >= ' ' for c in text)"),
        ("DEL and C1 are printable", "lambda text, right=is_printable: right(re.sub('[\\x7f-\\x9f]', '', text))"),
        ("directions are printable",
         "lambda text, right=is_printable: right(text.translate(dict.fromkeys((*range(0x202a, 0x202f), *range(0x2066, 0x206a)))))"),
        ("separators of lines are printable",
         "lambda text, right=is_printable: right(text.replace('\\u2028', '').replace('\\u2029', ''))"),
        ("a byte order mark is printable", "lambda text, right=is_printable: right(text.replace('\\ufeff', ''))"),
        ("noncharacters are printable",
         "lambda text, right=is_printable: right(''.join(c for c in text if ord(c) & 0xFFFE != 0xFFFE))"),
        ("planes above 0 are not printable",
         "lambda text, right=is_printable: right(text) and not any(ord(c) > 0xFFFF for c in text)"),
        ("private use is not printable",
         "lambda text, right=is_printable: right(text) and not any(0xE000 <= ord(c) < 0xF900 for c in text)"),
    ),
    *of(
        "messages",
        "splitproto.fields:Text.read",
        ("length in UTF-16", "len(value) >", "len(value.encode('utf-16-le')) // 2 >"),
        ("length in octets", "len(value) >", "len(value.encode()) >"),
        ("length in grapheme clusters", "len(value) >",
         "sum(not __import__('unicodedata').combining(c) for c in value) >"),
        ("one character too many", "> min(self.limit, MAX_TEXT)", "> min(self.limit, MAX_TEXT) + 1"),
        ("any text where some are listed", "value not in self.one_of", "False"),
    ),
    *of("envelope", "splitproto.envelope:decode_reset",
        ("RESET text is shown as it is", "printable(text)", "text"),
        ("RESET text is Latin-1", '.decode(errors="replace")', '.decode("latin-1")'),
        ("RESET text loses its byte order mark", '.decode(errors="replace")', '.decode("utf-8-sig", errors="replace")'),
        ("RESET text drops what is not UTF-8", 'errors="replace"', 'errors="ignore"'),
        ("RESET text in characters", "len(body) > 2 + body[1] + MAX_RESET_TEXT",
         "len(bytes(body[2 + body[1]:]).decode(errors='replace')) > MAX_RESET_TEXT // 2 - 1"),
        ("RESET text without a limit", "len(body) > 2 + body[1] + MAX_RESET_TEXT", "False"),
        ("RESET versions are not skipped", "body[2 + count :]", "body[2:]"),
        ("RESET of an unknown reason is refused", "in ResetReason._value2member_map_ else reason",
         "in ResetReason._value2member_map_ else ResetReason(1)")),
    Mutant("RESET text is printable as the library's Unicode says", "envelope", "splitproto.envelope:printable", "",
           "lambda text: ''.join(c if c.isprintable() else '?' for c in text)"),
]  # fmt: skip

WIRE = [
    *of("envelope", "splitproto.envelope:decode",
        ("a version is judged after the kind", "if version != CARRIER_VERSION:",
         "if kind not in (1, 2): raise EnvelopeError('kind')\n    if version != CARRIER_VERSION:"),
        ("a RESET of another version is refused", "if kind == Kind.RESET:", "if kind == Kind.RESET and version == 1:"),
        ("a RESET with reserved bits is refused", "if kind == Kind.RESET:", "if kind == Kind.RESET and not reserved:"),
        ("reserved bits are ignored", "or reserved or", "or"),
        ("a link id of zeros is taken", "or link == NO_LINK", ""),
        ("unknown kinds are DATA", "if kind not in (Kind.OPEN, Kind.DATA) or", "kind = Kind.OPEN if kind == 1 else Kind.DATA\n    if"),
        ("a body of any length", "len(body) > MAX_ENVELOPE_BODY", "False"),
        ("the limit is of the whole envelope", "len(body) > MAX_ENVELOPE_BODY", "len(view) > MAX_ENVELOPE_BODY")),
    Mutant("sequence numbers little-endian", "envelope", "splitproto.envelope:_HEADER", "", "struct.Struct('<4sBBH16sQ')"),
    *of("framing", "splitproto.framing:decode_header",
        ("flags are ignored", "flags & ~END", "False"), ("reserved bits are ignored", "if reserved or", "if"),
        ("any length", "length > MAX_FRAME_PAYLOAD", "False"),
        ("the limit counts the header", "length > MAX_FRAME_PAYLOAD", "length > MAX_FRAME_PAYLOAD - 12"),
        ("the limit is 256 KiB", "length > MAX_FRAME_PAYLOAD", "length > 262144"),
        ("control frames on any stream", "if stream or flags", "if flags"),
        ("control frames of any length", "or length != _U64.size", ""),
        ("messages on stream 0", "elif stream == 0:", "elif False:"),
        ("an empty HEAD", "kind == FrameType.HEAD and length == 0", "False")),
    Mutant("frame headers little-endian", "framing", "splitproto.framing:_HEADER", "", "struct.Struct('<BBHII')"),
    *of("streams", "splitproto.connection:Connection._head",
        ("ids of both parities", "header.stream % 2 != parity or", ""),
        ("ids may fall", "header.stream <= self._last_stream_in", "header.stream == self._last_stream_in"),
        ("ids may come again", "header.stream <= self._last_stream_in", "header.stream < self._last_stream_in"),
        ("ids without gaps", "header.stream <= self._last_stream_in",
         "header.stream <= self._last_stream_in or header.stream > self._last_stream_in + 1000"),
        ("END of a HEAD is ignored", "header.end == bool(described)", "False"),
        ("fifteen streams", ">= constants.MAX_STREAMS", ">= constants.MAX_STREAMS - 1"),
        ("seventeen streams", ">= constants.MAX_STREAMS", "> constants.MAX_STREAMS"),
        ("a body of any size", "octets > self.agreement.receive_limit:\n            raise MessageTooLarge", "False:\n            raise MessageTooLarge"),
        ("a size without bin heads", "octets = body_bytes(described)", "octets = sum(d.nbytes for d in described)"),
        ("one octet less than max_message", "octets > self.agreement.receive_limit:\n            raise MessageTooLarge",
         "octets >= self.agreement.receive_limit:\n            raise MessageTooLarge"),
        ("credit without a limit", "self._held + octets > self.agreement.receive_limit", "False"),
        ("credit is judged by the message alone", "self._held += octets", "self._held = octets")),
    *of("streams", "splitproto.connection:Connection._body_octets",
        ("credit is back when a message is whole", "if incoming.left == 0:", "if incoming.left == 0:\n        self._held -= incoming.octets")),
    *of("streams", "splitproto.connection:_Incoming.advance",
        ("bin heads are skipped, not compared", "if expected and bytes(view) != expected:", "if False:")),
    *of("streams", "splitproto.connection:Connection._start_frame",
        ("an empty BODY", "0 < header.length <=", "0 <= header.length <="),
        ("END of a BODY is ignored", "or header.end != (header.length == incoming.left)", "")),
    *of("streams", "splitproto.connection:Connection._small_frame",
        ("PONG does not repeat the number", "self._sign_of_life(FrameType.PONG, number)", "self._sign_of_life(FrameType.PONG, 0)"),
        ("credit that was never taken", "self._credit > self.agreement.send_limit", "False")),
    *of("streams", "splitproto.errors:RemoteError.__init__",
        ("unknown errors may be retried", "known.retry if known else False", "known.retry if known else True"),
        ("no error may be retried", "known.retry if known else False", "False")),
    *of("messages", "splitproto.fields:read_map",
        ("unknown fields are ignored", "if key not in kinds:", "if False:"),
        ("nil is absence", "if name in value:", "if value.get(name) is not None:"),
        ("required fields may be absent", "elif required:", "elif False:")),
    *of("messages", "splitproto.fields:Int.read",
        ("whole floats are integers", "type(value) is not int", "value != int(value or 0)"),
        ("booleans are integers", "type(value) is not int", "not isinstance(value, int)"),
        ("no lowest integer", "self.low <= value", "True"), ("no highest integer", "value <= self.high", "True")),
    *of("messages", "splitproto.probes:check",
        ("a probe of any length", "and d.nbytes <= MAX_PROBE", ""),
        ("a probe one octet longer", "d.nbytes <= MAX_PROBE", "d.nbytes <= MAX_PROBE + 1"),
        ("a probe below the limit", "d.nbytes <= MAX_PROBE", "d.nbytes < MAX_PROBE"),
        ("a probe of any shape", '(d.name, d.dtype, len(d.shape)) == (FILLING, "u8", 1)', '(d.name, d.dtype) == (FILLING, "u8")'),
        ("a probe of any dtype", '(d.name, d.dtype, len(d.shape)) == (FILLING, "u8", 1)', "(d.name, len(d.shape)) == (FILLING, 1)"),
        ("a probe of any name", '(d.name, d.dtype, len(d.shape)) == (FILLING, "u8", 1)', '(d.dtype, len(d.shape)) == ("u8", 1)')),
    *of("messages", "splitproto.fields:Real.read", ("integers are reals", "type(value) is not float", "not isinstance(value, int | float)")),
    *of("messages", "splitproto.fields:Octets.read", ("octets of any length", "or len(value) != self.length", "")),
    *of("messages", "splitproto.fields:ListOf._check", ("lists of any length", "not self.low <= len(value) <= self.high", "False"),
        ("an empty list where one is needed", "self.low <= len(value)", "True")),
    *of("messages", "splitproto.fields:OneOrList.read", ("one value only", "if type(value) is list", "if False"),
        ("a list only", "if type(value) is list", "if True")),
]  # fmt: skip

CODINGS = [
    *of("codings encode", "splitproto.codings:_to_f16",
        ("a scale below the smallest normal number", "np.maximum(exponents.astype(np.int32) - 14, 1)", "np.maximum(exponents.astype(np.int32) - 14, 0)"),
        ("largest value below 2^16", "- 14, 1)", "- 15, 1)"),
        ("one scale for all samples", "_greatest_bits(rows) >> 23", "np.broadcast_to(_greatest_bits(rows).max() >> 23, len(rows))")),
    *of("codings encode", "splitproto.codings:_block_integers",
        ("a scale that is cut off", "+ 0xFFFF", ""),
        ("a scale rounded to nearest", "+ 0xFFFF", "+ 0x8000"),
        ("ties away from zero", "np.rint(quotients, out=quotients)", "np.sign(quotients) * np.floor(np.abs(quotients) + np.float32(0.5))"),
        ("values cut off", "np.rint(quotients, out=quotients)", "np.trunc(quotients)"),
        ("a product with the reciprocal", "every / scales[:, None]", "every * (1 / scales)[:, None]")),
    *of("codings encode", "splitproto.codings:_packed",
        ("the first value in the upper bits", "((pairs & 0x0F) | (pairs >> 4 & 0xF0))", "((pairs << 4 & 0xF0) | (pairs >> 8 & 0x0F))")),
    *of("codings decode", "splitproto.codings:_unpacked", ("-8 as 8", "integers -= 8", "integers -= 8; integers[integers == -8] = 8")),
    *of("codings encode", "splitproto.codings:_greatest_bits", ("values that are not finite", ">= _INFINITE << 16", "> 0xFFFFFFFF")),
    *of("codings decode", "splitproto.codings:check",
        ("infinite scales", ">= _INFINITE", "> _INFINITE"),
        ("negative scales", "(_scale_bits(coded, coding, values) >= _INFINITE)", "((_scale_bits(coded, coding, values) & 0x7FFF) >= _INFINITE)"),
        ("any length", "or coded.shape[1] != row_octets(coding, values)", "")),
    *of("codings levels", "splitpeer.training.forms:_form",
        ("the coarsest first", "zip(cut_of(job).names,", "zip(cut_of(job).names[::-1],"),
        ("of the whole cut", "zip(cut_of(job).names,", 'zip([f"x{n}" for n in range(len(coding))],')),
    *of("learning kinds", "splitpeer.federation.terms:_check_codings",
        ("a list of any length", "if len(coding) != len(job.levels):", "if False:"),
        ("a list of any precision", "if not {*coding} <= {job.precision, *CODINGS}:", "if False:")),
    *of("learning kinds", "splitpeer.federation.terms:coding_features",
        ("lists from the start", '("coding.levels",) if', "() if"),
        ("codings of a list from the start", "for name in words(way)", "for name in words(way if isinstance(way, str) else None)")),
    Mutant("blocks of 32", "codings encode", "splitproto.codings:BLOCK", "", "32"),
]  # fmt: skip

TENSORS = [
    *of("tensors descriptors", "splitproto.tensors:Descriptor.from_wire",
        ("a dimension of 0", "0 < size < 1 << 32", "0 <= size < 1 << 32"),
        ("a dimension that is a boolean", "type(size) is not int", "not isinstance(size, int)"),
        ("seven dimensions", "len(shape) <= MAX_DIMENSIONS", "len(shape) <= MAX_DIMENSIONS + 1"),
        ("scalars", "0 < len(shape)", "0 <= len(shape)"),
        ("a product that wraps", "described.nbytes > MAX_TENSOR_BYTES", "described.nbytes % (1 << 64) > MAX_TENSOR_BYTES"),
        ("2^32 octets", "described.nbytes > MAX_TENSOR_BYTES", "described.nbytes > MAX_TENSOR_BYTES + 1"),
        ("names of 129", "len(name) <= MAX_NAME", "len(name) <= MAX_NAME + 1"),
        ("names with spaces", "not NAME_CHARACTERS.issuperset(name)", "not NAME_CHARACTERS.issuperset(name.replace(' ', ''))")),
    *of("tensors descriptors", "splitproto.tensors:read_descriptors",
        ("two tensors of one name", "len({d.name for d in described}) != len(described)", "False"),
        ("257 tensors", "len(values) > MAX_TENSORS", "len(values) > MAX_TENSORS + 1")),
    *of("tensors body", "splitproto.tensors:wire_view",
        ("values in Fortran order", "np.ascontiguousarray(array)", "np.ascontiguousarray(array.T)"),
        ("values big-endian", "np.ascontiguousarray(array)", "np.ascontiguousarray(array.astype(array.dtype.newbyteorder('>')))")),
    Mutant("tensors sorted by name", "tensors body", "splitproto.messages:encode", "tensors: Mapping[str, Array] = message.tensors", "tensors = dict(sorted(message.tensors.items()))"),
    *of("tensors agreed", "splitproto.tensors:matches",
        ("tensors in any order", "[d.name for d in wanted] == list(tensors)", "{d.name for d in wanted} == set(tensors)"),
        ("tensors missing", "[d.name for d in wanted] == list(tensors) and", ""),
        ("shapes of equal size", "tensors[d.name].shape == d.shape", "tensors[d.name].size == np.prod(d.shape)"),
        ("any dtype of equal size", "tensors[d.name].dtype == DTYPES[d.dtype]", "tensors[d.name].itemsize == DTYPES[d.dtype].itemsize")),
    *[Mutant(f"bfloat16 {name}", "tensors bf16", "splitpeer.training.forms:_sent", "torch.tensor(array).to(torch.bfloat16).view(torch.uint16).numpy()", new)
      for name, new in (
          ("cut off", "(array.view('<u4') >> 16).astype('<u2')"),
          ("rounded half up", "((array.view('<u4').astype('u8') + 0x8000) >> 16).astype('<u2')"),
          ("rounded without regard to NaN",
           "((array.view('<u4').astype('u8') + 0x7FFF + (array.view('<u4') >> 16 & 1)) >> 16).astype('<u2')"),
          ("with small numbers flushed to zero",
           "torch.tensor(np.where(np.abs(array) < 1.2e-38, np.float32(0), array)).to(torch.bfloat16).view(torch.uint16).numpy()"),
          ("clamped to finite numbers",
           "torch.tensor(np.clip(array, -3.3e38, 3.3e38)).to(torch.bfloat16).view(torch.uint16).numpy()"))],
]  # fmt: skip

AGREEMENT = [
    *of("negotiation", "splitproto.negotiation:negotiate",
        ("the lowest version", "version=max(common)", "version=min(common)"),
        ("the dialler's first version", "version=max(common)", "version=next(v for v in hello.versions if v in common)"),
        ("what the dialler requires is not looked at", '_require(hello.requires, own.features, "the coordinator")', "pass"),
        ("what the listener requires is not looked at", '_require(own.requires, hello.features, "the client")', "pass"),
        ("requirements must be the same", '_require(hello.requires, own.features, "the coordinator")',
         '_require(hello.features, own.features, "the coordinator")'),
        ("all features of the dialler", "frozenset(own.features) & frozenset(hello.features)", "frozenset(hello.features)"),
        ("limits the wrong way round", "receive_limit=own.max_message, send_limit=hello.max_message",
         "receive_limit=hello.max_message, send_limit=own.max_message"),
        ("the smaller limit both ways", "send_limit=hello.max_message", "send_limit=min(own.max_message, hello.max_message)")),
    *of("negotiation", "splitproto.negotiation:confirm",
        ("any version in welcome", "welcome.version not in own.versions", "False"),
        ("any feature in welcome", "not set(welcome.features) <= set(own.features)", "False"),
        ("a feature stripped in welcome", '_require(own.requires, welcome.features, "the coordinator")', "pass")),
    *of("states", "splitproto.states:Conversation.check",
        ("a trigger moves a side that is done", "other is S.DONE", "False"),
        ("error is not allowed after bye", "own is not S.ERROR", "own not in (S.ERROR, S.DONE)"),
        ("error after error", "own is not S.ERROR", "True"),
        ("error moves its sender only", "{side: S.ERROR, side.other: S.ERROR}", "{side: S.ERROR, side.other: other}"),
        ("features are not looked at", "serving and not any(", "False and any("),
        ("one feature is enough for every mode", 'mode in ("", one)', "True"),
        ("all features of a message must be agreed", "not any(one in self.features", "not all(one in self.features"),
        ("any agreed name is a mode", 'mode in ("", one) for one in serving', 'mode in ("", *self.features) for one in serving'),
        ("an answer needs no probe", 'message == "probed" and not self.unanswered', "False"),
        ("what is not listed stays", "TRANSITIONS[side][own].get(message)", "TRANSITIONS[side][own].get(message, own)")),
    *[Mutant(name, "states", "splitproto.states:TRANSITIONS", "",
             f"{{**TRANSITIONS, Side.{side}: {{**TRANSITIONS[Side.{side}], S.{state}: {{**TRANSITIONS[Side.{side}][S.{state}], {more}}}}}}}")
      for name, side, state, more in (
          ("a decline ends the link", "CLIENT", "OFFERED", "'job-decline': S.DONE"),
          ("bye before welcome", "CLIENT", "GREETED", "'bye': S.DONE"),
          ("an inventory while working", "CLIENT", "WORKING", "'inventory': S.WORKING"),
          ("words after bye", "CLIENT", "DONE", "'applied': S.DONE"),
          ("bye twice", "CLIENT", "DONE", "'bye': S.DONE"),
          ("gradients of logits come from the coordinator", "COORDINATOR", "WORKING", "'loss-gradients': S.WORKING"),
          ("a site sends logits", "CLIENT", "WORKING", "'logits': S.WORKING"),
          ("a site probes", "CLIENT", "READY", "'probe': S.READY"),
          ("an answer to a probe after the offer", "CLIENT", "OFFERED", "'probed': S.OFFERED"),
          ("a probe while it works", "COORDINATOR", "WORKING", "'probe': S.WORKING"),
          ("forward before begin", "COORDINATOR", "JOINED", "'forward': S.JOINED"))],
    Mutant("probes need no feature", "states", "splitproto.states:SERVICES", "", "{k: v for k, v in SERVICES.items() if k != 'probe'}"),
    Mutant("labels need no feature", "states", "splitproto.states:SERVICES", "", "{k: v for k, v in SERVICES.items() if k != 'label'}"),
]  # fmt: skip

DERIVED = [
    *of("digests batch", "splitpeer.data.sampling:batch_digest",
        ("the step in 4 octets", 'step.to_bytes(8, "big")', '(step % (1 << 32)).to_bytes(4, "big")'),
        ("seed 0 is none", "if seed is None", "if not seed"),
        ("no octet before the seed", 'b"\\1" + seed', "seed"),
        ("no count of samples", 'digest.update(len(samples).to_bytes(4, "big"))', "pass"),
        ("no length of the key", 'len(sample.key).to_bytes(1, "big") +', ""),
        ("the order does not count", "in samples:", "in sorted(samples, key=repr):"),
        ("no places", "in places or ():", "in ():"),
        ("places in 8 octets", 'place.to_bytes(4, "big")', 'place.to_bytes(8, "big")'),
        ("origins little-endian", 'to_bytes(4, "big", signed=True)', 'to_bytes(4, "little", signed=True)'),
        ("origins z, y, x", "for voxel in sample.origin:", "for voxel in sample.origin[::-1]:")),
    *of("digests binding", "splitproto.connection:binding", ("the listener first", "dialler + listener", "listener + dialler"),
        ("in order of value", "dialler + listener", "min(dialler, listener) + max(dialler, listener)")),
    *of("digests schema", "splitproto.tensors:schema_digest", ("sorted by name", "for d in descriptors", "for d in sorted(descriptors, key=lambda d: d.name)"),
        ("one after the other", "codec.encode([d.to_wire() for d in descriptors])", "b''.join(codec.encode(d.to_wire()) for d in descriptors)")),
    *of("digests pseudonym", "splitpeer.data.pseudonym:pseudonym",
        ("text and id without a 0", "CONTEXT + patient", "CONTEXT[:-1] + patient"),
        ("id not normalised", "patient_id(patient)", "patient"),
        ("case does not count", "patient_id(patient)", "patient_id(patient).lower()"),
        ("compatibility forms", "patient_id(patient)", "__import__('unicodedata').normalize('NFKC', patient_id(patient))"),
        ("id in Latin-1", "patient_id(patient).encode()", "patient_id(patient).encode('latin-1', 'replace')"),
        ("the salt's digits", "hmac.new(salt,", "hmac.new(salt.hex().encode(),"),
        ("SHA-256 instead of HMAC", "hmac.new(salt, CONTEXT + patient_id(patient).encode(), hashlib.sha256)",
         "hashlib.sha256(salt + CONTEXT + patient_id(patient).encode())"),
        ("the last 16 octets", "[:KEY_BYTES]", "[-KEY_BYTES:]")),
    *of("digests salt-check", "splitpeer.data.pseudonym:salt_check", ("without a 0", "CHECK_CONTEXT", "CHECK_CONTEXT[:-1]")),
    *of("digests salt-file", "splitpeer.data.pseudonym:parse_salt",
        ("raw octets are a salt", "if match := _SALT.fullmatch(content):", "if len(content) == 32:\n        return content\n    if match := _SALT.fullmatch(content):"),
        ("a byte order mark is refused", "if match := _SALT.fullmatch(content):", "if (match := _SALT.fullmatch(content)) and content[:1] != b'\\xef':"),
        ("the first line counts", "_SALT.fullmatch(content)", "_SALT.match(content)")),
    *of("digests augmentation", "splitpeer.data.augment:derive",
        ("index little-endian", 'index.to_bytes(4, "big")', 'index.to_bytes(4, "little")'),
        ("flips from the highest bits", "bool(base[0] & 1), bool(base[0] & 2), bool(base[0] & 4)",
         "bool(base[0] & 128), bool(base[0] & 64), bool(base[0] & 32)"),
        ("flips z, y, x", "bool(base[0] & 1), bool(base[0] & 2), bool(base[0] & 4)",
         "bool(base[0] & 4), bool(base[0] & 2), bool(base[0] & 1)"),
        ("turns from the same octet", "base[1] & 3", "base[0] >> 3 & 3"),
        ("grey without the modality", "material + modality.encode()", "material"),
        ("grey from the first octets", "grey[2:4]", "grey[0:2]"),
        ("divided by 65536", "0.2 * int.from_bytes(grey[2:4], \"big\") / 65535", "0.2 * int.from_bytes(grey[2:4], \"big\") / 65536")),
    *of("digests augmentation", "splitpeer.data.augment:posed",
        ("turns the other way", "np.rot90(out, plan.turns,", "np.rot90(out, -plan.turns,"),
        ("turns before flips", "out = np.flip(array, axes) if array.shape[1] == array.shape[2]: out = np.rot90(out, plan.turns, axes=(1, 2))",
         "out = array\n    if array.shape[1] == array.shape[2]:\n        out = np.rot90(out, plan.turns, axes=(1, 2))\n    out = np.flip(out, axes)"),
        ("turns of what is not square", "if array.shape[1] == array.shape[2]:", "if True:"),
        ("no turns of volumes", "if array.shape[1] == array.shape[2]:", "if array.ndim == 3:"),
        ("no flip along z", "for axis in range(1, array.ndim)", "for axis in range(1, 3)")),
    *of("digests augmentation", "splitpeer.data.augment:augment",
        ("scaled in float64", "out * np.float32(plan.scale) + np.float32(plan.shift)", "(out.astype('f8') * plan.scale + plan.shift)"),
        ("zero is shifted too", "np.where(out != 0, changed, out)", "changed"),
        ("only what is above zero is scaled", "out != 0", "out > 0")),
]  # fmt: skip

LEARNING = [
    *of("learning schedule", "splitpeer.training.optimiser:rate",
        ("cosine ends at 0", "math.cos(math.pi * step / total_steps)", "math.cos(math.pi * step / max(total_steps - 1, 1))"),
        ("the first step is 1", "step = min(step, total_steps - 1)", "step = min(step + 1, total_steps - 1)"),
        ("one cycle begins at 1/10", "1 / START_DIVISOR, 1.0", "0.1, 1.0"),
        ("one cycle ends at 1/10000", "1 / (START_DIVISOR * END_DIVISOR)", "1 / END_DIVISOR")),
    *of("learning schedule", "splitpeer.training.optimiser:_one_cycle",
        ("warm-up of 0.3 N", "WARM_UP * total_steps - 1", "WARM_UP * total_steps"),
        ("warm-up in whole steps", "WARM_UP * total_steps - 1", "int(WARM_UP * total_steps - 1)"),
        ("no warm-up at all", "if turn > 0 and step <= turn:", "if False:"),
        ("the fall takes all steps", "(step - max(turn, 0)) / max(last - max(turn, 0), 1)", "step / max(last, 1)")),
    *of("learning sides", "splitpeer.site.sides:Sides.train",
        ("the loss of whom it scored", "not self._scored.isdisjoint(persons)", "False"),
        ("all of a batch are scored ones", "not self._scored.isdisjoint(persons)", "self._scored.issuperset(persons)"),
        ("nobody is trained on", "self._note(self._trained, persons)", "pass")),
    *of("learning sides", "splitpeer.site.sides:Sides.score",
        ("whom it trained on is scored", "if person in self._trained:", "if False:"),
        ("the last one is scored", "self._note(self._scored, (person,))", "self._scored = {person}")),
    *of("learning loss", "splitpeer.training.loss:region_loss", ("the cross-entropy counts once", "BCE_WEIGHT * cross_entropy", "cross_entropy")),
    *of("learning loss", "splitpeer.training.loss:class_loss", ("the background has a Dice", "[:, 1:], target)", ", cat((background, target), 1))"), ("regions add up", "(1 - dice).mean()", "(1 - dice).sum()")),
    *of("learning schedule", "splitpeer.training.optimiser:_cosine", ("along a line", "(1 + math.cos(math.pi * share))", "2 * (1 - share)")),
    *of("learning schedule", "splitpeer.training.optimiser:Schedule.seek",
        ("momentum does not move", 'if self._kind == "one-cycle":', "if False:"),
        ("momentum moves with the rate", "MOMENTUM_HIGH, MOMENTUM_LOW, MOMENTUM_HIGH", "MOMENTUM_LOW, MOMENTUM_HIGH, MOMENTUM_LOW"),
        ("SGD's momentum does not move", 'group["momentum"] = momentum', "pass"),
        ("the second momentum moves", 'group["betas"] = (momentum, group["betas"][1])', 'group["betas"] = (group["betas"][0], momentum)')),
    *of("learning optimiser", "splitpeer.training.optimiser:make_optimiser",
        ("adam decays as adamw", "Adam(params, lr=lr, weight_decay=weight_decay)", "AdamW(params, lr=lr, weight_decay=weight_decay)"),
        ("adamw decays as adam", "AdamW(params, lr=lr, weight_decay=weight_decay)", "Adam(params, lr=lr, weight_decay=weight_decay)"),
        ("torch's default decay", "AdamW(params, lr=lr, weight_decay=weight_decay)", "AdamW(params, lr=lr)"),
        ("adam without decay", "Adam(params, lr=lr, weight_decay=weight_decay)", "Adam(params, lr=lr)"),
        ("epsilon 1e-7", "Adam(params, lr=lr,", "Adam(params, lr=lr, eps=1e-7,"),
        ("beta 0.99", "Adam(params, lr=lr,", "Adam(params, lr=lr, betas=(.9, .99),"),
        ("AMSGrad", "Adam(params, lr=lr,", "Adam(params, lr=lr, amsgrad=True,"),
        ("momentum without Nesterov", "nesterov=True", "nesterov=False"),
        ("damped momentum", "momentum=0.9, nesterov=True", "momentum=0.9, dampening=0.1"),
        ("no momentum", "momentum=0.9, nesterov=True", "momentum=0.0")),
    *of("learning average", "splitpeer.training.averaging:average",
        ("every site counts alike", "patients[0]", "1"), ("not by patients", "* count", "* 1"),
        ("computed in float32", "weights[0][name].astype(np.float64)", "weights[0][name].astype(np.float32)"),
        ("divided by the sites", "summed / total", "summed / len(patients)"),
        ("rounded at each site", "* patients[0]", "* patients[0] / total")),
    *of("learning weights", "splitpeer.training.averaging:flaw",
        ("NaN is averaged", "not all(np.isfinite(array).all() for array in weights.values())", "False"),
        ("any finite weight", "(np.abs(array) > MOST_WEIGHT)", "np.isinf(array)"),
        ("large below zero", "np.abs(array) > MOST_WEIGHT", "array > MOST_WEIGHT"),
        ("1024 is too large", "> MOST_WEIGHT", ">= MOST_WEIGHT")),
    *of("learning terms", "splitpeer.models.cut:Cut.shape",
        ("levels from the coarsest", "self.levels[level]", "self.levels[-1 - level]"),
        ("sizes rounded", "size // step", "max(size // step, 4)"),
        ("sizes z, y, x", "zip(window,", "zip(tuple(reversed(window)),")),
    *of("learning terms", "splitpeer.models.cut:Cut.__post_init__",
        ("levels in any order", "list(sent) != sorted(sent)", "False"),
        ("no bottleneck", "self.bottleneck not in sent", "False")),
    *of("learning terms", "splitpeer.models.registry:backbone_of",
        ("any cut", "meant.cut.levels != cut.levels", "False")),
    *of("learning terms", "splitpeer.federation.terms:_check_figures",
        ("a rate of 0", "0 < job.learning_rate", "0 <= job.learning_rate"),
        ("a rate of 100 is refused", "job.learning_rate <= 100", "job.learning_rate < 100"),
        ("any decay", "0 <= job.weight_decay <= 100", "True"), ("any name", 'check_name("job", job.name)', "pass"),
        ("spacing of two", "in (0, 3)", "in (0, 2, 3)"), ("any spacing", "0.01 <= mm <= 100", "True"),
        ("steps without end", "job.steps <= MAX_STEPS", "True"), ("any patience", "1 <= job.seconds_per_step <= 86_400", "True")),
    *of("learning kinds", "splitpeer.federation.terms:_check_encoders",
        ("joint jobs where encoders are frozen", "if policy.encoders == 'frozen' and not job.frozen:".replace("'", '"'), "if False:"),
        ("once in every epoch", "if policy.releases == 'once' and not job.frozen:".replace("'", '"'), "if False:"),
        ("any features", "if strange := sorted(", "if False and sorted("), ("frozen and averaged", "job.frozen and job.average_every is not None", "False")),
    *of("learning kinds", "splitpeer.federation.terms:_check_fusion",
        ("values without a sum", "if policy.fusion == 'secure-sum':".replace("'", '"'), "if False:"),
        ("one partner", "if others < policy.min_partners:", "if False:"), ("strangers", "if others > len(policy.partners):", "if False:"),
        ("gradients of any precision", "job.precision != 'f32' or".replace("'", '"'), ""),
        ("averaged", "or job.average_every is not None", ""), ("any terms", "check_sum(terms)", "pass")),
    *of("learning kinds", "splitpeer.federation.terms:_check_normalisation", ("a rule that makes an image a constant", "not in OF_A_SUM", "in ()")),
    *of("learning kinds", "splitpeer.federation.terms:_sum_descriptors", ("words of the job's precision", "dtype, shapes = dtype_of(terms),", "dtype, shapes = job.precision,"),
        ("no check words", "return (*levels, Descriptor(CHECK, dtype, (len(levels), CHECK_WORDS)))", "return (*levels,)")),
    Mutant("every registered precision", "learning terms", "splitpeer.federation.terms:PRECISIONS", "", "('f32', 'bf16', 'f16', 'f64', 'i8')"),
    Mutant("every optimiser", "learning terms", "splitpeer.federation.terms:OPTIMISERS", "", "('adam', 'adamw', 'sgd', 'lion')"),
    Mutant("every schedule", "learning terms", "splitpeer.federation.terms:SCHEDULES", "", "('one-cycle', 'cosine', 'constant', 'linear')"),
]  # fmt: skip

CERTIFICATES = [
    *of("certificates chain", "splitproto.identity:Credentials._context",
        ("chains that are not strict", "context.verify_flags |= ssl.VERIFY_X509_STRICT", "context.verify_flags &= ~ssl.VERIFY_X509_STRICT"),
        ("nobody's chain is looked at", "context.verify_mode = ssl.CERT_REQUIRED", "context.check_hostname = False; context.verify_mode = ssl.CERT_NONE"),
        ("no revocation", "context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF", "pass"),
        ("the list is not loaded", "context.load_verify_locations(self.crl)", "pass")),
    *of("certificates chain", "splitproto.identity:Credentials.client_context", ("any host", "context.check_hostname = True", "context.check_hostname = False"),
        ("common names count", "context.hostname_checks_common_name = False", "context.hostname_checks_common_name = True")),
    *of("certificates identity", "splitproto.identity:Identity.from_certificate", ("the first URI of several", "if len(uris) != 1:", "if not uris:"),
        ("one URI twice", "if len(uris) != 1:", "if len(set(uris)) != 1:")),
    *of("certificates identity", "splitproto.identity:split_uri",
        ("URIs in any case", "parts = uri", "uri = uri.lower()\n    parts = uri"),
        ("a slash at the end", "parts = uri", "uri = uri.rstrip('/')\n    parts = uri"),
        ("space around the URI", "parts = uri", "uri = uri.strip()\n    parts = uri"),
        ("percent-encoding", "parts = uri", "from urllib.parse import unquote\n    uri = unquote(uri)\n    parts = uri"),
        ("port and user are dropped", "parts = uri", "import re\n    uri = re.sub(r'//(u@)?(\\w+)(:\\d+)?/', r'//\\2/', uri)\n    parts = uri"),
        ("query and fragment are dropped", "parts = uri", "uri = uri.split('?')[0].split('#')[0]\n    parts = uri"),
        ("further segments", "len(parts) == 4", "len(parts) >= 4"),
        ("any scheme", 'uri.startswith("spiffe://")', "parts.pop(0) and parts.pop(0) is not None" ),
        ("any first segment", "parts[1] == _PATH", "True")),
    Mutant("names of any length", "certificates identity", "splitproto.identity:_NAME", "", "re.compile(r'[a-z0-9][a-z0-9._-]*')"),
    Mutant("names that begin with a dot", "certificates identity", "splitproto.identity:_NAME", "", "re.compile(r'[a-z0-9._-]{1,63}')"),
    *of("certificates permission", "splitproto.identity:AllowList.check",
        ("any federation of the CA", "identity.federation != federation", "False"),
        ("anybody of the CA", "identity.site not in self.sites.get(identity.role, ())", "False"),
        ("any role", "self.sites.get(identity.role, ())", "[site for sites in self.sites.values() for site in sites]")),
]  # fmt: skip

IMAGES = [
    *of("data window", "splitpeer.data.nifti_header:_affine",
        ("qform before sform", "if sform:", "if sform and not qform:"),
        ("unknown orientation is RAS", "np.diag([-pixdim[1], pixdim[2], pixdim[3], 1.0])", "np.diag([pixdim[1], pixdim[2], pixdim[3], 1.0])"),
        ("unknown orientation is centred on a voxel", "(np.array(shape) - 1) / 2", "np.array(shape) // 2"),
        ("unknown orientation is not centred", "affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)", "pass")),
    *of("data window", "splitpeer.data.nifti_header:_qform",
        ("pixdim[0] is ignored", "(1, 1, -1 if pixdim[0] < 0 else 1)", "(1, 1, 1)"),
        ("pixdim[0] of 0 reverses", "pixdim[0] < 0", "pixdim[0] <= 0"),
        ("all axes reversed", "(1, 1, -1 if pixdim[0] < 0 else 1)", "(-1 if pixdim[0] < 0 else 1)"),
        ("the rotation the other way", "affine[:3, :3] *=", "affine[:3, :3] = affine[:3, :3].T\n    affine[:3, :3] *="),
        ("pixdim along rows", "affine[:3, :3] *= pixdim[1:4] * (1, 1, -1 if pixdim[0] < 0 else 1)",
         "affine[:3, :3] *= (pixdim[1:4] * (1, 1, -1 if pixdim[0] < 0 else 1))[:, None]"),
        ("no offset", "affine[:3, 3] = [float(raw[f\"qoffset_{name}\"]) for name in \"xyz\"]", "pass")),
    *of("data window", "splitpeer.data.nifti_header:_scaling",
        ("no scaling", "return slope, intercept", "return 1.0, 0.0"), ("no intercept", "return slope, intercept", "return slope, 0.0"),
        ("slope 0 with an intercept", "return 1.0, 0.0", "return 1.0, intercept"), ("a slope of NaN is taken", "not math.isfinite(slope)", "False")),
    *of("data window", "splitpeer.data.nifti:_values",
        ("scaled in float32", "piece.astype(np.float64) * header.slope + header.intercept",
         "piece.astype(np.float32) * np.float32(header.slope) + np.float32(header.intercept)"),
        ("voxels in C order", 'order="F"', 'order="C"'),
        ("integers by sign", "header.dtype)\n", "np.dtype(str(header.dtype).replace('u', '')))\n")),
    *of("data window", "splitpeer.data.geometry:Turn.of",
        ("axes are never exchanged", "max(orders, key=lambda o: sum(abs(cosines[a, o[a]]) for a in range(3)))", "(0, 1, 2)"),
        ("axes are never reversed", "tuple(a for a in range(3) if cosines[a, order[a]] < 0)", "()"),
        ("to LPS", "cosines[a, order[a]] < 0", "(cosines[a, order[a]] < 0) == (a == 2)"),
        ("the other permutation", "cls(order,", "cls(tuple(order.index(a) for a in range(3)),")),
    *of("data window", "splitpeer.data.geometry:Turn.grid",
        ("the origin stays", "ras[:3, 3] += step * (shape[source] - 1)", "pass"),
        ("the origin moves by the size", "(shape[source] - 1)", "shape[source]"),
        ("the direction stays", "step = -step", "pass")),
    *of("data window", "splitpeer.data.geometry:Geometry.of", ("directions as rows", "cosines.T.ravel()", "cosines.ravel()"),
        ("spacing from the diagonal", "spacing = edges(affine)", "spacing = np.abs(np.diag(affine)[:3])")),
    *of("data window", "splitpeer.data.resampling:resampled_grid",
        ("sizes by the whole extent", "int(np.rint(_fine((n - 1) * old / new))) + 1", "int(np.rint(n * old / new))"),
        ("sizes rounded down", "np.rint(_fine((n - 1) * old / new))", "np.floor(_fine((n - 1) * old / new))"),
        ("sizes rounded half up", "np.rint(_fine((n - 1) * old / new))", "np.floor(_fine((n - 1) * old / new) + 0.5)")),
    *of("data window", "splitpeer.data.resampling:resample",
        ("ties to the upper voxel", "np.ceil(places - 0.5)", "np.floor(places + 0.5)"), ("ties to even", "np.ceil(places - 0.5)", "np.rint(places)"),
        ("masks are interpolated", "if nearest:", "if False:"), ("images take the nearest", "if nearest:", "if True:"),
        ("by the centres of cells", "np.arange(length) * (new / old)", "(np.arange(length) + 0.5) * (new / old) - 0.5"),
        ("to the ends of the volume", "np.arange(length) * (new / old)", "np.arange(length) * (last / max(length - 1, 1))")),
    *of("data window", "splitpeer.data.volumes:grid_of",
        ("resampled whatever the difference", "<= SPACING_TOLERANCE", "< 0"), ("never resampled", "<= SPACING_TOLERANCE", "< np.inf"),
        ("a tolerance in all axes together", "np.abs(np.subtract(grid.spacing, spacing)).max()", "np.abs(np.subtract(grid.spacing, spacing)).min()")),
    *of("data window", "splitpeer.data.normalisation:Normaliser.apply",
        ("over all voxels", "filled = voxels != 0", "filled = voxels == voxels"), ("over what is above zero", "filled = voxels != 0", "filled = voxels > 0")),
    *of("data window", "splitpeer.data.normalisation:_standardised",
        ("the sample's deviation", "np.square(values).mean()", "np.square(values).sum() / max(values.size - 1, 1)"),
        ("no deviation", "math.sqrt(np.square(values).mean()) or 1.0", "1.0"), ("no mean", "values -= values.mean()", "pass"),
        ("the median", "values.mean()", "np.median(values)"),
        ("the range", "values -= values.mean() values /= math.sqrt(np.square(values).mean()) or 1.0",
         "values -= values.min()\n    values /= values.max() or 1.0")),
    *of("data window", "splitpeer.data.volumes:prepare",
        ("normalised before it is resampled", "if wanted != stored:", "if labels is None:\n        voxels = normalisation.apply(voxels)\n    if wanted != stored:"),
        ("the border moves", "voxels = resample(voxels, stored, wanted, nearest=labels is not None)",
         "voxels = np.roll(resample(voxels, stored, wanted, nearest=labels is not None), 1, 0)")),
    *of("data window", "splitpeer.data.volumes:Volumes.window",
        ("the window is moved inside", "for start, length, extent in zip(origin, size, volume.shape[1:], strict=True):",
         "for start, length, extent in zip(origin, size, volume.shape[1:], strict=True):\n        start = max(0, min(start, extent - length))"),
        ("the origin is the centre", "low, high = max(start, 0)", "start -= length // 2\n        low, high = max(start, 0)"),
        ("what is outside is the border's", "out[tuple(inside)] = volume[tuple(taken)]",
         "out[...] = volume[:, :1, :1, :1]\n    out[tuple(inside)] = volume[tuple(taken)]")),
    *of("data unusable", "splitpeer.data.nifti_header:_checked", ("sheared volumes", "(shifted := shear(shape, affine)) > GRID_TOLERANCE * min(spacing)", "(shifted := 0.0) > 1"),
        ("flat volumes", "if flat:", "if False:"), ("any size of voxel", "min(spacing) < LEAST_EDGE or max(spacing) > GREATEST_EDGE", "False")),
    *of("data unusable", "splitpeer.data.nifti:read_voxels", ("values that are not finite", "not np.isfinite(stored).all()", "False"),
        ("only NaN is refused", "not np.isfinite(stored).all()", "np.isnan(stored).any()")),
    *of("data unusable", "splitpeer.data.normalisation:Normaliser.apply", ("volumes of zeros", "if not filled.any():", "if False:")),
    *of("data grids", "splitpeer.data.geometry:differences", ("any place", "not distance <= allowed", "False"),
        ("any shape", "not all(_same_length(one, other, axis) for axis in range(3))", "False"),
        ("origins alone", "distance = apart((x, y, z), one.affine, other.affine)", "distance = float(np.linalg.norm(np.subtract(one.origin, other.origin)))"),
        ("a hundredth of a millimetre", "allowed = GRID_TOLERANCE * min(*one.spacing, *other.spacing)", "allowed = 0.01"),
        ("fractions of the greatest spacing", "min(*one.spacing", "max(*one.spacing")),
    *of("data grids", "splitpeer.data.geometry:_same_length", ("shapes that were resampled must be equal", "(one.stored, other.stored) == (one.spacing, other.spacing)", "True"),
        ("shapes that were resampled may be any", "<= slack + SPACING_TOLERANCE", "< np.inf")),
]  # fmt: skip

FUSION = [
    *of("fusion", "splitproto.fusion:check_terms", ("words of 24 bits", "not in (16, 32)", "not in (16, 24, 32)"),
        ("any range", "if not LOWEST_RANGE <= terms.range <= HIGHEST_RANGE:", "if False:")),
    *of("fusion", "splitproto.fusion:greatest", ("the sum may wrap", "// terms.parties", "")),
    *of("fusion", "splitproto.fusion:quantise",
        ("ties away from zero", "np.rint(np.clip(exact, -terms.range, terms.range) * scale)",
         "np.trunc(np.clip(exact, -terms.range, terms.range) * scale + np.copysign(0.5, exact))"),
        ("cut in place of rounded", "np.rint(", "np.trunc("), ("only NaN is an error", "not np.isfinite(exact).all()", "np.isnan(exact).any()"),
        ("binary32", "np.asarray(values, np.float64)", "np.asarray(values, np.float32) * np.float32(1.0000001)"),
        ("a whole scale", "scale = greatest(terms) / terms.range", "scale = round(greatest(terms) / terms.range)"),
        ("what is at the limit is clipped", "np.abs(exact) > terms.range", "np.abs(exact) >= terms.range")),
    *of("fusion", "splitproto.fusion:restore", ("without a sign", "total.astype(np.float64)", "total.view(_unsigned(total.dtype)).astype(np.float64)")),
    *of("fusion", "splitproto.fusion:Masking.key",
        ("one key for all levels", "question.history, level]", "question.history]"),
        ("one key for all gradients", "question.digest, question.history, level]", "question.digest, level]"),
        ("one key for all modes", "[question.mode, ", "["), ("one key for all runs", "self.run, info", "None, info"),
        ("no label in a key", "_LABEL + ", ""), ("public keys are left out", "*self._pair(partner), *asked", "*self._pair(partner)[:2], *asked")),
    *of("fusion", "splitproto.fusion:Masking._pair", ("names in any order", "sorted((own, other))", "(own, other)")),
    *of("fusion", "splitproto.fusion:Masking.following",
        ("every epoch is the same step", "epoch])", "1])"), ("no label of an epoch", "_EPOCH + ", ""), ("epochs of all runs", "self.run, info", "None, info"),
        ("public keys are left out of an epoch", "*self._pair(partner), epoch", "*self._pair(partner)[:2], epoch"),
        ("always from the first", "replace(self, shared=shared)", "self if epoch > 1 else replace(self, shared=shared)")),
    *of("fusion", "splitproto.fusion:Masking.conceal", ("the first subtracts", "if self.site < partner:", "if self.site > partner:"),
        ("check words come first", "np.concatenate([words.reshape(-1), np.zeros(CHECK_WORDS, words.dtype)])",
         "np.roll(np.concatenate([words.reshape(-1), np.zeros(CHECK_WORDS, words.dtype)]), 1)")),
    *of("fusion", "splitproto.fusion:keystream", ("the counter begins at 1", "bytes(16)", "b'\\1' + bytes(15)")),
    *of("fusion", "splitproto.fusion:totals", ("check words are not looked at", "if add_up([one[CHECK] for one in answers.values()]).any():", "if False:")),
    *of("fusion", "splitproto.partners:statement", ("no label", "_LABEL + ", ""), ("the service's key is not signed", "*keys]", "keys.training]")),
    *of("fusion", "splitproto.partners:verify", ("any role", "or identity.role != 'client'".replace("'", '"'), ""),
        ("any federation", "identity.federation != trust.federation or", ""), ("unsigned", "check_signature(offer, identity, run, terms)", "pass"),
        ("points of small order", "if not all(_agrees(key) for key in Keys.of(offer)):", "if False:"),
        ("the service's key may be zero", "for key in Keys.of(offer))", "for key in (offer.public,))"), ("any site", "if identity.site not in trust.partners:", "if False:")),
    *of("fusion", "splitproto.partners:verify", ("what has ended is as good", "if ended:", "if False:")),
    *of("fusion", "splitproto.partners:_chain", ("any time", ".time(moment)", ".time(leaf.not_valid_before_utc)"),
        ("nothing ever ended", "for moment in (now, *ends):", "for moment in (now,):"), ("what held once holds", "moment < now", "False")),
    *of("fusion", "splitproto.partners:_not_revoked", ("an outdated list revokes nobody", "for one in heard if one", "for one in heard if not _outdated(one, now) and one"),
        ("an outdated list vouches", "and not _outdated(listed, now)", "")),
    *of("fusion", "splitproto.partners:_proven", ("revoked certificates", "_not_revoked(leaf, proven[1] if len(proven) > 1 else leaf, trust, now, identity)", "pass"),
        ("whatever lies in the chain", "for der in chain)", "for der in chain[:1])"),
        ("keys that nobody vouches for", "proven[1] if len(proven) > 1 else leaf", "(*between, proven[1])[0]")),
]  # fmt: skip

INFERENCE = [
    *of("inference admission", "splitpeer.site.inference.answering:Answering.admit",
        ("the coordinator's word is enough", "own = owns(asked.request, asked.key)", "own = asked.asker == 'site-a'"),
        ("listed sites whatever the policy", 'self._terms.whom == "listed" and', ""), ("any asker", "asked.asker in self._terms.sites", "True"),
        ("without a policy", "not self.serves or", ""), ("listed sites only", "own or", "")),
    *of("inference admission", "splitpeer.site.inference.asking:InferenceAsker.owns", ("own by the id", "and asked.key == key", "")),
    *of("inference questions", "splitpeer.site.inference.answering:Answering.check",
        ("any pose", "forward.seed is not None or", ""), ("0 is no seed", "forward.seed is not None", "forward.seed"),
        ("some places", "or forward.places is not None", ""), ("two patients in a batch", "len(keys) > 1 or", ""),
        ("twice in a batch", "len(windows) < len(forward.samples) or", ""), ("twice on a link", "or windows & asked", ""),
        ("what was asked is forgotten", "asked |= windows", "pass")),
    *of("inference questions", "splitpeer.site.inference.answering:Answering.open", ("located once", "self._asked[key] = set()", "self._asked.setdefault(key, set())"),
        ("one patient at a time", "self._asked[key] = set()", "self._asked = {key: set()}")),
    *of("inference questions", "splitpeer.site.inference.answering:Answering.close", ("located for ever", "self._asked.clear()", "pass")),
]  # fmt: skip

MUTANTS = [
    *IMAGES,
    *CODEC,
    *TEXTS,
    *WIRE,
    *CODINGS,
    *TENSORS,
    *AGREEMENT,
    *DERIVED,
    *LEARNING,
    *CERTIFICATES,
    *FUSION,
    *INFERENCE,
    *of(
        "releases",
        "splitpeer.site.tiling:_is_grid",
        ("n - w alone at the border", "if start >= size - width}", "if start == size - width}"),
        ("any number at the border", "len(border) <= 1 and", ""),
        ("what is beyond counts", "if start < size}", "}"),
    ),
]
