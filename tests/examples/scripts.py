"""How the tests of `examples/` run their scripts, and compare them with what the README says."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def script(name: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """`run.sh FOLDER` of an example, with a port of its own."""
    environment = {**os.environ, "PATH": PATH, "PORT": str(free_port()), **environ}
    return subprocess.run(
        [EXAMPLES / name / "run.sh", folder], env=environment, capture_output=True, text=True
    )


def refuses_to_overwrite(name: str, folder: Path) -> bool:
    """Whether a run leaves a folder that is there alone, and says so in one line."""
    done = script(name, folder)
    said = f"run.sh: {folder} exists: remove it, or name another folder\n"
    return (done.returncode, done.stderr) == (4, said)


def commands(text: str, *verbs: str) -> set[tuple[str, ...]]:
    """The calls of `splitpeer VERB` (any, if none is named) in a README or a script, by their words."""
    text = text.replace('"$address"', "tcp://127.0.0.1:7443").replace('"$patients"', "8")
    wanted = rf"(?:{'|'.join(verbs)}) " if verbs else ""
    lines = re.findall(rf"^\s*(?:OMP_NUM_THREADS=1 )?(splitpeer {wanted}.*)$", text, flags=re.MULTILINE)
    return {tuple(shlex.split(re.sub(r" >.*", "", line))) for line in lines}
