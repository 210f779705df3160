"""What parties export of a real run loads without this project, and joined is the network that the run evaluated."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import safetensors.torch
import torch

from splitpeer.cli import main
from splitpeer.daemon.trail import NAME, entries
from splitpeer.errors import ConfigError, DataError
from splitpeer.export import agreement, bundle
from splitpeer.export.half import built, encoder_file, half_of
from splitpeer.export.join import joined
from splitpeer.federation.terms import job_on_wire
from splitpeer.models import build_encoder
from splitpeer.site.run_folders import OFFER, noted_terms
from splitproto.partners import Trust

from .scene import Federation, Nursery, Scene
from .test_labels_at_a_site import cast as label_cast
from .test_labels_at_a_site import everybody
from .test_seats_of_a_site import HELD, SEATS, opened

HOLDERS = ("hub", "site-t2")
WINDOW = [32, 32]
FORMS = ["bf16", "bf16", "f16", "int8", "int4"]


def exported(scene: Scene, who: str, out: Path, *more: object) -> int:
    """`splitpeer export` at one party; its exit code."""
    here = scene.folder / who
    given = ["export", "--config", here / "peer.toml", "--out", out, *more]
    with pytest.raises(SystemExit) as left:
        main([str(one) for one in given])
    return int(left.value.code or 0)


def trained(
    folder: Path, federation: Federation, nursery: Nursery, *modalities: str, **job
) -> SimpleNamespace:
    folder.mkdir()
    scene = Scene(federation, folder, nursery).cast(*modalities, **job)
    others = [f"site-{m}" for m in modalities]
    if "secure-sum" in str(job):
        for m in modalities:
            scene.client(
                m, policy={"coordinators": ["hub"], "partners": [o for o in others if o != f"site-{m}"]}
            )
    ran = asyncio.run(scene.together())
    assert ran.result is not None, ran.error
    halves = []
    for who in ("hub", *others):
        out = folder / f"half-{who}"
        more = ["--job", folder / "hub" / "job.toml"] if who == "hub" else []
        holders = [word for name in HOLDERS for word in ("--holder", name)]
        assert exported(scene, who, out, "--run", "try", "--agree", *holders, *more) == 0
        halves.append(out)
    whole = folder / "whole"
    assert exported(scene, "site-t2", whole, "--join", *halves) == 0
    return SimpleNamespace(scene=scene, halves=halves, whole=whole, others=others)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, federation, nursery) -> SimpleNamespace:
    """Slices, on another grid than the files', of which each level has its own form on the wire."""
    return trained(
        tmp_path_factory.mktemp("export") / "plain", federation, nursery, "t1ce", "t2",
        data={"window": WINDOW, "validation": 2, "spacing": [1.5, 1.5, 2.0]},
        training={"steps": 12, "batch": 1, "checkpoint_every": 12, "precision": "bf16", "learning_rate": 0.05},
        wire={"activations": FORMS},
    )  # fmt: skip


@pytest.fixture(scope="module")
def private(tmp_path_factory, federation, nursery) -> SimpleNamespace:
    """Volumes, of which the coordinator saw sums only; encoders that stay as they began."""
    return trained(
        tmp_path_factory.mktemp("export") / "private", federation, nursery, "flair", "t2", "t1",
        model={"dimensions": 3, "features": [2, 4, 4, 8, 8, 4], "fusion": "secure-sum", "widths": [1, 1, 2, 2, 4]},
        data={"window": [32, 32, 32], "validation": 1},
        training={"steps": 4, "batch": 1, "checkpoint_every": 4, "learning_rate": 0.05, "encoders": "frozen"},
        evaluation={"overlap": 0.25, "batch": 4},
    )  # fmt: skip


def held_out(scene: Scene, folder: Path) -> Path:
    """The images of the patients that the run has predicted, as a bundle reads them."""
    for path in (scene.output / "predictions").glob("*.nii.gz"):
        for modality in scene.modalities:
            (folder / modality).mkdir(parents=True, exist_ok=True)
            (folder / modality / path.name).symlink_to(scene.federation.data / modality / path.name)
    return folder


def alone(folder: Path, said: list[dict]) -> None:
    """Run bundles in a process that can import neither package of this project."""
    (folder / "what.json").write_text(json.dumps(said))
    done = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).with_name("alone.py")), str(folder / "what.json")],
        capture_output=True, text=True, timeout=110, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_bundles_run_in_monai_alone_and_joined_predict_what_the_run_did(plain, private, tmp_path) -> None:
    said = []
    for made in (plain, private):
        name = made.whole.parent.name
        images = held_out(made.scene, tmp_path / name)
        # On the grid of the evaluation, as `predictions/` has it, and not the files' own.
        said.append({
            "bundle": str(made.whole),
            "set": {
                "dataset_dir": str(images), "output_dir": str(tmp_path / f"{name}-out"),
                "postprocessing#transforms#1#resample": False,
            },
        })  # fmt: skip
    image = torch.randn(2, 1, *WINDOW, generator=torch.Generator().manual_seed(1))
    safetensors.torch.save_file({"image": image}, tmp_path / "image.safetensors")
    said += [
        {
            "bundle": str(plain.whole.parent / f"half-{who}"), "input": str(tmp_path / "image.safetensors"),
            "output": str(tmp_path / f"{who}.safetensors"),
            "set": {"dataset_dir": str(tmp_path / "plain"), "output_dir": str(tmp_path / who)},
        }
        for who in plain.others
    ]  # fmt: skip
    alone(tmp_path, said)
    for made in (plain, private):
        wanted = sorted((made.scene.output / "predictions").glob("*.nii.gz"))
        assert wanted
        for path in wanted:
            here = nib.load(tmp_path / f"{made.whole.parent.name}-out" / path.name)
            there = nib.load(path)
            assert np.abs(here.affine - there.affine).max() < 1e-4
            assert np.unique(np.asarray(there.dataobj)).size > 1
            # Another batch adds up in another order: a voxel whose probability is .5 but for rounding may change sides.
            assert np.mean(np.asarray(here.dataobj) != np.asarray(there.dataobj)) < 1e-4
    for who, modality in zip(plain.others, plain.scene.modalities, strict=True):
        # The encoder alone: what the site's own makes of the image, and a file of levels for each patient.
        backbone = plain.scene.settings.model.backbone()
        own = build_encoder(backbone, 1, seed=0).eval()
        own.load_state_dict(half_of(plain.scene.config(who), "try", None).weights[encoder_file(modality)])
        with torch.no_grad():
            wanted = own(image)
        levels = safetensors.torch.load_file(tmp_path / f"{who}.safetensors")
        assert levels.keys() == {f"{modality}/{name}" for name in wanted}
        assert all(torch.equal(levels[f"{modality}/{name}"], one) for name, one in wanted.items())
        assert len([*(tmp_path / who).glob("*.safetensors")]) == 2


def test_a_site_that_only_has_masks_is_asked(scene, tmp_path, capsys) -> None:
    """The decoder learned from its masks: without its word the network is not joined."""
    name = label_cast(scene, "none", training={"steps": 2, "batch": 1, "checkpoint_every": 2})
    ran = asyncio.run(everybody(scene, name))
    assert ran.error is None, ran.error
    parties = ("hub", "site-flair", "site-t1", name)
    holders = ("--agree", "--holder", "hub")
    job = ("--job", scene.folder / "hub" / "job.toml")
    for who in parties:
        given = ("--run", "try", *holders, *(job if who == "hub" else ()))
        assert exported(scene, who, tmp_path / f"half-{who}", *given) == 0
    *others, masks = (tmp_path / f"half-{who}" for who in parties)
    files = {str(path.relative_to(masks)) for path in masks.rglob("*") if path.is_file()}
    assert files == {
        "agreement.json",
        "configs/metadata.json",
        "docs/README.md",
        "docs/data_license.txt",
        "LICENSE",
    }
    capsys.readouterr()
    assert exported(scene, "hub", tmp_path / "whole", "--join", *others) == 4
    assert f"the run is also of {name}: without their agreement" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()
    assert exported(scene, "hub", tmp_path / "whole", "--join", *others, masks) == 0
    whole = bundle.read(tmp_path / "whole")
    assert f"client {name}" in whole.facts["parties"] and set(whole.facts["encoders_of"]) == {"flair", "t1"}
    assert exported(scene, name, tmp_path / "plain", "--run", "try") == 4
    assert "no part of its network" in capsys.readouterr().err


# --- agreements ----------------------------------------------------------------------------------------------


def trust(config) -> Trust:
    return Trust.of(config.credentials(), "test", ())


def changed(folder: Path, to: Path, change: Callable[[dict], object]) -> Path:
    """A bundle whose agreement says something else; who changed it has no key of the party's."""
    shutil.copytree(folder, to)
    path = to / bundle.AGREEMENT
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    return to


def again(made: SimpleNamespace, who: str, to: Path, holders=HOLDERS, **fact: object) -> Path:
    """A bundle whose party has signed other facts, or for others."""
    folder = made.whole.parent / f"half-{who}"
    shutil.copytree(folder, to)
    path = to / bundle.METADATA
    said = json.loads(path.read_text())
    said["splitproto"] |= fact
    path.write_text(json.dumps(said))
    signed = agreement.sign(made.scene.config(who), said["splitproto"], holders, datetime.now(UTC))
    (to / bundle.AGREEMENT).write_bytes(signed)
    return to


def test_only_what_every_party_of_the_run_signed_is_joined(plain, private, tmp_path) -> None:
    hub, first, second = plain.halves
    known = trust(plain.scene.config("site-t2"))

    def refused(match: str, *folders: Path, own: str = "site-t2", days: float = 0) -> None:
        with pytest.raises(DataError, match=match) as found:
            joined(folders, own, known, datetime.now(UTC) + timedelta(days=days))
        assert "\n" not in str(found.value)

    whole = joined(plain.halves, "hub", known, datetime.now(UTC))
    assert whole.facts["parties"] == ["coordinator hub", "client site-t1ce", "client site-t2"]
    assert whole.facts["encoders_of"] == {"t1ce": "site-t1ce", "t2": "site-t2"}
    by_level = dict(zip(("x0", "x1", "x2", "x3", "x4"), FORMS, strict=True))
    assert whole.facts["precision"] == bundle.read(plain.whole).facts["precision"] == by_level

    refused("run is also of site-t2: without their agreement", hub, first)
    refused("exactly one has the decoder", first, second)
    refused("two bundles are of site-t1ce", hub, first, first)
    refused("let hub, site-t2 hold the network, not site-t1ce", hub, first, second, own="site-t1ce")
    refused("the agreement of hub ended on", hub, first, second, days=31)
    for_ever = agreement.sign(
        plain.scene.config("site-t1ce"), bundle.read(first).facts, HOLDERS, datetime.now(UTC), 367
    )
    shutil.copytree(first, tmp_path / "ever")
    (tmp_path / "ever" / bundle.AGREEMENT).write_bytes(for_ever)
    refused("of site-t1ce lasts longer than 366 days", hub, tmp_path / "ever", second)
    refused("is joined already", hub, first, plain.whole)
    refused("is of another run than the coordinator's", hub, first, private.halves[2])

    bare = tmp_path / "bare"
    shutil.copytree(first, bare)
    (bare / bundle.AGREEMENT).unlink()
    refused("has no agreement of site-t1ce", hub, bare, second)
    longer = changed(
        first, tmp_path / "longer", lambda said: said["statement"].update(until="2099-01-01T00:00:00+00:00")
    )
    refused("the signature of client site-t1ce does not hold", hub, longer, second)
    of_other = json.loads((second / bundle.AGREEMENT).read_text())
    borrowed = changed(first, tmp_path / "borrowed", lambda said: said.update(of_other))
    refused("is signed by client site-t2", hub, borrowed, second)
    # The same site's, of the other run.
    foreign = json.loads((private.halves[2] / bundle.AGREEMENT).read_text())
    refused(
        "is for run", hub, first, changed(second, tmp_path / "foreign", lambda said: said.update(foreign))
    )
    torn = changed(first, tmp_path / "torn", lambda said: said.pop("signature"))
    refused("cannot be read", hub, torn, second)
    few = again(plain, "site-t1ce", tmp_path / "few", holders=("hub",))
    refused("agree on one list", hub, few, second)
    behind = again(plain, "site-t1ce", tmp_path / "behind", step=7)
    refused("is of step 7, the coordinator's of 12", hub, behind, second)
    evil = again(plain, "site-t1ce", tmp_path / "evil", encoders={"t1ce": {"_target_": "$__import__('os')"}})
    refused("does not say all that a bundle", hub, evil, second)
    # A fact that all halves share must be the same in all: so all of them say it.
    call = {"_target_": "os.system", "command": "true"}
    calling = [
        again(plain, who, tmp_path / f"calling-{who}", precision=call) for who in ("hub", *plain.others)
    ]
    refused("does not say all that a bundle", *calling)

    # What was signed is what lies there.
    weights = tmp_path / "weights"
    shutil.copytree(first, weights)
    file = weights / "models" / "encoder-t1ce.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + bytes(4))
    refused("is not the file that was exported", hub, weights, second)
    facts = tmp_path / "facts"
    shutil.copytree(first, facts)
    path = facts / bundle.METADATA
    path.write_text(path.read_text().replace("zscore-nonzero", "none"))
    refused("is for another bundle than the one that it lies in", hub, facts, second)

    elsewhere = Trust.read(
        "test", (plain.scene.federation.folder / "elsewhere" / "ca.crt").read_bytes(), None, ()
    )
    with pytest.raises(DataError, match="whose certificate does not hold"):
        joined(plain.halves, "hub", elsewhere, datetime.now(UTC))


def test_the_trail_tells_what_was_exported_agreed_and_joined(plain) -> None:
    noted = entries(plain.scene.config("site-t2").peer.state / NAME)
    agreed, made = (next(e for e in noted if e["event"] == f"export.{what}") for what in ("agreed", "joined"))
    assert agreed["holders"] == made["holders"] == list(HOLDERS)
    assert agreed["step"] == 12
    metadata = json.loads((plain.halves[2] / bundle.METADATA).read_text())["splitproto"]
    assert agreed["run"] == made["run"] == metadata["run"]
    assert agreed["weights"] == [f"{name} {digest}" for name, digest in metadata["weights"].items()]


def test_policy_keeps_an_encoder_out_of_a_joined_network(plain, tmp_path, capsys) -> None:
    scene = plain.scene
    out = tmp_path / "out"
    run = ["--run", "try"]
    agree = ["--agree", "--holder", "hub"]
    never = ["--set", "policy.join_encoder=false"]
    assert exported(scene, "site-t2", out, *run, *agree, *never) == 4
    assert "join_encoder keeps this site's encoder out of a joined network" in capsys.readouterr().err
    assert not out.exists()
    assert exported(scene, "site-t2", out, *run, *never) == 0
    assert not (out / bundle.AGREEMENT).exists()
    assert all(path.stat().st_mode & 0o77 == 0 for path in out.rglob("*"))
    assert not [path for path in out.rglob("*") if path.suffix in (".pt", ".pth", ".pkl")]
    assert entries(scene.config("site-t2").peer.state / NAME)[-1]["event"] == "export.written"
    config = scene.config("site-t2")
    strict = {"preset": "private", "partners": ["site-t1ce", "site-t1"]}
    preset = type(config.policy).model_validate({"coordinators": ["hub"], **strict})
    assert not preset.joins
    assert type(config.policy).model_validate({"coordinators": ["hub"], "join_encoder": True, **strict}).joins


@pytest.mark.parametrize(
    ("who", "more", "said"),
    [
        ("site-t2", ["--run", "try"], "exists: name a new folder"),
        ("site-t2", ["--run", "other"], "no run of 'other' with a checkpoint in"),
        ("site-t2", ["--run", "try", "--step", "7"], "no such checkpoint"),
        ("site-t2", ["--run", "try", "--agree"], "--agree and --holder go together"),
        ("site-t2", [], "name a run with --run, or bundles with --join"),
        ("site-t2", ["--join", "one"], "name their folders"),
        ("site-t2", ["--join", "one", "two"], "one: no bundle of splitpeer export"),
        ("hub", ["--run", "try"], "add --job job.toml"),
    ],
)
def test_what_cannot_be_exported_is_one_line(plain, tmp_path, capsys, who, more, said) -> None:
    out = tmp_path / "out"
    if "exists" in said:
        out.mkdir()
    assert exported(plain.scene, who, out, *more) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert out.exists() == ("exists" in said)


def test_a_job_file_that_has_changed_is_refused(plain, tmp_path) -> None:
    scene = plain.scene
    job = scene.settings
    other = job.model_copy(update={"training": job.training.model_copy(update={"batch": 2})})
    coded = job.model_copy(update={"wire": job.wire.model_copy(update={"gradients": "int4"})})
    for changed in (other, coded):
        with pytest.raises(ConfigError, match="has changed since run"):
            half_of(scene.config("hub"), "try", changed)


def test_seats_of_a_site_behind_defences_with_a_network_of_its_own(scene) -> None:
    scene.cast("t1")
    for modality in HELD:
        shutil.copytree(scene.federation.data / modality, scene.folder / "images" / modality)
    scene.client(
        "t1", peer={"modality": list(HELD)}, data={"images": str(scene.folder / "images")},
        model={"network": "residual-unet", "features": [2, 4, 4, 8, 8]},
        policy={"coordinators": ["hub"], "defences": ["gaussian:0.5", "dropout:0.5"]},
    )  # fmt: skip
    site = opened(scene)
    config = scene.config("site-t1")
    half = half_of(config, "try", None)
    assert half.facts["seats"] == {"flair": ["flair"], "mri": ["t2", "t1"]}
    assert half.facts["step"] == 0
    assert "gaussian:0.5" in half.missing[0]
    image = torch.randn(1, 3, *WINDOW)
    with torch.no_grad():
        levels = built(half)(image)
        for name, part in zip(("flair", "mri"), image.split((1, 2), 1), strict=True):
            for level, tensor in site.encoders.halves[name].network.encoder(part).items():
                assert torch.equal(levels[f"{name}/{level}"], tensor)
    folder = next(path for path in config.peer.state.iterdir() if path.name.startswith("try-"))
    job, seats = noted_terms(folder)
    assert (job, seats) == (job_on_wire(scene.settings), SEATS)
    with pytest.raises(DataError, match=r"another network than the job's, or than \[model\]"):
        half_of(config.model_copy(update={"model": None}), "try", None)
    (folder / OFFER).write_bytes(b"\x81")
    with pytest.raises(DataError, match="is damaged"):
        half_of(config, "try", None)
    (folder / OFFER).unlink()
    with pytest.raises(DataError, match="with an older splitpeer"):
        half_of(config, "try", None)
