"""``[results]`` of peer.toml: a hospital's own codes for regions."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitpeer.errors import ConfigError
from splitpeer.results.codes import ABNORMAL, Concept, RegionCode
from splitpeer.settings.loading import to_toml
from splitpeer.settings.peer import PeerConfig
from tests.splitpeer.conftest import PEER

ORGAN = "SCT:123037004:Anatomical Structure"
WRITTEN = f"""
[results]
codes = {{ WT = "SCT:108369006:Neoplasm", prostate = {{ type = "SCT:41216001:Prostate", category = "{ORGAN}" }} }}
"""


def peer(folder: Path, text: str) -> PeerConfig:
    path = folder / "peer.toml"
    path.write_text(PEER + text)
    return PeerConfig.load(path, environ={})


def test_codes_of_a_hospital(tmp_path: Path) -> None:
    assert peer(tmp_path, "").results.codes == {}
    codes = peer(tmp_path, WRITTEN).results.codes
    assert codes["WT"] == RegionCode(Concept("SCT", "108369006", "Neoplasm"), ABNORMAL)
    assert codes["prostate"].category.meaning == "Anatomical Structure"


def test_what_is_written_out_is_read_again(tmp_path: Path) -> None:
    first = peer(tmp_path, WRITTEN)
    (tmp_path / "again.toml").write_text(to_toml(first.resolved()))
    assert PeerConfig.load(tmp_path / "again.toml", environ={}).results == first.results


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        ('{ WT = "Neoplasm" }', "'Neoplasm' is no code: write scheme:value:meaning"),
        ("{ WT = 3 }", r'write "SCT:10200004:Liver", or { type'),
        ('{ WT = { category = "SCT:1:x" } }', r'write "SCT:10200004:Liver", or { type'),
        ("{ WT = { type = 3 } }", "3 is no code"),
        ('{ "a b" = "SCT:1:x" }', "results"),
    ],
)
def test_what_is_no_code(tmp_path: Path, codes: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("{", r"\{")) as refused:
        peer(tmp_path, f"[results]\ncodes = {codes}\n")
    assert "results" in str(refused.value)
