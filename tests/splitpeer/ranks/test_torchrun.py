"""What torchrun's variables say, and what is wrong with them, in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from splitpeer.errors import ConfigError
from splitpeer.ranks import group
from splitpeer.ranks.group import RankLost, device_of, within
from splitpeer.ranks.torchrun import Rank, own_rank
from tests.splitpeer.roles.scene import free_port

TWO = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "hub.example", "MASTER_PORT": "29500"}


def test_a_process_without_others_is_no_rank() -> None:
    assert own_rank({}) is None
    assert own_rank({"RANK": "0"}) is None
    assert own_rank({"WORLD_SIZE": "1"}) is None


def test_a_rank_is_what_torchrun_says() -> None:
    assert own_rank(TWO) == Rank(1, 2, 0, 1, "hub.example:29500")
    here = own_rank(TWO | {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    assert here == Rank(1, 2, 1, 2, "hub.example:29500")
    assert not here.leads
    assert own_rank(TWO | {"RANK": "0"}).leads
    assert own_rank(TWO | {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}).attempt == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"MASTER_ADDR": ""}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "WORLD_SIZE is 2, but MASTER_PORT is not set"),
        ({"RANK": ""}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "2"}, "RANK is '2', not a whole number from 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1', not a whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a whole number from 1 to 1024"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not"),
        ({"MASTER_PORT": "123456"}, "MASTER_PORT is '123456', not"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is '3', not"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is '1', not"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_fix(changed: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as raised:
        own_rank(TWO | changed)
    assert "torchrun --nproc-per-node" in str(raised.value)


@pytest.mark.parametrize("world", ["1", "2"])
def test_a_rendezvous_that_unpickles_what_strangers_send_is_refused(world: str) -> None:
    """`torchrun --standalone`, or without --master-port: who writes to torchrun's store has his code run by it."""
    drawn = {"WORLD_SIZE": world, "RANK": "0", "TORCHELASTIC_RUN_ID": "1fae1016-b31b-46ff-90bc-da4a3b74d468"}
    with pytest.raises(ConfigError, match=r"--master-addr 127\.0\.0\.1 --master-port 29500 instead"):
        own_rank(TWO | drawn)


def test_ranks_that_torchrun_starts_again_find_no_addresses_of_the_former_ones() -> None:
    """Its store outlives them: who connects to an address of before waits for nobody."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=100))
    script = (
        "from splitpeer.ranks import group; from splitpeer.ranks.torchrun import own_rank\n"
        "with group.Ranks(own_rank(), 60.0).met('x') as ranks: pass"
    )
    told = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "3",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    told |= {**TWO, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", script], env={**os.environ, **told, "RANK": n}) for n in "01"
    ]
    try:
        assert [rank.wait(100) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert {key.partition("/")[0] for key in store.list_keys()} == {"attempt 3"}


def test_ranks_of_one_machine_listen_on_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in (*names, "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    Rank(0, 2, 0, 1, "a:1").quieten()
    assert not os.environ.keys() & set(names)
    Rank(0, 2, 0, 2, "a:1").quieten()
    assert [os.environ[name] for name in names] == ["lo", "lo"]


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Rank(1, 2, 1, 2, "a:1")
    assert device_of(second, "cpu") == "cpu"
    monkeypatch.setattr(group.torch.cuda, "is_available", lambda: False)
    assert device_of(second, "auto") == "cpu"
    monkeypatch.setattr(group.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(group.torch.cuda, "device_count", lambda: 2)
    assert device_of(second, "auto") == device_of(second, "cuda") == "cuda:1"
    with pytest.raises(ConfigError, match='device "cuda:0" is one GPU for 2 ranks'):
        device_of(second, "cuda:0")
    monkeypatch.setattr(group.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 ranks for 1 GPUs"):
        device_of(second, "cuda")


def test_waiting_for_ranks_that_do_not_come_has_an_end() -> None:
    """Nobody listens there: torch itself waits far longer than it was told, and not for signals. Its thread must not
    abort the process that ends meanwhile."""
    script = (
        "from splitpeer.ranks import group; from splitpeer.ranks.torchrun import own_rank; group.JOIN_S = 1.0\n"
        "from splitpeer.cli.outcome import leave\n"
        "try:\n    group.Ranks(own_rank(), 1.0).met('x').__enter__()\n"
        "except group.RankLost as error: print(error); leave(error, 3)"
    )
    nobody = TWO | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCH_CPP_LOG_LEVEL": "FATAL",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **nobody},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.startswith("waited 1 s at most for all 2 ranks at 127.0.0.1:"), done.stderr
    assert done.stdout.count("\n") == 1
    assert (done.returncode, done.stderr) == (3, "")


def test_what_a_wait_raises_itself_is_passed_on() -> None:
    def refuse() -> None:
        raise ConfigError("no")

    def lose() -> None:
        raise RuntimeError("connection refused. More of it")

    assert within(5, lambda: 3, "it") == 3
    with pytest.raises(ConfigError, match="no"):
        within(5, refuse, "it")
    with pytest.raises(RankLost, match=r"for it \(connection refused\)$"):
        within(5, lose, "it")
