"""Encoders that hospitals have in common and the coordinator cannot compute: from a secret, or made by one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from splitpeer.cli import main
from splitpeer.errors import ConfigError
from splitpeer.pretraining import encoder_file, secret
from splitpeer.pretraining.secret import NAME, SharedSecret

from .conftest import Desk

TOGETHER = {"data": "msd-task01", "steps": 2, "encoders": "together"}
PRIVATE = {"preset": "private", "min_encoder_noise": 0, "min_encoder_rate": 0}
SEATS = ("flair", "t1", "t2")


@pytest.fixture
def where(desk: Desk) -> tuple[str, ...]:
    """A private site with a recipe of public data; the images that the recipe wants."""
    desk.job(pretraining=TOGETHER)
    desk.peer(policy=PRIVATE, runtime={"initial_weights": "private"})
    return ("--recipe", "--images", str(desk.data / "msd"), "--layout", "msd", "--convention", "msd")


def at_south(desk: Desk) -> None:
    desk.peer(["flair", "t2"], policy=PRIVATE, runtime={"initial_weights": "private"})


def test_hospitals_with_one_secret_come_to_one_network(desk: Desk, where: tuple[str, ...]) -> None:
    shared = secret.make(desk.folder / "hospitals.key")
    given = (*where, "--secret", str(desk.folder / "hospitals.key"))
    one = desk.told(*given)["stages"][0]
    kept = dict(desk.made.tensors)
    at_south(desk)
    other = desk.told(*given, "--seat", "t2", "--force")["stages"][0]
    assert (one["network"], one["loss"]) == (other["network"], other["loss"])
    assert (one["secret"], one["seed"]) == (shared.fingerprint, None)
    assert not desk.made.described.began_from_a_seed
    assert f"network {one['network']}" in desk.run(*given, "--seat", "t2", "--force")
    # Another secret, or another recipe: another network.
    (desk.folder / "hospitals.key").unlink()
    secret.make(desk.folder / "hospitals.key")
    third = desk.told(*given, "--seat", "t2", "--force")["stages"][0]
    assert third["network"] != one["network"]
    assert not all(torch.equal(kept[name], t) for name, t in desk.made.tensors.items())


def test_what_is_drawn_depends_on_the_recipe_and_on_nothing_of_one_site() -> None:
    shared = SharedSecret(bytes(range(32)))
    assert shared.entropy("a") != shared.entropy("b")
    assert shared.entropy("a").bit_length() <= 128
    # By hand: HMAC-SHA-256 over the name, a zero octet, and what is drawn.
    assert (shared.fingerprint, f"{shared.entropy('plan'):032x}") == (
        "b547cd0c",
        "24b2533186cc1e2103f62fe99b37a0a1",
    )
    assert bytes(range(32)).hex() not in repr(shared)


def test_a_seed_of_the_coordinator_is_not_used_where_there_is_a_secret(
    desk: Desk, where: tuple[str, ...]
) -> None:
    secret.make(desk.folder / "hospitals.key")
    given = (*where, "--secret", str(desk.folder / "hospitals.key"))
    without = desk.told(*given)
    desk.job(pretraining={**TOGETHER, "seed": 1})
    assert desk.told(*given, "--force") == without


def test_one_hospital_makes_the_encoders_of_all(
    desk: Desk, where: tuple[str, ...], ends_at: Callable[[int], None]
) -> None:
    partners = desk.folder / "partners"
    given = (*where, "--for-partners", str(partners))
    said = desk.run(*given)
    assert sorted(path.name for path in partners.iterdir()) == ["flair.safetensors", "t2.safetensors"]
    assert f"{partners / 't2.safetensors'}: for south, and for nobody else" in said
    assert (partners / "t2.safetensors").stat().st_mode & 0o777 == 0o600
    files = {"t1": desk.made} | {
        seat: encoder_file.read(partners / f"{seat}.safetensors") for seat in ("flair", "t2")
    }
    assert len({file.described.of_network for file in files.values()}) == 1
    assert [files[seat].described.modalities for seat in SEATS] == [(seat,) for seat in SEATS]
    assert not any(file.described.began_from_a_seed for file in files.values())
    assert "exists and is not overwritten" in desk.run(*given, "--out", str(desk.folder / "x"), code=4)


def test_files_for_partners_are_those_that_a_partner_would_make(desk: Desk, where: tuple[str, ...]) -> None:
    """A partner with the secret checks so what it was given."""
    secret.make(desk.folder / "hospitals.key")
    common = (*where, "--secret", str(desk.folder / "hospitals.key"))
    desk.run(*common, "--for-partners", str(desk.folder / "partners"))
    given = encoder_file.read(desk.folder / "partners" / "t2.safetensors")
    at_south(desk)
    desk.run(*common, "--seat", "t2", "--force")
    assert desk.made.digest == given.digest


def test_files_for_partners_after_an_interruption(
    desk: Desk, where: tuple[str, ...], ends_at: Callable[[int], None]
) -> None:
    """In the second stage, when the files for partners are there and the site's own is not."""
    desk.job(pretraining={**TOGETHER, "own_steps": 4})
    given = (*where, "--for-partners", str(desk.folder / "partners"))
    ends_at(3)
    desk.run(*given, code=130)
    assert (desk.folder / "partners" / "flair.safetensors").exists()
    ends_at(-1)
    desk.run(*given)
    assert desk.made.described.stages[-1].data == "own"
    others = encoder_file.read(desk.folder / "partners" / "flair.safetensors").described
    # Nothing of this site's own images reaches a partner.
    assert not others.saw_own_images and len(others.stages) == 1


def test_an_interrupted_one_keeps_to_its_partners(
    desk: Desk, where: tuple[str, ...], ends_at: Callable[[int], None]
) -> None:
    """Continued without the flag, it would end well and the other sites' encoders would be gone."""
    desk.job(pretraining={**TOGETHER, "steps": 4})
    given = ("--for-partners", str(desk.folder / "partners"))
    ends_at(3)
    desk.run(*where, *given, code=130)
    ends_at(-1)
    for other in ((), ("--for-partners", str(desk.folder / "elsewhere"))):
        said = desk.run(*where, *other, code=4)
        assert f"began with --for-partners {desk.folder / 'partners'}: say the same, or --force" in said
    desk.run(*where, *given)
    assert len(list((desk.folder / "partners").iterdir())) == 2
    desk.out.unlink()
    ends_at(3)
    desk.run(*where, code=130)
    ends_at(-1)
    assert "began without --for-partners: say the same" in desk.run(*where, "--for-partners", "x", code=4)
    desk.run(*where, *given, "--force")
    (desk.folder / "encoder.safetensors.steps").mkdir()
    (desk.folder / "encoder.safetensors.steps" / "partners.json").write_text("[]")
    desk.out.unlink()
    assert "partners.json: cannot be read" in desk.run(*where, code=4)


def test_encoders_of_their_own_are_told(desk: Desk, where: tuple[str, ...]) -> None:
    desk.run(*where)
    assert "every site trains a network of its own" in desk.log


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--labels", "none", "--for-partners", "x"), "--secret and --for-partners are for a job's recipe"),
        (("--labels", "none", "--secret", "x"), "--secret and --for-partners are for a job's recipe"),
        (("--recipe", "--secret", "absent"), "cannot read the hospitals' secret"),
        (("--recipe", "--for-partners", "x"), '--for-partners wants encoders = "together"'),
    ],
)
def test_what_cannot_be(desk: Desk, arguments: tuple[str, ...], said: str) -> None:
    desk.job(pretraining={"data": "phantom", "steps": 2})
    assert said in desk.run(*arguments, code=4)


def test_the_file_of_the_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hospitals.key"
    with pytest.raises(SystemExit) as left:
        main(["init", "secret", "--output", str(path)])
    assert left.value.code == 0
    read = secret.read(path)
    assert f"fingerprint {read.fingerprint}; give it to the other hospitals" in capsys.readouterr().out
    assert (path.stat().st_mode & 0o777, len(read.octets)) == (0o600, 32)
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        secret.make(path)
    assert secret.read(path) == read
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="open to group or others"):
        secret.read(path)


@pytest.mark.parametrize(
    "content", ["ab" * 32, f"{NAME} {'ab' * 31}", f"{NAME} {'ab' * 32} more", "", "\xff\xfe"]
)
def test_no_other_key_is_taken_for_it(tmp_path: Path, content: str) -> None:
    """The federation's salt above all, which the coordinator has too."""
    path = tmp_path / "federation.salt"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="is no secret of splitpeer init secret"):
        secret.read(path)
