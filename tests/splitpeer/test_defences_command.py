"""`splitpeer defences`, and that settings never wait for torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from splitpeer.cli import main
from splitpeer.defences.kinds import KINDS


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    return capsys.readouterr().out


def test_every_defence_is_listed_with_its_range_and_promise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = said(capsys, "defences")
    for name, kind in KINDS.items():
        assert name in shown
        assert all(f"{parameter} (" in shown for parameter in kind.options)
    assert "rate (0.5; 0 to 1): share of the values" in shown
    assert "peer.toml [policy] defences" in " ".join(shown.split())
    listed = {one["name"]: one for one in json.loads(said(capsys, "defences", "--json"))}
    assert list(listed) == list(KINDS)
    for name, one in listed.items():
        assert one["promise"] == KINDS[name].promise
        assert one["places"], name
        assert [parameter["name"] for parameter in one["parameters"]] == list(KINDS[name].options)
    assert listed["dropout"]["parameters"][1] == {
        "name": "kept",
        "default": False,
        "low": None,
        "high": None,
        "meaning": 'draw the mask once per sample; for releases = "once" only: '
        "another pose, other weights or another window undo it",
    }


def test_settings_with_defences_need_no_torch(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
from splitpeer.settings.peer import PeerConfig
from splitpeer.settings.templates import peer_toml
from pathlib import Path
path = Path("peer.toml")
text = peer_toml(role="client", site="north", federation="demo", modality="t1")
text = text.replace("# defences =", "defences =").replace("# image_defences =", "image_defences =")
path.write_text(text)
config = PeerConfig.load(path, environ={})
print(*config.policy.defences, *config.policy.image_defences)
print(config.resolved()["policy"]["defences"])
path.write_text(text.replace("dropout:0.5", "dropout:2"))
try:
    PeerConfig.load(path, environ={})
except Exception as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "dropout:rate=0.5,kept=false,rescale=false gaussian:scale=1,kept=false@0,1 "
        "voxel-noise:scale=0.5,background=false"
    ), done.stderr
    assert lines[1] == "['dropout:0.5', 'gaussian:1.0@0,1']", "shown as it was written"
    assert "[policy] defences: 'dropout:2': rate must be a number from 0 to 1, not '2'" in lines[2]
