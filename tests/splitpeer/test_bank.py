"""The feature bank on disk: whole or refused in one line, never another's, never more than the disk holds."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from splitpeer.errors import ConfigError, DataError, DiskTrouble
from splitpeer.logs import handle
from splitpeer.storage import bank as module
from splitpeer.storage.bank import FILE_OCTETS, Bank, BankEntry, Contents, load_key
from splitproto.codings import Form, form_at

KEY = bytes(range(32))
SITES = ("north", "south")
ALICE, BOB = bytes([1] * 16), bytes([2] * 16)


def release(site: str, number: int, key: bytes) -> BankEntry:
    origins = ((0, 0, 2 * number), (0, 0, 2 * number + 1))
    shapes = {"x0": (2, 3, 8, 8), "x1": (2, 4, 4, 4)}
    return BankEntry(site, number, key, origins, bytes([number] * 32), shapes)


BY_LEVEL = {"x0": "bf16", "x1": "f32"}


def contents(precision: Form = "f32", run: int = 7, weights: int = 9) -> Contents:
    listed = [release(site, n, (ALICE, BOB)[n // 2]) for site in SITES for n in range(4)]
    labels = {site: bytes([weights] * 32) for site in SITES}
    return Contents(bytes([run] * 16), "terms", precision, labels, tuple(listed))


def tensors(of: BankEntry, precision: Form = "f32") -> dict[str, np.ndarray]:
    source = np.random.default_rng([of.number, len(of.site)])
    dtypes = {"f32": np.float32, "bf16": np.uint16}
    return {
        name: (100 * source.random(shape)).astype(dtypes[form_at(precision, name)])
        for name, shape in of.shapes.items()
    }


@pytest.fixture(params=[b"", KEY], ids=["plain", "encrypted"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Bank:
    bank = Bank.create(tmp_path / "bank", contents(), request.param)
    for one in bank.contents.releases:
        bank.put(one, tensors(one))
    return bank


def reopened(bank: Bank) -> Bank:
    found = Bank.open(bank.folder, KEY if bank.encrypted else b"")
    assert found is not None
    return found


def file_of(bank: Bank, of: BankEntry) -> Path:
    suffix = "sealed" if bank.encrypted else "safetensors"
    return bank.folder / of.site / f"{of.number:08d}.{suffix}"


@pytest.mark.parametrize("precision", ["f32", "bf16", BY_LEVEL])
def test_what_was_put_is_what_the_next_process_gets(tmp_path, precision) -> None:
    bank = Bank.create(tmp_path / "bank", contents(precision))
    assert Bank.open(tmp_path / "elsewhere") is None
    for place, one in enumerate(bank.contents.releases):
        assert len(reopened(bank).missing()) == 8 - place
        bank.put(one, tensors(one, precision))
    again = reopened(bank)
    assert again.contents == bank.contents and again.missing() == []
    for one in again.contents.releases:
        found = again.get(one)
        assert all(np.array_equal(found[name], array) for name, array in tensors(one, precision).items())
        dtypes = {"f32": "float32", "bf16": "uint16"}
        assert {n: str(a.dtype) for n, a in found.items()} == {
            n: dtypes[form_at(precision, n)] for n in one.shapes
        }
    sizes = [sum(array.nbytes for array in again.get(one).values()) for one in again.contents.releases]
    assert again.contents.octets == sum(sizes) + len(sizes) * FILE_OCTETS


@pytest.mark.parametrize("precision", ["f32", "bf16", BY_LEVEL])
@pytest.mark.parametrize("key", [b"", KEY], ids=["plain", "encrypted"])
def test_windows_are_rows_of_what_was_put(tmp_path, precision: Form, key: bytes) -> None:
    bank = Bank.create(tmp_path / "bank", contents(precision), key)
    one = bank.contents.releases[0]
    put = tensors(one, precision)
    bank.put(one, put)
    first, second = bank.windows(one, 1), bank.windows(one, 1)
    assert set(first) == {0, 1}, "the file is read as a whole to verify it"
    assert set(second) == ({0, 1} if key else {1})
    for found in (first, second):
        for row, window in found.items():
            assert window.keys() == put.keys()
            for name, array in window.items():
                assert array.dtype == put[name].dtype
                assert np.array_equal(array, put[name][row])


def test_an_encrypted_bank_shows_nothing_of_what_it_holds(full) -> None:
    one = full.contents.releases[0]
    shown = file_of(full, one).read_bytes()
    value = tensors(one)["x0"].tobytes()[:64]
    assert (value in shown) != full.encrypted
    again = reopened(full)
    again.put(one, tensors(one))
    assert (file_of(full, one).read_bytes() == shown) != full.encrypted, "no nonce is used twice"
    assert (file_of(full, one).stat().st_mode & 0o777) == 0o600
    index = (full.folder / module.INDEX).read_text()
    assert (one.key.hex() in index) != full.encrypted
    assert ('"origins"' in index) != full.encrypted


@pytest.mark.parametrize(
    ("key", "cause"),
    [(b"", "is encrypted: name its key"), (bytes(32), "was encrypted with another key")],
)
def test_the_wrong_key_is_known_at_once(tmp_path, key, cause) -> None:
    Bank.create(tmp_path / "bank", contents(), KEY)
    with pytest.raises(DataError, match=cause):
        Bank.open(tmp_path / "bank", key)


def test_a_key_for_a_bank_without_one(tmp_path) -> None:
    Bank.create(tmp_path / "bank", contents())
    with pytest.raises(DataError, match=r"is not encrypted: remove the key \(\[bank\] key\)"):
        Bank.open(tmp_path / "bank", KEY)


def test_a_key_file_is_private_and_whole(tmp_path) -> None:
    path = tmp_path / "bank.key"
    with pytest.raises(ConfigError, match=r"cannot be read .* openssl rand"):
        load_key(path)
    path.write_bytes(KEY)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="open to group or others: chmod 600"):
        load_key(path)
    path.chmod(0o600)
    assert load_key(path) == KEY
    path.write_bytes(KEY + b"\n")
    with pytest.raises(ConfigError, match="has 32 bytes, this file 33"):
        load_key(path)


Spoil = Callable[[Bank, Path], object]


def cut(bank: Bank, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(bank: Bank, path: Path) -> None:
    path.write_bytes(b"")


def flip(bank: Bank, path: Path) -> None:
    octets = bytearray(path.read_bytes())
    octets[-5] ^= 1
    path.write_bytes(octets)


def swap(bank: Bank, path: Path) -> None:
    shutil.copy(file_of(bank, bank.contents.releases[1]), path)


def other_site(bank: Bank, path: Path) -> None:
    shutil.copy(file_of(bank, bank.contents.releases[4]), path)


def other_run(bank: Bank, path: Path) -> None:
    _from(bank, contents(run=8), path)


def other_weights(bank: Bank, path: Path) -> None:
    _from(bank, contents(weights=8), path)


def _from(bank: Bank, other: Contents, path: Path) -> None:
    made = Bank.create(bank.folder.parent / "other", other, KEY if bank.encrypted else b"")
    made.put(other.releases[0], tensors(other.releases[0]))
    shutil.copy(file_of(made, other.releases[0]), path)


@pytest.mark.parametrize(
    ("spoil", "plainly"),
    [
        (cut, "torn or altered, not a whole release"),
        (empty, "torn or altered, not a whole release"),
        (flip, "the digest does not match"),
        (swap, "of another release"),
        (other_site, "of another release"),
        (other_run, "of another run"),
        (other_weights, "of an encoder with other weights"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_release_that_is_not_what_was_put_is_refused_in_one_line(full, spoil: Spoil, plainly: str) -> None:
    one = full.contents.releases[0]
    spoil(full, file_of(full, one))
    with pytest.raises(DataError) as caught:
        reopened(full).get(one)
    said = str(caught.value)
    assert "\n" not in said and str(file_of(full, one)) in said
    assert "remove it and start again: the site is asked for it once more" in said
    assert ("torn or altered" if full.encrypted else plainly) in said
    assert reopened(full).get(full.contents.releases[2]), "the others are as good as before"


@pytest.mark.parametrize("spoil", [cut, empty, flip, swap, other_site, other_run, other_weights])
def test_a_file_that_changes_after_it_was_verified_is_verified_again(full, spoil: Spoil) -> None:
    one = full.contents.releases[0]
    assert full.windows(one, 0)
    spoil(full, file_of(full, one))
    with pytest.raises(DataError, match=r"torn or altered|of another|other weights"):
        full.windows(one, 0)
    full.put(one, tensors(one))
    assert np.array_equal(full.windows(one, 1)[1]["x0"], tensors(one)["x0"][1])
    file_of(full, one).unlink()
    with pytest.raises(DataError, match="is gone"):
        full.windows(one, 0)


def test_a_release_with_other_shapes_is_neither_kept_nor_read(tmp_path) -> None:
    bank = Bank.create(tmp_path / "bank", contents())
    one = bank.contents.releases[0]
    good = tensors(one)
    for bad in ({"x0": good["x0"]}, {**good, "x2": good["x1"]}, {**good, "x1": good["x1"][:, :1]},
                {**good, "x1": good["x1"].astype(np.float64)}):  # fmt: skip
        with pytest.raises(ValueError, match="other tensors than release 0 of north has"):
            bank.put(one, bad)
    assert len(bank.missing()) == 8


@pytest.mark.parametrize("gone", [False, True])
def test_of_a_sum_nobody_can_be_asked_again(tmp_path: Path, gone: bool) -> None:
    """SP-11.18-5: sites that were told to stop have deleted the keys of their masks."""
    shapes = {"x0": (2, 3, 8, 8)}
    one = BankEntry(module.ALL_SITES, 0, ALICE, ((0, 0, 0), (0, 0, 1)), bytes(32), shapes)
    bank = Bank.create(
        tmp_path / "bank", Contents(bytes([7] * 16), "terms", "f32", {one.site: bytes(32)}, (one,))
    )
    bank.put(one, tensors(one))
    if gone:
        file_of(bank, one).unlink()
    else:
        cut(bank, file_of(bank, one))
    advice = f"splitpeer bank drop {'07' * 16} --patient {handle(ALICE)}"
    with pytest.raises(DataError, match=advice) as caught:
        bank.get(one)
    assert "once more" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_gone_is_missing(full) -> None:
    one = full.contents.releases[3]
    file_of(full, one).unlink()
    assert reopened(full).missing() == [one]
    with pytest.raises(DataError, match="is gone; start again: the site is asked for it once more"):
        full.get(one)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-2],
        lambda text: text.replace('"terms":"terms"', '"terms":"others"'),
        lambda text: text.replace('"number":2', '"number":9'),
        lambda text: text.replace("north", "../north"),
        lambda text: "[]",
    ],
)
def test_a_damaged_index_is_refused(full, spoil: Callable[[str], str]) -> None:
    path = full.folder / "bank.json"
    text = path.read_text()
    if spoil(text) == text:  # what it would change is encrypted
        said = json.loads(text)
        said["sealed"] = said["sealed"][:-1] + ("0" if said["sealed"][-1] != "0" else "1")
        text = json.dumps({**said, "digest": module._index_digest(said)})
    path.write_text(spoil(text))
    with pytest.raises(DataError, match=r"bank\.json: damaged, the digest does not match"):
        reopened(full)


@pytest.mark.parametrize("precision", ["f33", {"x0": "f32", "x1": "int9"}, ["f32"], None, {"x0": ["f32"]}])
def test_an_index_names_known_forms_also_where_nothing_was_released(tmp_path: Path, precision: Any) -> None:
    bank = Bank.create(tmp_path / "bank", Contents(bytes(16), "terms", "f32", {}, ()), b"")
    assert reopened(bank).contents.releases == ()
    path = bank.folder / "bank.json"
    said = {**json.loads(path.read_text()), "precision": precision}
    path.write_text(json.dumps({**said, "digest": module._index_digest(said)}))
    with pytest.raises(DataError, match=r"bank\.json: damaged"):
        reopened(bank)


def test_a_bank_of_another_version(full) -> None:
    path = full.folder / "bank.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "splitproto feature bank 9"}))
    with pytest.raises(DataError, match=r"of another version \(splitproto feature bank 9\)"):
        reopened(full)


def left(bank: Bank) -> int:
    return len([path for path in bank.folder.rglob("0*") if path.is_file()])


def test_whoever_is_withdrawn_leaves_nothing(full) -> None:
    """SP-11.17-7: for good, whoever opens the bank next."""
    full.drop({ALICE})
    for bank in (full, reopened(full)):
        assert (bank.missing(), bank.dropped, left(bank)) == ([], {ALICE}, 4)
    full.drop({ALICE, BOB})
    assert (reopened(full).dropped, left(full)) == ({ALICE, BOB}, 0)


def test_what_could_not_be_removed_is_told_and_removed_when_the_bank_is_opened(full, monkeypatch) -> None:
    """SP-11.17-7: a crash in the middle is the same."""
    real = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("00000001"):
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(
        ConfigError, match=r"00000001\.\w+: a release to be removed .*Permission denied"
    ) as one:
        full.drop({ALICE})
    assert "\n" not in str(one.value)
    assert left(full) > 4
    monkeypatch.setattr(Path, "unlink", real)
    assert reopened(full).dropped == {ALICE}
    assert left(full) == 4
    (full.folder / module.DROPPED).write_text("{}")
    with pytest.raises(DataError, match=r"dropped\.json: damaged, so nobody knows who was removed"):
        reopened(full)


def test_the_size_is_known_before_and_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch) -> None:
    bank = Bank.create(tmp_path / "bank", contents())
    needed, free = bank.contents.octets, 10_000
    for one in bank.contents.releases:
        bank.put(one, tensors(one))
    on_disk = sum(path.stat().st_size for path in bank.folder.rglob("*.safetensors"))
    assert on_disk <= needed <= on_disk + 8 * module.FILE_OCTETS
    assert bank.contents.windows == 16
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    bank.check_room()
    with pytest.raises(DiskTrouble, match=r"the feature bank needs .* and 9\.766 KiB are free: make room"):
        Bank.create(tmp_path / "other", contents())
    assert not (tmp_path / "other" / "bank.json").exists()


def test_any_reader_of_safetensors_reads_a_release(tmp_path) -> None:
    bank = Bank.create(tmp_path / "bank", contents())
    one = bank.contents.releases[0]
    bank.put(one, tensors(one))
    found = safetensors.numpy.load_file(file_of(bank, one))
    assert np.array_equal(found["x0"], tensors(one)["x0"])
