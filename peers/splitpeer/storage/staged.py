"""Several files that appear together: each is made in a hidden folder beside its place, and moved when all are whole.

Moving takes no room, so a disk that fills up does so while nothing can be seen yet.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from splitpeer.errors import PeerError
from splitpeer.storage import durable

PREFIX = ".splitpeer-"


class Staged:
    """Files of one block: when it ends, they are all at their places; when it fails, none is.

    Older files are replaced only then. Lines of errors name the places.
    """

    def __init__(self) -> None:
        self._folders: dict[Path, Path] = {}
        self._places: dict[Path, Path] = {}
        self._stack = ExitStack()

    @property
    def written(self) -> list[Path]:
        """Where the files are for now, in the order of `at`."""
        return list(self._places)

    @property
    def final(self) -> list[Path]:
        """Where they will be."""
        return list(self._places.values())

    def at(self, path: Path) -> Path:
        """Where to write the file that will be at `path`, whose folder exists.

        Raises:
            ConfigError, DiskTrouble: the folder may not be written, or the disk is full.
        """
        parent = path.parent
        if parent not in self._folders:
            try:
                folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            except OSError as error:
                raise durable.refusal(error, str(path), "the folder") from None
            self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
            self._folders[parent] = folder
        for_now = self._folders[parent] / path.name
        self._places[for_now] = path
        return for_now

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if isinstance(error, PeerError):
                raise self._said(error) from None
            if error is None:
                self._move()

    def _move(self) -> None:
        path = Path()
        try:
            for for_now, path in self._places.items():
                os.replace(for_now, path)
            for path in self._folders:
                durable.sync_folder(path)
        except OSError as error:
            raise durable.refusal(error, str(path), "the folder") from None

    def _said(self, error: PeerError) -> PeerError:
        """The same error, naming the places."""
        text = str(error)
        for parent, folder in self._folders.items():
            text = text.replace(f"{folder}{os.sep}", f"{parent}{os.sep}" if parent != Path() else "")
            text = text.replace(f"{folder.name}{os.sep}", "")
        error.args = (text, *error.args[1:])
        return error
