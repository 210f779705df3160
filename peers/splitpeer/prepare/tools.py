"""Outside programs on one image: skull stripping, bias field. A command line, no shell, a deadline."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitpeer.data.files import Case
from splitpeer.data.geometry import Turn
from splitpeer.data.nifti import Rules, read_voxels
from splitpeer.errors import ConfigError, DataError
from splitpeer.prepare.nifti_file import write_image
from splitpeer.prepare.templates import IN, OUT


class ProgramFailed(DataError):
    """A program made no image of one that may be in order: nothing is said against the scan."""


def check_program(setting: str, template: str) -> None:
    """That the program of a template can be started. Raises ConfigError: it is missing, or may not be executed."""
    program = shlex.split(template)[0]
    if os.sep in program and not Path(program).is_absolute():
        # It is started in another folder.
        raise ConfigError(f"[prepare] {setting}: {program}: write its whole path")
    if shutil.which(program) is None:
        wrong = (
            "may not be executed: chmod +x" if Path(program).is_file() else "no such program: check the path"
        )
        raise ConfigError(f"[prepare] {setting}: {program}: {wrong}")


def run_tool(
    setting: str,
    template: str,
    volume: NDArray[np.float32],
    affine: NDArray[np.float64],
    folder: Path,
    deadline_s: float,
) -> NDArray[np.float32]:
    """What a program makes of an image, which it gets with its axes in RAS order, on the same grid.

    Args:
        setting: which one named it, for errors.
        template: see `checked`; the marks become NIfTI files in `folder`.
        volume, affine: float32 [x, y, z]; 4x4 to RAS millimetres.
        folder: only our user may enter it; emptied by the caller.
        deadline_s: then it is ended, and with it what it started.

    Raises:
        ProgramFailed: it could not be started, failed, was too slow, or made no image on this grid.
    """
    # The program starts in that folder.
    folder = folder.absolute()
    source, target = folder / "in.nii.gz", folder / "out.nii.gz"
    # In RAS order, whatever the scanner's slices: programs such as HD-BET want a head as the MNI template has it.
    x, y, z = volume.shape
    turn = Turn.of(affine)
    write_image(source, turn.voxels(volume), turn.grid((x, y, z), affine)[1])
    words = [word.replace(IN, str(source)).replace(OUT, str(target)) for word in shlex.split(template)]
    what = f"{setting}: {Path(words[0]).name}"
    try:
        # A session of its own, so that the deadline ends its children, too.
        process = subprocess.Popen(
            words, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise ProgramFailed(f"{what} cannot be started ({error.strerror}): check the path") from None
    try:
        _, said = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        raise ProgramFailed(
            f"{what} took longer than {deadline_s:g} s: raise deadline_s, or mend it"
        ) from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if process.returncode != 0:
        words_said = " ".join(said.decode("utf-8", "replace").split())[-200:]
        raise ProgramFailed(f"{what} failed with {process.returncode} ({words_said or 'it said nothing'})")
    return _result(what, target, volume, affine)


def _result(
    what: str, path: Path, volume: NDArray[np.float32], affine: NDArray[np.float64]
) -> NDArray[np.float32]:
    x, y, z = volume.shape
    turn = Turn.of(affine)
    shape, turned = turn.grid((x, y, z), affine)
    try:
        voxels, header = read_voxels(Case("image", path), Rules())
    except DataError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ProgramFailed(f"{what} wrote no usable image ({reason})") from None
    if header.shape != shape or not np.allclose(header.affine, turned, atol=0.01):
        raise ProgramFailed(f"{what} wrote an image on another grid: it must keep the grid of {IN}")
    if not voxels.any():
        raise ProgramFailed(f"{what} wrote an empty image")
    return np.ascontiguousarray(turn.stored(voxels))
