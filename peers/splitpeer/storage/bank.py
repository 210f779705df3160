"""The feature bank: what sites with frozen encoders released, kept by the coordinator; its format is in
docs/feature-bank.md.

One folder: `bank.json`, the index, is written whole before the first release and never changes; each release is a file,
`SITE/NUMBER.safetensors` (or `.sealed`, encrypted), written whole. What has no file is missing, so a process that died
leaves nothing to repair. What is removed for good is named in `dropped.json` first; the next to open it finishes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitpeer.errors import ConfigError, DataError, DiskTrouble
from splitpeer.logs import handle
from splitpeer.storage import durable, reading
from splitpeer.storage.rows import Stamp, VerifiedFile, stamp
from splitproto.codings import CODINGS, Form, form_at
from splitproto.secretfile import how_to_close, open_to_others

FORMAT = "splitproto feature bank 2"
FOLDER = "bank"
"""In the coordinator's folder of a run."""
INDEX = "bank.json"
DROPPED = "dropped.json"
ALL_SITES = "(sum)"
"""In place of a site where only the sum over all of them can be read (SP-11.18); no site can have this name."""
KEY_BYTES = 32
MAX_RELEASE = 8 << 30
"""Bytes of one release that is read."""
FILE_OCTETS = 4096
"""Taken for each file in addition to its tensors: its header, and what its last block on disk leaves free."""
_WHAT, _DIGEST = "splitpeer.release", "sha256"
_MAGIC, _NONCE, _INDEX = b"SPBANK1\n", 12, b"index"
_DTYPES = {"f32": "float32", "bf16": "uint16", **dict.fromkeys(CODINGS, "uint8")}

Arrays = Mapping[str, np.ndarray]
_Place = tuple[str, int]
"""A release's site and number."""
Window = tuple[bytes, tuple[int, int, int]]
"""A patient's key, and the origin."""


@dataclass(frozen=True)
class BankEntry:
    """One question to one site, and what its answer must be."""

    site: str
    number: int
    key: bytes
    """The patient."""
    origins: tuple[tuple[int, int, int], ...]
    digest: bytes
    """The question's (SP-11.6)."""
    shapes: Mapping[str, tuple[int, ...]]
    """By name of the tensor, as on the wire."""

    def dtypes(self, precision: Form) -> dict[str, str]:
        """By name of the tensor."""
        return {name: _DTYPES[form_at(precision, name.rpartition("/")[2])] for name in self.shapes}

    def octets(self, precision: Form) -> int:
        """Bytes of its tensors."""
        return sum(
            np.dtype(dtype).itemsize * int(np.prod(self.shapes[name], dtype=np.int64))
            for name, dtype in self.dtypes(precision).items()
        )


@dataclass(frozen=True)
class Contents:
    """What a bank is of; all of it is in the index."""

    run: bytes
    terms: str
    """Digest of what the releases depend on: cut, window, spacing and so on."""
    precision: Form
    """f32; bf16, kept as its 16 bits; or a coding, kept as its octets; by level where it differs."""
    weights: Mapping[str, bytes]
    """By site, the label of its encoders' weights (SP-11.17-6); of a sum, the digest of them all."""
    releases: tuple[BankEntry, ...]
    grid: tuple[tuple[float, ...], ...] = ()
    """In a bank of a single patient, who is of no run: shape, spacing, directions, origin and stored spacing of the
    grid that the windows were cut from."""

    @property
    def octets(self) -> int:
        """Bytes of the whole bank, a little too many."""
        return sum(one.octets(self.precision) + FILE_OCTETS for one in self.releases)

    @property
    def windows(self) -> int:
        """Over all sites."""
        return sum(len(one.origins) for one in self.releases)


class Bank:
    """One run's releases on disk.

    Args:
        folder: of the bank.
        contents: what it holds when it is complete.
        key: 32 bytes that encrypt it; empty: it is not encrypted.
    """

    def __init__(self, folder: Path, contents: Contents, key: bytes = b"") -> None:
        self.folder, self.contents = folder, contents
        self._seal = _BankSeal(key, contents.run) if key else None
        self._releases = {(one.site, one.number): one for one in contents.releases}
        self._dropped: frozenset[_Place] = frozenset()
        self._verified: dict[_Place, VerifiedFile] = {}

    @classmethod
    def create(cls, folder: Path, contents: Contents, key: bytes = b"") -> Bank:
        """An empty one; what lies in the folder is removed.

        Raises:
            DiskTrouble, ConfigError: it cannot be written, or the disk cannot hold what will come.
        """
        bank = cls(folder, contents, key)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            durable.make_folder(folder)
            bank.check_room()
            durable.replace(folder / INDEX, json.dumps(bank._written(), separators=(",", ":")).encode())
        except OSError as error:
            raise durable.refusal(error, f"{folder}: the feature bank", "[peer] state") from None
        return bank

    @classmethod
    def open(cls, folder: Path, key: bytes = b"") -> Bank | None:
        """The bank in this folder; None: there is none.

        Raises:
            DataError: its index is damaged, or the key is not the one it was made with.
        """
        path = folder / INDEX
        try:
            said = reading.document(path, 1 << 30)
            if said["format"] != FORMAT:
                raise DataError(
                    f"{path}: of another version ({str(said['format'])[:60]}); this one reads {FORMAT}"
                )
            if said["digest"] != _index_digest(said):
                raise ValueError
            if bool(said["check"]) != bool(key):
                how = "is encrypted: name its key" if said["check"] else "is not encrypted: remove the key"
                raise DataError(f"{folder}: the feature bank {how} ([bank] key)")
            if key:
                said |= _BankSeal(key, bytes.fromhex(said["run"])).index(said, folder)
            bank = cls(folder, _contents(said), key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            raise DataError(
                f"{path}: damaged, the digest does not match; bring it back, or start a new run with --fresh"
            ) from None
        bank._dropped = bank._read_dropped()
        bank._remove()
        return bank

    @property
    def encrypted(self) -> bool:
        """Whether its releases are."""
        return self._seal is not None

    # --- what is there -----------------------------------------------------------------------------------

    @property
    def dropped(self) -> frozenset[bytes]:
        """Patients of whom something was removed for good: who uses the bank does without them."""
        return frozenset(self._releases[place].key for place in self._dropped)

    def missing(self, without: Collection[bytes] = ()) -> list[BankEntry]:
        """Releases that have no file, but for those dropped, and for patients `without` whom the run is made."""
        out = self.dropped.union(without)
        return [one for one in self.contents.releases if one.key not in out and not self._path(one).is_file()]

    def octets_missing(self, without: Collection[bytes] = ()) -> int:
        """Bytes of what is `missing`, a little too many."""
        return sum(one.octets(self.contents.precision) + FILE_OCTETS for one in self.missing(without))

    def check_room(self, without: Collection[bytes] = ()) -> None:
        """Raises DiskTrouble: the disk cannot hold what is missing."""
        needed = self.octets_missing(without)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise DiskTrouble(
                f"{self.folder}: the feature bank needs {reading.size(needed)} and {reading.size(free)} are free: "
                "make room, or have less released ([evaluation] overlap, [model] levels, [wire] activations)",
                "disk-full",
            )

    # --- releases ----------------------------------------------------------------------------------------

    def put(self, release: BankEntry, tensors: Arrays) -> None:
        """Keep an answer durably. Raises DiskTrouble, ConfigError, ValueError: not the tensors that are due."""
        self._compare(release, tensors)
        what = self._about(release)
        held = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        # One entry: several would be written in any order, and the same answer would be another file.
        shown = json.dumps({**json.loads(what), _DIGEST: _digest(what, held)}, sort_keys=True)
        octets = safetensors.numpy.save(held, {_WHAT: shown})
        path = self._path(release)
        try:
            durable.make_folder(path.parent)
            durable.replace(path, octets if self._seal is None else self._seal.close(octets, what.encode()))
        except OSError as error:
            raise durable.refusal(error, f"{path}: a release", "[peer] state") from None

    def get(self, release: BankEntry) -> dict[str, np.ndarray]:
        """An answer, verified: float32, bfloat16's bits or coded octets, by name.

        Raises:
            DataError: it is not there, torn, altered, or of another question, run or weights.
        """
        return self._whole(release)[1]

    def windows(self, release: BankEntry, row: int) -> dict[int, dict[str, np.ndarray]]:
        """By row, the window asked for and those that had to be read with it: as in `get`, without the first axis.

        A process verifies each file as a whole when it first reads it, and again where it has changed. Otherwise it
        reads one window; of an encrypted bank nothing less than a release can be read.

        Raises:
            DataError: see `get`.
        """
        place, path = (release.site, release.number), self._path(release)
        dtypes, before = release.dtypes(self.contents.precision), Stamp()
        # What cannot be read has its cause told below.
        with suppress(OSError):
            if (known := self._verified.get(place)) is not None:
                found = known.row(path, row, release.shapes, dtypes)
                if found is not None:
                    return {row: found}
            before = stamp(path)
        octets, tensors = self._whole(release)
        with suppress(OSError):
            if self._seal is None and stamp(path) == before:
                self._verified[place] = VerifiedFile.of(before, octets)
        # Each by itself: a cache may keep one and let the others go.
        return {
            n: {name: np.array(array[n]) for name, array in tensors.items()}
            for n in range(len(release.origins))
        }

    def _whole(self, release: BankEntry) -> tuple[bytes, dict[str, np.ndarray]]:
        path, what = self._path(release), self._about(release)
        try:
            octets = reading.read(path, MAX_RELEASE)
        except FileNotFoundError:
            raise DataError(f"{path}: is gone; {self._cure(release, 'start again')}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            if self._seal is not None:
                octets = self._seal.open(octets, what.encode())
        except ValueError:
            raise DataError(
                f"{path}: torn or altered, or of another release; {self._cure(release)}"
            ) from None
        try:
            tensors = dict(safetensors.numpy.load(octets))
            header = reading.parse(octets[8 : 8 + int.from_bytes(octets[:8], "little")])["__metadata__"]
            said = dict(reading.parse(header[_WHAT]))
            digest, told = said.pop(_DIGEST), json.dumps(said, sort_keys=True)
        except (ValueError, TypeError, LookupError, safetensors.SafetensorError):
            raise DataError(f"{path}: torn or altered, not a whole release; {self._cure(release)}") from None
        if _digest(told, tensors) != digest:
            raise DataError(f"{path}: torn or altered, the digest does not match; {self._cure(release)}")
        if told != what:
            raise DataError(f"{path}: {_difference(told, what)}; {self._cure(release)}")
        try:
            self._compare(release, tensors)
        except ValueError as error:
            raise DataError(f"{path}: {error}; {self._cure(release)}") from None
        return octets, tensors

    def drop(self, keys: Collection[bytes]) -> None:
        """SP-11.17-7: remove what was released of these patients, for good.

        Raises:
            DiskTrouble, ConfigError: something is left; the next to open the bank removes it.
        """
        gone = frozenset(place for place, one in self._releases.items() if one.key in keys)
        if gone - self._dropped:
            self._dropped |= gone
            said = json.dumps({"format": FORMAT, "releases": sorted(self._dropped)}).encode()
            path = self.folder / DROPPED
            try:
                durable.replace(path, said)
            except OSError as error:
                raise durable.refusal(error, f"{path}: what is to be removed", "[peer] state") from None
        self._remove()

    # --- inside ------------------------------------------------------------------------------------------

    def _read_dropped(self) -> frozenset[_Place]:
        """Raises DataError."""
        path = self.folder / DROPPED
        try:
            said = reading.document(path)["releases"]
            found = frozenset((str(site), int(number)) for site, number in said)
            if found - self._releases.keys():
                raise ValueError
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError, TypeError, LookupError):
            raise DataError(
                f"{path}: damaged, so nobody knows who was removed: bring it back, or remove the whole bank "
                "(splitpeer bank drop --all)"
            ) from None
        return found

    def _remove(self) -> None:
        """Removes what was dropped and is still there. Raises DiskTrouble, ConfigError."""
        for place in self._dropped:
            path = self._path(self._releases[place])
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise durable.refusal(error, f"{path}: a release to be removed", "[peer] state") from None

    def _path(self, release: BankEntry) -> Path:
        suffix = "safetensors" if self._seal is None else "sealed"
        return self.folder / release.site / f"{release.number:08d}.{suffix}"

    def _cure(self, release: BankEntry, what: str = "remove it and start again") -> str:
        """What the operator of the coordinator can do about a release that is lost."""
        if release.site != ALL_SITES:
            return f"{what}: the site is asked for it once more"
        # SP-11.18-5: sites that were told to stop have deleted the keys of their masks.
        return (
            "bring it back from a copy, or let the run continue without the patient: "
            f"splitpeer bank drop {self.contents.run.hex()} --patient {handle(release.key)}"
        )

    def _about(self, release: BankEntry) -> str:
        """What the file says of itself: nobody can put one in the place of another."""
        return json.dumps(
            {
                "format": FORMAT,
                "run": self.contents.run.hex(),
                "site": release.site,
                "number": release.number,
                "question": release.digest.hex(),
                "weights": self.contents.weights[release.site].hex(),
            },
            sort_keys=True,
        )

    def _compare(self, release: BankEntry, tensors: Arrays) -> None:
        dtypes = release.dtypes(self.contents.precision)
        found = {name: (array.dtype.name, array.shape) for name, array in tensors.items()}
        if found != {name: (dtypes[name], tuple(shape)) for name, shape in release.shapes.items()}:
            raise ValueError(f"other tensors than release {release.number} of {release.site} has")

    def _written(self) -> dict[str, Any]:
        contents, seal = self.contents, self._seal
        listed: dict[str, Any] = {
            "terms": contents.terms,
            "precision": contents.precision,
            "weights": {site: label.hex() for site, label in contents.weights.items()},
            "releases": [
                {
                    "site": one.site,
                    "number": one.number,
                    "patient": one.key.hex(),
                    "origins": [list(origin) for origin in one.origins],
                    "question": one.digest.hex(),
                    "tensors": {name: list(shape) for name, shape in one.shapes.items()},
                }
                for one in contents.releases
            ],
        }
        if contents.grid:
            listed["grid"] = [list(part) for part in contents.grid]
        said: dict[str, Any] = {
            "format": FORMAT,
            "run": contents.run.hex(),
            "check": "" if seal is None else seal.check,
        }
        said |= listed if seal is None else {"sealed": seal.close(json.dumps(listed).encode(), _INDEX).hex()}
        return {**said, "digest": _index_digest(said)}


class _BankSeal:
    """AES-256-GCM under a key of this bank alone, derived from the operator's and the run's id; a nonce is drawn for
    each file, and what the file is of is authenticated with it."""

    def __init__(self, key: bytes, run: bytes) -> None:
        material = HKDF(SHA256(), KEY_BYTES + 16, run, b"splitproto bank v1").derive(key)
        self._cipher = AESGCM(material[:KEY_BYTES])
        self.check = material[KEY_BYTES:].hex()
        """Shows whether a key is the right one, and tells nothing of it."""

    def close(self, octets: bytes, about: bytes) -> bytes:
        nonce = secrets.token_bytes(_NONCE)
        return _MAGIC + nonce + self._cipher.encrypt(nonce, octets, about)

    def open(self, sealed: bytes, about: bytes) -> bytes:
        """Raises ValueError: torn or altered, or about something else."""
        start = len(_MAGIC) + _NONCE
        if sealed[: len(_MAGIC)] != _MAGIC or len(sealed) < start + 16:
            raise ValueError
        try:
            return self._cipher.decrypt(sealed[len(_MAGIC) : start], sealed[start:], about)
        except InvalidTag:
            raise ValueError from None

    def index(self, said: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """What an index hides. Raises DataError: it was made with another key; ValueError, TypeError, LookupError."""
        if said["check"] != self.check:
            raise DataError(f"{folder}: the feature bank was encrypted with another key ([bank] key)")
        return dict(reading.parse(self.open(bytes.fromhex(said["sealed"]), _INDEX)))


def remove(folder: Path) -> None:
    """Delete a whole bank, readable or not; the index last, so that what a crash leaves is found again.

    Raises:
        DiskTrouble, ConfigError: something is left.
    """
    try:
        for inside in folder.iterdir():
            if inside.is_dir() and not inside.is_symlink():
                shutil.rmtree(inside)
            elif inside.name != INDEX:
                inside.unlink()
        shutil.rmtree(folder)
        durable.sync_folder(folder.parent)
    except OSError as error:
        raise durable.refusal(error, f"{folder}: the feature bank", "[peer] state") from None


def load_key(path: Path) -> bytes:
    """The 32 bytes of a key file that nobody else can read. Raises ConfigError."""
    try:
        found = reading.read(path, 1 << 16, follow=True)
        closed = not open_to_others(path)
    except OSError as error:
        make = f"make one with (umask 077; openssl rand -out {path} 32)"
        raise ConfigError(f"{path}: the bank's key cannot be read ({error.strerror}): {make}") from None
    if not closed:
        raise ConfigError(f"{path}: the bank's key is open to group or others: {how_to_close(path)}")
    if len(found) != KEY_BYTES:
        raise ConfigError(f"{path}: the bank's key has {KEY_BYTES} bytes, this file {len(found)}")
    return found


def _contents(said: Mapping[str, Any]) -> Contents:
    """Raises ValueError, TypeError, LookupError or AttributeError."""
    releases = tuple(
        BankEntry(
            _name(one["site"]),
            int(one["number"]),
            bytes.fromhex(one["patient"]),
            tuple((int(x), int(y), int(z)) for x, y, z in one["origins"]),
            bytes.fromhex(one["question"]),
            {str(name): tuple(map(int, shape)) for name, shape in one["tensors"].items()},
        )
        for one in said["releases"]
    )
    labels = {_name(site): bytes.fromhex(label) for site, label in said["weights"].items()}
    if {one.site for one in releases} - labels.keys():
        raise ValueError
    precision = said["precision"]
    if not {*(precision.values() if isinstance(precision, dict) else [precision])} <= _DTYPES.keys():
        raise ValueError
    for one in releases:
        one.dtypes(precision)
    run, grid = bytes.fromhex(said["run"]), tuple(tuple(map(float, part)) for part in said.get("grid", ()))
    return Contents(run, str(said["terms"]), precision, labels, releases, grid)


def _name(site: object) -> str:
    """A site's name becomes a folder's. Raises ValueError."""
    if not isinstance(site, str) or os.sep in site or site.startswith("."):
        raise ValueError
    return site


def _index_digest(said: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in said.items() if name != "digest"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest(what: str, tensors: Arrays) -> str:
    """SHA-256 over what the file is of, then names, dtypes, shapes and octets in order of names."""
    shapes = {name: [array.dtype.name, list(array.shape)] for name, array in tensors.items()}
    digest = hashlib.sha256(json.dumps([what, shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).view(np.uint8).data)
    return digest.hexdigest()


def _difference(told: str, what: str) -> str:
    """In what a file is not the one that its name says."""
    try:
        found, wanted = dict(reading.parse(told)), reading.parse(what)
    except (ValueError, TypeError):
        return "altered"
    words = {"run": "of another run", "weights": "of an encoder with other weights"}
    different = [words.get(name, "of another release") for name in wanted if found.get(name) != wanted[name]]
    return different[0] if different else "altered"
