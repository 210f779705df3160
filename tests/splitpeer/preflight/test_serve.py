"""What `serve` says and sets before the heavy imports."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitpeer.cli import main
from tests.splitpeer.preflight.test_doctor import Setup, setup

__all__ = ["setup"]


def serve(setup: Setup, capsys: pytest.CaptureFixture[str]) -> str:
    """Up to the import of the role, which is made to fail."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    setup.write()
    setup.patch.setattr("splitpeer.cli.serve.load", stop)
    with pytest.raises(SystemExit):
        main(["serve"])
    return capsys.readouterr().err


def test_matplotlib_writes_into_the_state_folder(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    setup.patch.setenv("MPLCONFIGDIR", "")
    setup.patch.delenv("MPLCONFIGDIR")
    serve(setup, capsys)
    assert os.environ["MPLCONFIGDIR"] == str(Path.cwd() / "state" / "matplotlib")
    setup.patch.setenv("MPLCONFIGDIR", "/elsewhere")
    serve(setup, capsys)
    assert os.environ["MPLCONFIGDIR"] == "/elsewhere"


def test_what_a_person_should_know_is_a_line_each(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert "peer.notice" not in serve(setup, capsys)
    setup.patch.setenv("HTTPS_PROXY", "http://proxy:3128")
    setup.sections["tls"].pop("crl")
    said = serve(setup, capsys)
    assert said.count("peer.notice") == 2
    assert "HTTPS_PROXY is set, but this program uses no web proxy" in said
    assert "no [tls] crl" in said
