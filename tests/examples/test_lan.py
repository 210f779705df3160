"""examples/lan on one machine: three network namespaces, the committed settings, firewalls that hold."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest

from splitpeer.coordinator import coordinator
from splitpeer.coordinator.run_files import RunResult

LAN = Path(__file__).parents[2] / "examples" / "lan"
HOSTS = ("hub", "hospital-a", "hospital-b")
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PATIENTS": "4",
}

HARDENING = """\
User=splitpeer
StateDirectory=splitpeer
ProtectSystem=strict
NoNewPrivileges=yes
CapabilityBoundingSet=
SocketBindDeny=any
LimitCORE=0
Type=notify
NotifyAccess=main
WatchdogSec=60
Restart=on-failure
SuccessExitStatus=130""".splitlines()
PREVENT = {"hub": "1 2 4", "hospital-a": "2 4", "hospital-b": "2 4"}
"""Exit codes after which a restart does not help."""


def namespaces_can_be_made() -> bool:
    if os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "ss", "unshare")):
        return False
    made = subprocess.run(
        ["unshare", "--net", "--mount", "ip", "link", "add", "type", "veth"], capture_output=True
    )
    return made.returncode == 0


@pytest.mark.netns
@pytest.mark.timeout(300)
@pytest.mark.skipif(not namespaces_can_be_made(), reason="needs root, iproute2 and network namespaces")
def test_hospitals_in_namespaces_train_and_cannot_be_reached(tmp_path: Path) -> None:
    before = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    done = subprocess.run(
        [LAN / "netns.sh", tmp_path / "run"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for host in ("hospital-a", "hospital-b"):
        assert f"{host} " in done.stdout and "nothing listens" in done.stdout
        if shutil.which("nft"):
            assert "a port opened on purpose cannot be reached" in done.stdout
    result = json.loads((tmp_path / "run/hub/results/result.json").read_text())
    assert result["complete"] and result["step"] == 20 and result["tls"].startswith("TLSv1.3")
    events = [json.loads(line) for line in (tmp_path / "run/hospital-a/log").read_text().splitlines()]
    assert events[-1]["event"] == "job.complete"
    # Nothing of it is left on the machine.
    assert subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout == before
    assert not list(Path("/run/netns").glob("hospital-*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="about users who are not root")
def test_without_root_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [LAN / "netns.sh", tmp_path / "run"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (4, "netns.sh: needs root, to make network namespaces\n")


def test_the_hosts_files_agree_with_each_other() -> None:
    peers = {host: tomllib.loads((LAN / host / "peer.toml").read_text()) for host in HOSTS}
    sites = tomllib.loads((LAN / "hub/job.toml").read_text())["sites"]
    for host in HOSTS[1:]:
        assert sites[host] == peers[host]["peer"]["modality"]
        assert peers[host]["policy"]["coordinators"] == ["hub"]
        assert "listen" not in peers[host]["network"]
    port = peers["hub"]["network"]["listen"].rpartition(":")[2]
    for host in HOSTS:
        assert f"dport {port} accept" in (LAN / host / "firewall.nft").read_text()
        assert f"{port}" in (LAN / "hub/splitpeer.service").read_text()


@pytest.mark.parametrize("host", HOSTS)
def test_a_unit_is_one_that_systemd_understands_and_keeps_its_hardening(host: str, tmp_path: Path) -> None:
    text = (LAN / host / "splitpeer.service").read_text()
    for line in HARDENING:
        assert line in text.splitlines()
    assert f"RestartPreventExitStatus={PREVENT[host]}" in text.splitlines()
    stop = float(re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)[1])
    assert stop > coordinator.DRAIN_S + coordinator.STRAGGLER_S + coordinator.HEARD_S + coordinator.SAVE_S
    assert ("SocketBindAllow=tcp:7443" in text) == (host == "hub")
    if shutil.which("systemd-analyze") is None:
        return
    unit = tmp_path / "splitpeer.service"
    unit.write_text(text.replace("/opt/splitpeer/bin/splitpeer", "/bin/true"))
    seen = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (seen.returncode, seen.stderr) == (0, "")


def test_the_hub_does_not_start_again_when_its_run_is_complete(tmp_path: Path) -> None:
    text = (LAN / "hub/splitpeer.service").read_text()
    (condition,) = [line for line in text.splitlines() if line.startswith("ExecCondition=")]
    output = tomllib.loads((LAN / "hub/job.toml").read_text())["output"]["folder"]
    assert f"{output}/result.json" in condition
    # systemd takes the quotes off as a shell does; there are no escapes in between.
    assert not set(condition) & set('\\$%"')
    condition = condition.replace("/etc/splitpeer", str(tmp_path)).replace(output, str(tmp_path))
    command = shlex.split(condition.removeprefix("ExecCondition="))
    (tmp_path / "job.toml").write_text((LAN / "hub/job.toml").read_text())

    def starts() -> bool:
        return subprocess.run(command).returncode == 0

    assert starts()
    for complete in (False, True):
        (tmp_path / "result.json").write_text(
            json.dumps(asdict(RunResult("glioma", "", complete=complete)), indent=2)
        )
        assert starts() != complete
    with (tmp_path / "job.toml").open("a") as job:
        job.write("\n# [inference]\n")
        job.flush()
        assert not starts()
        job.write('[inference]\nserve = "after"\n')
    assert starts(), "a service ends with a reboot"


@pytest.mark.netns
@pytest.mark.skipif(not namespaces_can_be_made() or not shutil.which("nft"), reason="needs root and nft")
@pytest.mark.parametrize("host", HOSTS)
def test_a_firewall_loads_twice(host: str) -> None:
    rules = LAN / host / "firewall.nft"
    seen = subprocess.run(
        ["unshare", "--net", "sh", "-c", 'nft -f "$0" && nft -f "$0"', rules], capture_output=True, text=True
    )
    assert (seen.returncode, seen.stderr) == (0, "")
