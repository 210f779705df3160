"""Batches for a client: windows of its own volumes, augmented, read ahead by one background thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, TypeVar, cast

import numpy as np

from splitpeer.data.augment import augment
from splitpeer.data.geometry import Triple
from splitpeer.data.volumes import Volumes
from splitpeer.defences.image.stack import ImageStack
from splitpeer.errors import DeadlinePassed
from splitproto.records import Sample

CLOSE_S = 5.0
"""How long closing waits for a read; after that the read is assumed to hang."""

Asked = TypeVar("Asked")
Made = TypeVar("Made")


class SiteData:
    """Turns named samples into arrays. Serves masks as well: `Volumes` with `labels` and `modality` None.

    `image_defences` act on each window before it is augmented.
    """

    def __init__(self, volumes: Volumes, image_defences: ImageStack | None = None) -> None:
        self.volumes, self.image_defences = volumes, image_defences

    def batch(
        self,
        samples: Sequence[Sample],
        window: Triple,
        seed: int | None,
        modality: str | None,
        *,
        places: Sequence[int] | None = None,
    ) -> np.ndarray:
        """The windows of `samples`, in order: float32 [B, 1, *spatial], for masks uint8 [B, regions, *spatial].

        `spatial` is `window` (x, y, z), or (x, y) where z is 1. `seed` None means no augmentation;
        `places` are those of the samples in the whole batch (SP-11.7-1), 0, 1, 2, ... where they are not said.
        Raises DataError that names the file.
        """
        arrays = []
        for place, sample in zip(range(len(samples)) if places is None else places, samples, strict=True):
            array = self.volumes.window(sample.key, sample.origin, window)
            if self.image_defences:
                shape = self.volumes.geometry(sample.key).shape
                array = self.image_defences.window(array, sample.key, sample.origin, shape)
            if window[2] == 1:
                array = array[..., 0]
            arrays.append(array if seed is None else augment(array, seed, place, modality))
        return np.stack(arrays)


class Prefetcher(Generic[Asked, Made]):
    """Calls `make` on each submitted request, in order, in one background thread, ahead of the caller. At
    most `depth` results are ready, and one more waits in the thread. `get` returns the results in the order
    of `submit`; an exception of `make` is raised by the corresponding `get`, and the thread continues. Use
    as a context manager, or call `close`.
    """

    _CLOSED = object()

    def __init__(self, make: Callable[[Asked], Made], *, depth: int = 2, pending: int = 64) -> None:
        self._make = make
        self._asked: queue.Queue[object] = queue.Queue(pending)
        self._ready: queue.Queue[tuple[Made | None, BaseException | None]] = queue.Queue(depth)
        self._closing = threading.Event()
        # A daemon: a network drive that hangs in read() must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def submit(self, asked: Asked, timeout: float) -> None:
        """Announce one request. Raises DeadlinePassed where `pending` others still wait after `timeout` s."""
        self._refuse_closed()
        try:
            self._asked.put(asked, timeout=timeout)
        except queue.Full:
            raise DeadlinePassed(
                f"{self._asked.maxsize} batches still wait to be read "
                f"after {timeout:g} s: announce fewer ahead"
            ) from None

    def get(self, timeout: float) -> Made:
        """The next result. Raises DeadlinePassed after `timeout` s, or what `make` raised."""
        self._refuse_closed()
        try:
            made, error = self._ready.get(timeout=timeout)
        except queue.Empty:
            raise DeadlinePassed(
                f"no batch was read within {timeout:g} s: check the disk, or allow more time"
            ) from None
        if error is not None:
            raise error
        return cast("Made", made)  # may be None, if `make` returns that

    def close(self, timeout: float = CLOSE_S) -> None:
        """Stop after the request in work; what was not fetched is dropped. Idempotent.

        A read that hangs is left behind after `timeout` s. Otherwise the thread is gone on return: one that wakes
        inside C++ code while the interpreter ends would abort the process.
        """
        self._closing.set()
        # Make room, so that a thread waiting to deliver continues, and wake one waiting for work.
        for waiting in (self._ready, self._asked):
            while not waiting.empty():
                try:
                    waiting.get_nowait()
                except queue.Empty:
                    break
        # If the queue is full again, the thread wakes anyway.
        with contextlib.suppress(queue.Full):
            self._asked.put_nowait(self._CLOSED)
        self._thread.join(timeout)

    def __enter__(self) -> Prefetcher[Asked, Made]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_closed(self) -> None:
        if self._closing.is_set():
            raise RuntimeError("the prefetcher is closed")

    def _work(self) -> None:
        while not self._closing.is_set():
            asked = self._asked.get()
            if asked is self._CLOSED:
                return
            try:
                result: tuple[Made | None, BaseException | None] = (self._make(cast("Asked", asked)), None)
            except Exception as error:
                # Nothing is swallowed: the reader raises it in its turn.
                result = (None, error)
            while not self._closing.is_set():
                try:
                    self._ready.put(result, timeout=0.5)
                    break
                except queue.Full:
                    continue
