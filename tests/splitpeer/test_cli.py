"""The command line as users see it: real processes, exit codes, one line per mistake, no torch without need."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

import splitproto
from splitpeer import errors
from splitpeer.cli import main
from splitpeer.cli.outcome import exit_code
from splitpeer.preflight import machine
from splitproto import errors as wire
from splitproto import pki
from splitproto.pki import PkiError

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`splitpeer ARGUMENTS` in an empty folder, with an environment of its own."""

    def call(*arguments: str, code: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "COLUMNS": "100", **environ}
        done = subprocess.run(
            [sys.executable, "-m", "splitpeer.cli", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        if code:
            assert len(done.stderr.splitlines()) == 1, done.stderr
            assert done.stderr.startswith("splitpeer: ")
        return done

    return call


def in_process(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of `main`, without the time that a process takes."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    code = left.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with a CA, a coordinator and two clients; the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SPLITPEER_")]:
        monkeypatch.delenv(name)
    for arguments in (
        ("pki", "init", "--federation", "demo"),
        ("pki", "issue", "--role", "coordinator", "--site", "hub", "--host", "localhost"),
        ("pki", "issue", "--role", "client", "--site", "north"),
        ("pki", "issue", "--role", "client", "--site", "south"),
    ):
        assert in_process(capsys, *arguments)[0] == 0
    return tmp_path


# ---- from an empty folder to a checked configuration


def test_a_new_federation_in_real_processes(run: Run, tmp_path: Path) -> None:
    run("pki", "init", "--federation", "demo")
    assert stat.S_IMODE((tmp_path / "pki" / "ca.key").stat().st_mode) == 0o600
    missing = run("init", "--role", "client", "--modality", "T1", code=4)
    assert "pki: no certificate of client <site>: get one (splitpeer pki request)" in missing.stderr
    given = ("--site", "north", "--federation", "demo")
    assert "client north of" in run("init", "--role", "client", "--modality", "T1", *given).stdout
    shown = run("config", "show", "--json", SPLITPEER_RUNTIME__THREADS="2")
    assert json.loads(shown.stdout)["runtime"]["threads"] == 2
    assert json.loads(shown.stdout)["peer"]["modality"] == "t1"


def test_check_goes_to_the_files(
    federation: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--role", "client", "--modality", "t1", "--site", "north")
    assert in_process(capsys, "init", *given)[0] == 0
    code, text = in_process(capsys, "config", "check")
    assert (code, "[data] images" in text) == (4, True)
    (federation / "images").mkdir()
    code, text = in_process(capsys, "config", "check")
    assert (code, "images: no NIfTI file" in text) == (4, True)
    (federation / "images" / "p1.nii.gz").touch()
    monkeypatch.setattr(machine, "_synchronised", lambda: True)
    assert in_process(capsys, "config", "check") == (0, "")
    (federation / "pki" / "federation.salt").chmod(0o644)
    code, text = in_process(capsys, "config", "check")
    assert (code, "chmod 600" in text) == (4, True)
    (federation / "pki" / "north.crt").unlink()
    code, text = in_process(capsys, "config", "check")
    assert (code, "[tls]" in text, "no such file" in text) == (4, True, True)
    pki.issue(federation / "pki", "client", "soon", days=5, now=datetime.now(UTC))
    soon = [f"--set=tls.{key}=pki/soon.{end}" for key, end in (("certificate", "crt"), ("key", "key"))]
    (federation / "pki" / "federation.salt").chmod(0o600)
    code, text = in_process(capsys, "config", "check", "--set=peer.site=soon", *soon)
    assert (code, "ends in 5 days: renew it" in text) == (0, True)


def test_init_takes_what_it_finds(federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = in_process(capsys, "init", "--role", "client", "--modality", "t2")
    assert (code, "(north, south): say which with --site" in text) == (4, True)
    assert in_process(capsys, "init", "--role", "client", "--modality", "t2", "--site", "south")[0] == 0
    written = tomllib.loads((federation / "peer.toml").read_text())
    assert written["tls"]["key"] == "pki/south.key"
    assert written["policy"]["coordinators"] == ["hub"]
    code, text = in_process(capsys, "init", "--role", "coordinator")
    assert (code, "exists and is not overwritten" in text) == (4, True)
    assert in_process(capsys, "init", "--role", "coordinator", "--convention", "msd", "--force")[0] == 0
    (federation / "labels").mkdir()
    (federation / "labels" / "p1.nii.gz").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = f"network.listen=tcp://127.0.0.1:{probe.getsockname()[1]}"
    assert in_process(capsys, "config", "check", "--set", free)[0] == 0
    (federation / "hub").mkdir()
    assert in_process(capsys, "init", "--role", "coordinator", "--output", "hub/peer.toml")[0] == 0
    assert tomllib.loads((federation / "hub" / "peer.toml").read_text())["tls"]["ca"] == "../pki/ca.crt"
    code, text = in_process(
        capsys, "init", "--role", "client", "--modality", "t1", "--pki", "none", "--force"
    )
    assert (code, "none: no certificate of client" in text) == (4, True)
    given = ("--pki", "none", "--site", "a", "--federation", "f", "--force")
    assert in_process(capsys, "init", "--role", "client", "--modality", "t1", *given)[0] == 0


def test_init_job(federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(capsys, "init", "job", "--site", "north=T1", "--site", "south=FLAIR")[0] == 0
    assert in_process(capsys, "config", "check", "job.toml") == (0, "")
    assert in_process(capsys, "init", "job", "--output", "empty.toml")[0] == 0
    code, text = in_process(capsys, "config", "check", "empty.toml")
    assert code == 4
    assert "[sites]" in text
    assert in_process(capsys, "config", "check", "job.toml", "--set", "job.seed=1")[0] == 4


def test_init_job_of_a_site_with_several_modalities(
    federation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = ("--site", "north=T1", "--site", "south=ct", "--site", "north=mr")
    assert in_process(capsys, "init", "job", *sites)[0] == 0
    written = tomllib.loads((federation / "job.toml").read_text())
    assert written["sites"] == {"north": ["t1", "mr"], "south": "ct"}
    assert in_process(capsys, "config", "check", "job.toml") == (0, "")
    code, text = in_process(capsys, "init", "job", *sites, "--site", "north=T1", "--force")
    assert (code, "name each modality of a site once" in text) == (4, True)


def test_config_check_shows_seats_and_what_no_step_will_use(
    federation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (federation / "job.toml").write_text(
        '[job]\nname = "j"\n[sites]\na = ["t1", "t2"]\nb = ["flair", "t1"]\n[seats]\nmr = ["t1", "t2"]\n'
    )
    with pytest.raises(SystemExit) as left:
        main(["config", "check", "job.toml"])
    shown = capsys.readouterr()
    assert left.value.code == 0
    assert "; seats flair, mr (t1, t2)" in shown.out
    assert "b holds t1, which only counts together with t2 (seat mr): remove it, or add t2" in shown.err
    with pytest.raises(SystemExit):
        main(["config", "check", "--json", "job.toml"])
    assert [one["level"] for one in json.loads(capsys.readouterr().out)] == ["ok", "warning"]


def test_pki_shows_and_revokes(federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pki", "show", "--json", "pki/hub.crt"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["uri"] == ["spiffe://demo/splitproto/coordinator/hub"]
    assert shown["hosts"] == ["localhost"]
    assert in_process(capsys, "pki", "show", "pki/hub.crt") == (0, "")
    assert in_process(capsys, "pki", "revoke", "--site", "north")[0] == 0
    assert (federation / "pki" / "ca.crl").exists()
    assert in_process(capsys, "pki", "issue", "--role", "client", "--site", "north")[0] == 0
    assert in_process(capsys, "pki", "crl", "--days", "7")[0] == 0


def test_a_hospital_requests_and_the_ca_signs(federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def out(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        said = capsys.readouterr()
        assert left.value.code == code, said.err
        return said.out + said.err

    given = ("--role", "client", "--site", "west", "--federation", "demo", "--dir", "west")
    (mine,) = [line for line in out("pki", "request", *given).splitlines() if line.startswith("fingerprint")]
    sign = ("pki", "sign", "west/west.csr")
    said = out(*sign, code=4)
    assert mine in said.splitlines()
    assert "give what the site read with --fingerprint" in said
    assert "the fingerprint is another" in out(*sign, "--fingerprint", "00" * 32, code=4)
    assert not (federation / "pki/west.crt").exists()
    assert "client west of federation demo, EC secp256r1" in out(
        *sign, "--fingerprint", mine.partition("  ")[2]
    )
    assert "the name west is taken" in out(*sign, "--fingerprint", mine.partition("  ")[2], code=4)
    assert not (federation / "pki/west.key").exists()
    shown = out("pki", "show", "pki/ca.crl")
    assert "next_update" in shown
    assert "client/west" in out("pki", "show", "west/west.csr")


def test_a_revocation_list_is_configured_by_default(
    federation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("init", "--role", "client", "--modality", "t1", "--site", "north")
    assert in_process(capsys, *given)[0] == 0
    assert tomllib.loads((federation / "peer.toml").read_text())["tls"]["crl"] == "pki/ca.crl"
    code, text = in_process(capsys, *given, "--force", "--no-crl")
    assert (code, "revoked certificates are not refused" in text) == (0, True)
    assert "crl" not in tomllib.loads((federation / "peer.toml").read_text())["tls"]


def test_a_site_may_hold_several_modalities(federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("init", "--role", "client", "--site", "north", "--modality", "T2", "--modality")
    assert in_process(capsys, *given, "adc")[0] == 0
    assert tomllib.loads((federation / "peer.toml").read_text())["peer"]["modality"] == ["t2", "adc"]
    code, text = in_process(capsys, *given, "T2w", "--force")
    assert (code, "--modality t2 t2: name each once" in text) == (4, True)
    for some, words in ((("t2",), "says adc, t2"), (("adc", "t2"), "certificate")):
        flags = [f"--modality={modality}" for modality in some]
        code, text = in_process(capsys, "serve", "--set=tls.certificate=nowhere.crt", *flags)
        assert code == 4
        assert words in text


def test_what_is_set_holds_where_its_flag_is_not_given(federation: Path) -> None:
    """`serve` passes its flags to `load_peer`, also those that were not given."""
    from splitpeer.cli.options import load_peer

    with pytest.raises(SystemExit):
        main(["init", "--role", "client", "--modality", "t1", "--site", "north"])
    file = federation / "peer.toml"
    loaded = load_peer(
        file, ("runtime.device=cuda", "capture.key=k"), {"runtime.device": None, "capture.key": None}
    )
    assert (loaded.runtime.device, loaded.capture.key) == ("cuda", Path.cwd() / "k")
    assert load_peer(file, (), {"runtime.device": "auto"}).runtime.device == "auto"
    with pytest.raises(errors.ConfigError, match=r"--set runtime\.device and the flag for it are both given"):
        load_peer(file, ("runtime.device=cuda",), {"runtime.device": "cpu"})


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("serv",), 4, "No such command 'serv'"),
        (("pki", "init"), 4, "Missing option '--federation'"),
        (("pki", "init", "--federation", "Démo"), 4, "is not a name"),
        (("pki", "issue", "--role", "client", "--site", "Charité"), 4, "write 'charite'"),
        (("pki", "request", "--role", "client", "--site", "A b", "--federation", "demo"), 4, "write 'a-b'"),
        (("pki", "revoke", "--site", "../x"), 4, "is not a name"),
        (("pki", "sign", "none.csr"), 4, "no such certificate request"),
        (("pki", "sign", "pki/north.crt"), 4, "not a PEM certificate request"),
        (("pki", "show", "pki/federation.salt"), 4, "not a PEM certificate"),
        (("pki", "init", "--federation", "demo"), 4, "exists and is not overwritten"),
        (("pki", "issue", "--role", "king", "--site", "a"), 4, "'king' is not one of"),
        (("pki", "issue", "--role", "client", "--site", "north"), 4, "exists and is not overwritten"),
        (("pki", "issue", "--role", "client", "--site", "a", "--dir", "none"), 4, "no CA here"),
        (("pki", "issue", "--role", "client", "--site", "a", "--days", "0"), 4, "0 is not in the range"),
        (("pki", "issue", "--role", "coordinator", "--site", "b"), 4, "give it with --host"),
        (("pki", "issue", "--role", "coordinator", "--site", "b", "--host", "a:1"), 4, "neither a DNS name"),
        (("pki", "issue", "--role", "coordinator", "--site", "b", "--host", "a..b"), 4, "neither a DNS name"),
        (("pki", "show", "pki/hub.key"), 4, "not a PEM certificate"),
        (("pki", "show", "none.crt"), 4, "no such certificate"),
        (("pki", "revoke", "--site", "nobody"), 4, "no such certificate"),
        (("init",), 4, "Missing option '--role'"),
        (("init", "--role", "client"), 4, "--modality is for clients"),
        (("init", "--role", "client", "--modality", "c t"), 4, "'c t' is not a valid name of a modality"),
        (("init", "job", "--site", "north"), 4, "SITE=MODALITY"),
        (("init", "job", "--site", "A=t1"), 4, "is not a name"),
        (("config", "check"), 4, "no peer.toml"),
        (("config", "check", "none.toml"), 4, "no such file"),
        (("config", "check", "--set", "x"), 4, "section.key=value"),
    ],
)
def test_every_mistake_is_one_line(
    federation: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(federation))
    found, text = in_process(capsys, *arguments)
    assert (found, len(text.splitlines())) == (code, 1), text
    assert words in text
    assert text.startswith("splitpeer: ")


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = in_process(capsys)
    assert code == 4
    assert "Usage: splitpeer" in text


def test_version_and_help(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    helped = run("--help").stdout
    assert "Exit codes: 0 ok" in helped
    for command in ("init", "pki", "config", "data", "serve", "demo"):
        assert f"\n  {command} " in helped
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"splitpeer {splitproto.__version__}\n"


def test_light_commands_import_no_torch(tmp_path: Path) -> None:
    """Seconds of waiting, and hundreds of MiB on a machine that only keeps certificates."""
    program = """
import sys
from splitpeer.cli import main
for arguments in ("--help", "pki init --federation demo", "init --help", "init job", "config show job.toml"):
    try:
        main(arguments.split())
    except SystemExit as left:
        heavy = {"torch", "monai", "nibabel"} & set(sys.modules)
        if heavy:
            sys.exit(f"{arguments} imported {heavy}")
print("light")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("light\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such-command"]])
def test_help_imports_click_and_little_else(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom splitpeer.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n"
        "    print(*{'numpy', 'cryptography', 'msgpack', 'pydantic', 'rich', 'ssl', 'zmq'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.splitlines()[-1:] == [""]


def test_the_light_installation_says_what_is_missing() -> None:
    program = (
        "import sys\n"
        "class NoClick:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click': raise ModuleNotFoundError('no click', name='click')\n"
        "sys.meta_path.insert(0, NoClick())\n"
        "from splitpeer.cli import main\nmain(['--version'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 4
    assert done.stderr == (
        "splitpeer: the command line needs the package click: in the clone, pip install '.[peer]'\n"
    )


# ---- exceptions and exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.JobFailed("x"), 1),
        (errors.ConnectionRefused("x"), 2),
        (errors.DeadlinePassed("x"), 3),
        (errors.ConfigError("x"), 4),
        (errors.DataError("x"), 4),
        (wire.IdentityError("x"), 2),
        (wire.NotAuthorised("x"), 2),
        (wire.SecureChannelError("x"), 2),
        (wire.LinkLost("x"), 2),
        (wire.VersionMismatch("x"), 2),
        (wire.PolicyRefused("x"), 1),
        (wire.DeadlineExceeded("x"), 3),
        (wire.InternalError("x"), 5),
        (wire.RemoteError(wire.NotAuthorised.code, "x"), 2),
        (wire.RemoteError(wire.Misaligned.code, "x"), 1),
        (PkiError("x"), 4),
        (KeyError("x"), 5),
    ],
)
def test_exit_codes(error: Exception, code: int) -> None:
    assert exit_code(error) == code


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Makes `splitpeer demo` do what the test wants."""
    import types

    import click

    from splitpeer.cli import root

    def install(action: Callable[[], object]) -> None:
        module = types.ModuleType("failing_command")
        module.command = click.Command("demo", callback=action)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "failing_command", module)
        monkeypatch.setitem(root.COMMANDS, "demo", ("failing_command:command", "Fails."))

    return install


def test_a_bug_is_called_a_bug(
    failing: Callable[[Callable[[], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def crash() -> None:
        raise KeyError("patient Smith")

    failing(crash)
    code, text = in_process(capsys, "demo")
    assert code == 5
    assert len(text.splitlines()) == 1
    assert "internal error: KeyError" in text
    assert "this is a bug, please report it" in text
    assert "Smith" not in text, "messages of unforeseen errors may hold anything"
    code, text = in_process(capsys, "--debug", "demo")
    assert (code, "Traceback" in text) == (5, True)


def test_what_a_task_group_wraps_keeps_its_code(
    failing: Callable[[Callable[[], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    async def wait() -> None:
        raise errors.DeadlinePassed("site north did not answer in 120 s: look at its log")

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(wait())
            group.create_task(asyncio.sleep(60))

    failing(lambda: asyncio.run(both()))
    assert in_process(capsys, "demo") == (
        3,
        "splitpeer: site north did not answer in 120 s: look at its log\n",
    )


def test_a_command_may_return_its_exit_code(
    failing: Callable[[Callable[[], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(lambda: 3)
    assert in_process(capsys, "demo") == (3, "")


def test_a_command_whose_package_is_not_installed(
    failing: Callable[[Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from splitpeer.cli import root

    monkeypatch.setitem(root.COMMANDS, "demo", ("no_such_package.cli:demo", ""))
    code, text = in_process(capsys, "demo")
    assert code == 4
    assert "splitpeer demo needs the package no_such_package: in the clone, pip install" in text


def test_an_interrupt_is_130(tmp_path: Path) -> None:
    program = (
        # A test run in the background inherits an ignored SIGINT.
        "import signal, sys, time, types, click\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from splitpeer.cli import main, root\n"
        "def wait():\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "sys.modules['waiting'] = types.SimpleNamespace(command=click.Command('demo', callback=wait))\n"
        "root.COMMANDS['demo'] = ('waiting:command', '')\nmain(['demo'])"
    ).replace(
        "from splitpeer.cli import main, root",
        "from splitpeer.cli import main\nimport splitpeer.cli.root as root",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 130
    assert text.strip() == "splitpeer: interrupted"


def test_data_check_reads_a_folder_and_names_what_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import nibabel
    import numpy as np

    def check(code: int) -> str:
        with pytest.raises(SystemExit) as left:
            main(("data", "check", str(tmp_path)))
        assert left.value.code == code
        return capsys.readouterr().out

    image = nibabel.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4))
    nibabel.save(image, tmp_path / "one.nii.gz")
    assert "usable" in check(0)
    whole = (tmp_path / "one.nii.gz").read_bytes()
    (tmp_path / "two.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert "two.nii.gz" in check(4)


TASK = """
[job]
name = "liver"
[sites]
north = "ct"
[task]
values = { liver = 1, lesion = 2 }
[task.normalisation]
ct = "window:-100,300"
"""


def test_data_check_reads_masks_and_images_as_a_job_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import nibabel
    import numpy as np

    def check(code: int, *arguments: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as left:
            main(("data", "check", *arguments))
        said = capsys.readouterr()
        assert left.value.code == code, said
        return said.out, said.err

    (tmp_path / "job.toml").write_text(TASK)
    job, masks, images = ("--job", str(tmp_path / "job.toml")), tmp_path / "labels", tmp_path / "ct"
    mask, flat = np.tile(np.uint8([0, 1, 2, 2]), (8, 8, 2)), np.full((8, 8, 8), 40.0, np.float32)
    for folder, voxels in ((masks, mask), (images, flat)):
        folder.mkdir()
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / "one.nii.gz")
    _, error = check(4, str(masks), "--convention", "task")
    assert (
        error
        == 'splitpeer: convention "task" says that the masks hold the values of a job: add --job job.toml\n'
    )
    out, _ = check(0, str(masks), "--convention", "task", *job)
    assert "usable" in out and "liver" in out and "lesion" in out
    nibabel.save(nibabel.Nifti1Image(mask + np.uint8(1), np.eye(4)), masks / "two.nii.gz")
    out, _ = check(4, str(masks), "--convention", "task", *job)
    assert "label value(s) 3 are not in the job's [task]" in out
    _, error = check(4, str(masks), "--convention", "msd", *job)
    assert error.count("\n") == 1 and 'write convention = "task"' in error
    # Hounsfield units need no background of zeros.
    assert "background included" in check(0, str(images), "--modality", "ct")[0]
    assert "background included" not in check(0, str(images), "--modality", "ct", *job)[0]


def test_data_check_without_a_folder_takes_the_settings_and_the_job(
    federation: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import nibabel
    import numpy as np

    monkeypatch.setattr(machine, "_synchronised", lambda: True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    given = ("--role", "coordinator", "--convention", "task", "--listen", listen)
    (federation / "labels").mkdir()
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[2:4, 2:4, 2:4] = 2
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), federation / "labels" / "one.nii.gz")
    assert in_process(capsys, "init", *given)[0] == 0
    (federation / "job.toml").write_text(TASK)
    code, text = in_process(capsys, "data", "check")
    assert (code, "add --job job.toml" in text) == (4, True)
    # As a hospital has it that has prepared its images and not joined yet.
    (federation / "early.toml").write_text('[prepare]\nids = "ids.csv"\n')
    code, text = in_process(capsys, "data", "check", "--config", "early.toml")
    assert (code, "role is missing" in text, "needs no peer.toml: data check FOLDER" in text) == (
        4,
        True,
        True,
    )
    assert in_process(capsys, "data", "check", "--job", "job.toml")[0] == 0
