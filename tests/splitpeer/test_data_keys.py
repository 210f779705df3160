"""`splitpeer data keys`: the site that has the salt finds the patient of a key in a log or a capture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitpeer.cli import main
from splitpeer.data.pseudonym import pseudonym
from splitpeer.logs import handle

SALT = bytes(range(32))
PATIENTS = ("MUELLER_Erika", "P\u00e9r\u00e8s", "1234")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site's peer.toml, its salt and three images."""
    (tmp_path / "images").mkdir()
    for patient in PATIENTS:
        (tmp_path / "images" / f"{patient}.nii.gz").write_bytes(b"")
    (tmp_path / "federation.salt").write_text(SALT.hex())
    (tmp_path / "federation.salt").chmod(0o600)
    (tmp_path / "peer.toml").write_text(
        """
        [peer]\nrole = "client"\nsite = "a"\nfederation = "f"\nmodality = "t1"
        [tls]\nca = "ca.crt"\ncertificate = "a.crt"\nkey = "a.key"
        [network]\ncoordinator = "tcp://127.0.0.1:7443"
        [data]\nimages = "images"\nsalt = "federation.salt"
        [policy]\ncoordinators = ["hub"]
        """
    )
    return tmp_path / "peer.toml"


@pytest.fixture
def keys(site: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the command: keys(arguments) -> exit code, standard output, standard error."""

    def run(*asked: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["data", "keys", "--config", str(site), *asked])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def entries_of(ran: tuple[int, str, str]) -> list[dict[str, str]]:
    code, out, err = ran
    assert (code, err) == (0, "")
    return json.loads(out)


def test_all_patients_are_listed(site: Path, keys) -> None:
    code, out, _ = keys()
    assert code == 0
    assert len(out.splitlines()) == 4
    entries = entries_of(keys("--json"))
    assert [entry["patient"] for entry in entries] == sorted(PATIENTS)
    for entry in entries:
        key = pseudonym(SALT, entry["patient"])
        assert (entry["key"], entry["handle"]) == (key.hex(), handle(key))
        assert Path(entry["file"]) == site.parent / "images" / f"{entry['patient']}.nii.gz"


@pytest.mark.parametrize("patient", PATIENTS)
def test_both_ways(keys, patient: str) -> None:
    key = pseudonym(SALT, patient)
    ways = [patient, f"{patient}.nii.gz", key.hex(), key.hex()[:8].upper(), handle(key)]
    for asked in ways:
        (entry,) = entries_of(keys("--json", asked))
        assert (entry["patient"], entry["key"]) == (patient, key.hex())


def test_several_are_asked_for_at_once_and_shown_once(keys) -> None:
    asked = ["1234", pseudonym(SALT, "1234").hex(), "Pe\u0301re\u0300s"]
    entries = entries_of(keys("--json", *asked))
    assert [entry["patient"] for entry in entries] == ["1234", "P\u00e9r\u00e8s"]


@pytest.mark.parametrize("asked", ["NOBODY", "f" * 32, pseudonym(SALT, "1234").hex()[:3]])
def test_nobody_is_found_by_chance(keys, asked: str) -> None:
    code, out, err = keys(asked)
    assert (code, out) == (4, "")
    assert "no patient of this site has this id, key or handle" in err


def test_a_site_that_holds_several_modalities_lists_every_file(site: Path, keys) -> None:
    for modality in ("t1", "t2"):
        (site.parent / "images" / modality).mkdir()
    for patient in PATIENTS:
        path = site.parent / "images" / f"{patient}.nii.gz"
        for modality in ("t1", "t2"):
            (site.parent / "images" / modality / path.name).write_bytes(b"")
        path.unlink()
    site.write_text(site.read_text().replace('modality = "t1"', 'modality = ["t1", "t2"]'))
    files = {tuple(Path(entry["file"]).parts[-2:]) for entry in entries_of(keys("--json"))}
    assert files == {(modality, f"{patient}.nii.gz") for modality in ("t1", "t2") for patient in PATIENTS}
    assert len(entries_of(keys("--json", "1234"))) == 2
