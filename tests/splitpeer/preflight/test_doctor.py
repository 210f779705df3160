"""`splitpeer doctor` names the cause in each of these broken set-ups, and finds nothing wrong with good ones."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from splitpeer.cli import main
from splitpeer.daemon import lock as state_lock
from splitpeer.preflight import machine
from splitpeer.settings.loading import to_toml
from splitproto import AllowList, Credentials, Listener, pki
from tests.splitpeer.preflight.institution import BOTH, Form, Institution

NOW = datetime.now(UTC)


@dataclass
class Setup:
    """A site north, whose files are right until a test spoils them."""

    folder: Path
    patch: pytest.MonkeyPatch
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def pki(self) -> Path:
        return self.folder / "pki"

    def be_a_coordinator(self, hosts: tuple[str, ...] = ("localhost", "127.0.0.1")) -> None:
        pki.issue(self.pki, "coordinator", "hub", hosts=hosts, now=NOW)
        self.sections["peer"] |= {"role": "coordinator", "site": "hub"}
        del self.sections["peer"]["modality"]
        del self.sections["policy"]
        self.sections["tls"] |= {"certificate": "pki/hub.crt", "key": "pki/hub.key"}
        self.sections["network"] = {"listen": f"tcp://127.0.0.1:{free_port()}"}
        self.sections["data"] = {"labels": "images", "convention": "msd", "salt": "pki/federation.salt"}

    def write(self) -> None:
        (self.folder / "peer.toml").write_text(to_toml(self.sections))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("SPLITPEER_") or name.lower() in ("https_proxy", "all_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "_synchronised", lambda: True)
    pki.create_ca(tmp_path / "pki", "demo", now=NOW)
    pki.issue(tmp_path / "pki", "client", "north", now=NOW)
    (tmp_path / "images").mkdir()
    voxels = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "images" / "p1.nii.gz")
    made = Setup(tmp_path, monkeypatch)
    made.sections = {
        "peer": {"role": "client", "site": "north", "federation": "demo", "modality": "t1"},
        "tls": {
            "ca": "pki/ca.crt",
            "certificate": "pki/north.crt",
            "key": "pki/north.key",
            "crl": "pki/ca.crl",
        },
        "network": {"coordinator": f"tcp://127.0.0.1:{free_port()}"},
        "data": {"images": "images", "salt": "pki/federation.salt"},
        "policy": {"coordinators": ["hub"]},
    }
    return made


def doctor(
    capsys: pytest.CaptureFixture[str], *arguments: str, command: tuple[str, ...] = ("doctor",)
) -> tuple[int, list[dict[str, Any]]]:
    with pytest.raises(SystemExit) as left:
        main([*command, "--json", *arguments])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert isinstance(left.value.code, int)
    return left.value.code, json.loads(said.out)


def problems(findings: list[dict[str, Any]]) -> list[str]:
    return [f"{f['check']}: {f['text']}" for f in findings if f["level"] == "problem"]


# ---- set-ups that are right


def test_nothing_is_wrong_with_a_new_site(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    setup.write()
    code, findings = doctor(capsys, "--offline")
    assert (code, {finding["level"] for finding in findings}) == (0, {"ok"}), findings
    assert [f["check"] for f in findings] == ["settings", "certificate", "salt", "data", "disk", "clock"]


def test_a_site_that_holds_several_modalities(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is looked for; a folder whose names do not tell them apart is a problem."""
    setup.sections["peer"]["modality"] = ["t1", "t2"]
    setup.write()
    (problem,) = problems(doctor(capsys, "--offline")[1])
    assert "p1.nii.gz: its name does not say whether it is t1 or t2" in problem
    for modality in ("t1", "t2"):
        (setup.folder / "images" / modality).mkdir()
        shutil.copy(setup.folder / "images" / "p1.nii.gz", setup.folder / "images" / modality)
    (setup.folder / "images" / "p1.nii.gz").rename(setup.folder / "images" / "t2" / "p2.nii.gz")
    code, findings = doctor(capsys, "--offline")
    told = [finding["text"] for finding in findings if finding["check"] == "data"]
    assert code == 0
    assert [text.rpartition(": ")[2].partition(";")[0] for text in told] == [
        "1 patients of t1",
        "2 patients of t2",
    ]


def test_the_file_of_first_weights(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    setup.sections["model"] = {"weights": {"t1": "t1.safetensors"}}
    setup.write()

    def said() -> tuple[int, str, str]:
        code, found = doctor(capsys, "--offline")
        (finding,) = [one for one in found if one["check"] == "weights"]
        return code, finding["level"], finding["text"].rpartition("safetensors: ")[2]

    assert said() == (
        4,
        "problem",
        "no such file: make it with splitpeer pretrain, or correct [model] weights",
    )
    path = setup.folder / "t1.safetensors"
    path.write_bytes(b"")
    assert said() == (0, "ok", str(path))


def test_the_list_of_withdrawn_patients(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    setup.sections["data"]["withdrawn"] = "withdrawn.txt"
    setup.write()

    def said() -> tuple[str, str]:
        (finding,) = [one for one in doctor(capsys, "--offline")[1] if one["check"] == "consent"]
        return finding["level"], finding["text"].rpartition("withdrawn.txt: ")[2]

    assert said() == ("warning", "does not exist yet: nobody has withdrawn consent")
    path = setup.folder / "withdrawn.txt"
    path.write_text("p1\n")
    assert said() == ("ok", "1 of 1 patients have withdrawn consent")
    path.write_text("P1\n")
    assert said() == (
        "warning", "1 of its ids belong to no patient here: compare the spelling",
    )  # fmt: skip
    path.write_bytes(b"\xff")
    assert said()[0] == "problem"


def test_nothing_is_wrong_with_a_new_coordinator(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    setup.be_a_coordinator()
    setup.write()
    code, findings = doctor(capsys)
    assert (code, problems(findings)) == (0, [])
    assert {"descriptors", "listen"} <= {finding["check"] for finding in findings}


@pytest.mark.parametrize("purposes", [BOTH, BOTH[:1]])
@pytest.mark.parametrize(
    ("ca", "chain"), [("root", "site middle"), ("root middle", "site"), ("root", "site root middle")]
)
def test_certificates_of_an_institutions_own_ca(
    setup: Setup, capsys: pytest.CaptureFixture[str], ca: str, chain: str, purposes: Any
) -> None:
    Institution.of(site=Form(purposes=purposes)).install(setup.pki, ca=ca, chain=chain)
    del setup.sections["tls"]["crl"]
    setup.write()
    code, findings = doctor(capsys, "--offline")
    assert (code, problems(findings)) == (0, [])
    assert any(f["check"] == "revocation" and f["level"] == "warning" for f in findings)


# ---- set-ups that are wrong: how, and what is said

Spoil = Callable[[Setup], object]
BROKEN: dict[str, tuple[Spoil, str]] = {}


def broken(said: str) -> Callable[[Spoil], Spoil]:
    """Add a set-up by its function's name."""

    def add(spoil: Spoil) -> Spoil:
        BROKEN[spoil.__name__] = (spoil, said)
        return spoil

    return add


def institution(setup: Setup, made: Institution, **where: str) -> None:
    made.install(setup.pki, **where)
    setup.sections["tls"].pop("crl")


@broken("pki/ca.crt holds")
def another_federations_ca(setup: Setup) -> None:
    pki.create_ca(setup.folder / "other", "elsewhere", now=NOW)
    (setup.pki / "ca.crt").write_bytes((setup.folder / "other/ca.crt").read_bytes())


@broken("has the right name but did not sign CN=north")
def a_ca_made_again_under_the_same_name(setup: Setup) -> None:
    pki.create_ca(setup.folder / "other", "demo", now=NOW)
    (setup.pki / "ca.crt").write_bytes((setup.folder / "other/ca.crt").read_bytes())


@broken("holds the intermediate CN=Institute Issuing CA but not its root CN=Institute Root CA")
def the_intermediate_only(setup: Setup) -> None:
    institution(setup, Institution.of(), ca="middle", chain="site")


@broken("our own certificate is number 2 in the file and must be the first")
def the_leaf_after_the_intermediate(setup: Setup) -> None:
    institution(setup, Institution.of(), chain="middle site")


@broken("if that issuer is an intermediate add its certificate to the end of the certificate file")
def the_intermediate_missing(setup: Setup) -> None:
    institution(setup, Institution.of(), chain="site")


@broken(
    "pki/ca.crt: CN=Institute Root CA has no keyUsage (in openssl: keyUsage = critical, keyCertSign, cRLSign) (the CA"
)
def a_root_without_key_usage(setup: Setup) -> None:
    institution(setup, Institution.of(root=Form(usage=False)))


@broken("pki/north.crt: CN=Institute Issuing CA has no keyUsage")
def an_intermediate_without_key_usage(setup: Setup) -> None:
    institution(setup, Institution.of(middle=Form(usage=False)))


@broken("CN=north has no authorityKeyIdentifier (in openssl: authorityKeyIdentifier = keyid) (yours")
def a_leaf_without_authority_key_identifier(setup: Setup) -> None:
    institution(setup, Institution.of(site=Form(identifiers=False)))


@broken("CN=Institute Root CA has a basicConstraints that is not critical")
def basic_constraints_that_are_not_critical(setup: Setup) -> None:
    institution(setup, Institution.of(root=Form(critical=False)))


@broken("was issued for another purpose (in openssl: extendedKeyUsage = clientAuth, serverAuth) (yours")
def a_certificate_for_mail(setup: Setup) -> None:
    institution(setup, Institution.of(site=Form(purposes=(ExtendedKeyUsageOID.EMAIL_PROTECTION,))))


def reissue(setup: Setup, **how: Any) -> None:
    for name in ("north.crt", "north.key"):
        (setup.pki / name).unlink()
    pki.issue(setup.pki, "client", "north", **how)


@broken("north.crt: CN=north,OU=client,O=demo expired on")
def an_expired_certificate(setup: Setup) -> None:
    reissue(setup, now=NOW - timedelta(days=60), days=30)


@broken("clock: ")
def a_certificate_that_is_not_yet_valid(setup: Setup) -> None:
    reissue(setup, now=NOW, not_before=NOW + timedelta(days=2))


@broken("the key does not belong to the certificate")
def the_key_of_another_certificate(setup: Setup) -> None:
    other = pki.issue(setup.pki, "client", "south", now=NOW)
    shutil.copy(other.key, setup.pki / "north.key")


@broken("others on this machine may read the private key: chmod 600")
def a_key_that_others_can_read(setup: Setup) -> None:
    (setup.pki / "north.key").chmod(0o640)


@broken("the private key has a passphrase")
def a_key_with_a_passphrase(setup: Setup) -> None:
    path = setup.pki / "north.key"
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"x"),
        )
    )


@broken("it is DER: convert it with openssl x509 -inform DER")
def a_certificate_in_der(setup: Setup) -> None:
    import ssl

    path = setup.pki / "north.crt"
    path.write_bytes(ssl.PEM_cert_to_DER_cert(path.read_text()))


@broken("no such file: put the CA certificate there")
def no_ca(setup: Setup) -> None:
    (setup.pki / "ca.crt").unlink()


@broken("ca.crl: outdated since")
def an_outdated_list(setup: Setup) -> None:
    pki.write_crl(setup.pki, now=NOW - timedelta(days=60), days=30)


@broken("ca.crl: is not yet valid")
def a_list_from_the_future(setup: Setup) -> None:
    pki.write_crl(setup.pki, now=NOW + timedelta(days=2))


@broken("which issued our certificate: fetch the list of that CA")
def another_cas_list(setup: Setup) -> None:
    pki.create_ca(setup.folder / "other", "elsewhere", now=NOW)
    shutil.copy(setup.folder / "other/ca.crl", setup.pki / "ca.crl")


@broken("the CA has revoked it")
def a_revoked_certificate(setup: Setup) -> None:
    kept = {name: (setup.pki / name).read_bytes() for name in ("north.crt", "north.key")}
    pki.revoke(setup.pki, "north", now=NOW)
    for name, data in kept.items():
        (setup.pki / name).touch(mode=0o600)
        (setup.pki / name).write_bytes(data)


@broken("[peer] site is 'south' but")
def another_sites_certificate(setup: Setup) -> None:
    setup.sections["peer"]["site"] = "south"


@broken("salt: ")
def a_salt_that_is_too_short(setup: Setup) -> None:
    (setup.pki / "federation.salt").write_text("00ff\n")


@broken("is not a folder: correct the path, or mount it")
def no_images(setup: Setup) -> None:
    shutil.rmtree(setup.folder / "images")


@broken("no NIfTI file (.nii or .nii.gz) found")
def an_empty_folder_of_images(setup: Setup) -> None:
    (setup.folder / "images/p1.nii.gz").unlink()


@broken("state: ")
def a_state_folder_that_is_a_file(setup: Setup) -> None:
    (setup.folder / "state").write_text("")


@broken("too little for a checkpoint: make room")
def a_full_disk(setup: Setup) -> None:
    class Full:
        free = machine.LEAST_DISK - 1

    setup.patch.setattr(machine.shutil, "disk_usage", lambda _: Full)


@broken("it was set back: set it")
def a_clock_that_was_set_back(setup: Setup) -> None:
    (setup.folder / "state").mkdir()
    (setup.folder / "state/status.json").touch()
    os.utime(setup.folder / "state/status.json", (time.time() + 7200,) * 2)


@broken("[polisy] is unknown: did you mean policy?")
def a_misspelt_section(setup: Setup) -> None:
    setup.sections["polisy"] = setup.sections.pop("policy")


@broken("names no host, and sites check the name that they dial")
def a_coordinator_without_a_host(setup: Setup) -> None:
    setup.be_a_coordinator(hosts=())


@broken("this machine has no such address: use one of its own, or tcp://*:7443")
def a_foreign_address(setup: Setup) -> None:
    setup.be_a_coordinator()
    setup.sections["network"]["listen"] = "tcp://192.0.2.7:7443"


@broken("open files are too few for a job: raise the limit")
def too_few_descriptors(setup: Setup) -> None:
    setup.be_a_coordinator()
    setup.patch.setattr(resource, "getrlimit", lambda _: (machine.LEAST_FILES - 1,) * 2)


@pytest.mark.parametrize("name", BROKEN)
def test_the_cause_is_named(setup: Setup, capsys: pytest.CaptureFixture[str], name: str) -> None:
    spoil, said = BROKEN[name]
    spoil(setup)
    setup.write()
    code, findings = doctor(capsys, "--offline")
    found = problems(findings)
    assert code == 4
    assert found, findings
    assert said in found[0]
    assert "\n" not in found[0]
    # `config check` judges alike, in one line.
    with pytest.raises(SystemExit) as left:
        main(["config", "check"])
    text = capsys.readouterr().err
    assert (left.value.code, len(text.splitlines())) == (4, 1), text
    # A check's name is shown by doctor alone.
    assert said.endswith(": ") or said in text


def test_there_are_twenty_of_them() -> None:
    assert len(BROKEN) >= 20


# ---- warnings


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: reissue(s, now=NOW, days=5), "ends in 5 days: renew it"),
        (lambda s: pki.write_crl(s.pki, now=NOW, days=5), "outdated in 5 days, then every peer is refused"),
        (
            lambda s: s.sections["tls"].pop("crl"),
            "no [tls] crl: a site that the CA has revoked is still let in",
        ),
        (
            lambda s: s.patch.setenv("HTTPS_PROXY", "http://proxy:3128"),
            "HTTPS_PROXY is set, but this program",
        ),
        (lambda s: s.patch.setenv("all_proxy", "socks5://proxy"), "all_proxy is set, but this program"),
        (
            lambda s: s.patch.setattr(machine, "_synchronised", lambda: False),
            "not kept in step with a time server",
        ),
        (lambda s: s.patch.setattr(machine, "WARN_DISK", 1 << 62), "which a run's checkpoints may fill"),
    ],
)
def test_a_warning_is_no_problem(
    setup: Setup, capsys: pytest.CaptureFixture[str], spoil: Spoil, said: str
) -> None:
    spoil(setup)
    setup.write()
    code, findings = doctor(capsys, "--offline")
    assert code == 0
    assert [f["text"] for f in findings if f["level"] == "warning" and said in f["text"]], findings
    with pytest.raises(SystemExit) as left:
        main(["config", "check"])
    assert (left.value.code, said in capsys.readouterr().err) == (0, True)


def test_few_descriptors_are_a_warning(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    setup.be_a_coordinator()
    setup.patch.setattr(resource, "getrlimit", lambda _: (256, 256))
    setup.write()
    code, findings = doctor(capsys)
    assert code == 0
    assert any("256 open files: strangers' idle connections" in f["text"] for f in findings)


def test_lines_for_people(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(setup.folder / "images")
    setup.write()
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--offline"])
    lines = capsys.readouterr().out.splitlines()
    assert left.value.code == 4
    assert [line.split()[:2] for line in lines[:3]] == [
        ["ok", "settings"],
        ["ok", "certificate"],
        ["ok", "salt"],
    ]
    assert lines[3].startswith("problem  data ")


def test_folders_are_listed_once(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    """A share with ten thousand files is slow to list."""
    setup.sections["data"]["withdrawn"] = "withdrawn.txt"
    (setup.folder / "withdrawn.txt").write_text("p1\n")
    setup.write()
    listed, find_all = [], machine.layouts.find_all

    def counted(*asked: Any) -> Any:
        listed.append(asked)
        return find_all(*asked)

    setup.patch.setattr(machine.layouts, "find_all", counted)
    code, findings = doctor(capsys, "--offline")
    assert code == 0 and len(listed) == 1
    (said,) = (f["text"] for f in findings if f["check"] == "consent")
    assert said.endswith("1 of 1 patients have withdrawn consent")


# ---- data check as a preflight


def test_data_check_without_a_folder_is_a_preflight(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    setup.write()
    with pytest.raises(SystemExit) as left:
        main(["data", "check"])
    said = capsys.readouterr().out
    assert left.value.code == 0, said
    assert "ok       salt" in said
    assert "usable" in said
    (setup.pki / "federation.salt").write_text("00\n")
    with pytest.raises(SystemExit) as left:
        main(["data", "check"])
    said = capsys.readouterr().err
    assert (left.value.code, "federation.salt" in said, len(said.splitlines())) == (4, True, 1)


# ---- dialling


@contextmanager
def coordinator(setup: Setup, *, sites: tuple[str, ...] = ("north",), hosts: tuple[str, ...] = ("127.0.0.1",),
                crl: bool = True, into: Path | None = None) -> Iterator[None]:  # fmt: skip
    """A listener in a thread of its own, where the site's peer.toml dials."""
    folder = into or setup.pki
    issued = pki.issue(folder, "coordinator", "hub", hosts=hosts, now=NOW)
    own = Credentials(issued.ca, issued.certificate, issued.key, folder / "ca.crl" if crl else None)
    up, done = threading.Event(), threading.Event()

    async def serve() -> None:
        allow = AllowList({"client": sites}, "job")
        async with Listener(setup.sections["network"]["coordinator"], own, allow, refused=lambda *_: None):
            up.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert up.wait(30)
        yield
    finally:
        done.set()
        thread.join()


def test_a_coordinator_that_lets_us_in(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    setup.write()
    with coordinator(setup):
        code, findings = doctor(capsys)
    assert (code, problems(findings)) == (0, [])
    assert "spiffe://demo/splitproto/coordinator/hub lets us in, TLSv1.3" in findings[-1]["text"]


def outdated_there(setup: Setup) -> Any:
    other = setup.folder / "hub"
    shutil.copytree(setup.pki, other)
    pki.write_crl(other, now=NOW - timedelta(days=60), days=30)
    return coordinator(setup, into=other)


@contextmanager
def a_web_server(setup: Setup) -> Iterator[None]:
    address = ("127.0.0.1", int(setup.sections["network"]["coordinator"].rpartition(":")[2]))
    with socket.create_server(address) as server:

        def answer() -> None:
            while True:
                try:
                    taken, _ = server.accept()
                except OSError:
                    return
                with taken, suppress(OSError):
                    taken.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    taken.recv(100)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


@contextmanager
def unknown_name(setup: Setup) -> Iterator[None]:
    setup.sections["network"]["coordinator"] = "tcp://no-such-hub.invalid:7443"
    setup.write()
    yield


@contextmanager
def nobody(setup: Setup) -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("scene", "said"),
    [
        (nobody, "nothing listens at 127.0.0.1"),
        (unknown_name, "the name no-such-hub.invalid is unknown"),
        (a_web_server, "is not ZeroMQ|listens there is not a coordinator|does not answer as a coordinator"),
        (lambda s: coordinator(s, sites=("south",)), "client 'north' is not on our allow-list"),
        (lambda s: coordinator(s, hosts=("hub.example",)), "does not name the address that we dialled"),
        (outdated_there, "by this clock: the fault is the list or the clock there"),
    ],
)
def test_what_is_wrong_with_the_other_side_or_the_way_is_exit_code_2(
    setup: Setup, capsys: pytest.CaptureFixture[str], scene: Any, said: str
) -> None:
    setup.write()
    with scene(setup):
        code, findings = doctor(capsys)
    assert code == 2
    assert [bool(re.search(said, text)) for text in problems(findings)] == [True], findings


def test_a_coordinator_that_we_do_not_list(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    setup.sections["policy"]["coordinators"] = ["charite"]
    setup.write()
    with coordinator(setup):
        code, findings = doctor(capsys)
    assert (code, "coordinator 'hub' is not on our allow-list" in problems(findings)[0]) == (2, True)


def test_a_running_daemon_keeps_its_link(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    setup.write()
    lock = state_lock.StateLock(setup.folder / "state")
    assert lock.take()
    try:
        code, findings = doctor(capsys)
    finally:
        lock.release()
    assert code == 0
    assert findings[-1]["text"].startswith("not dialled: the daemon runs")


# ---- the recipe of docs/running.md


def test_the_openssl_recipe_of_the_docs_makes_certificates_that_work(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    text = (Path(__file__).parents[3] / "docs/running.md").read_text()
    recipe = text.partition("<!-- recipe -->")[2].partition("```sh\n")[2].partition("```")[0]
    assert "openssl" in recipe
    subprocess.run(["bash", "-euc", recipe], cwd=setup.folder, check=True, capture_output=True)
    for name in ("ca.crt", "ca.crl", "north.crt", "north.key"):
        shutil.copy(setup.folder / name, setup.pki / name)
    (setup.pki / "north.key").chmod(0o600)
    setup.write()
    code, findings = doctor(capsys, "--offline")
    assert (code, problems(findings)) == (0, []), findings
