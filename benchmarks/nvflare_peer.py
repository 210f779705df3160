"""NVFlare's side of `peers.py`: cells of its F3 layer, as its own jobs use them, in an environment of its own.

    PYTHON nvflare_peer.py FOLDER PORT server     # takes orders from stdin, one JSON object a line
    PYTHON nvflare_peer.py FOLDER PORT site-1

FOLDER has the certificates. The scheme is `stcp`, TLS on a TCP socket with certificates on both sides: `grpcs` and
`satcp` were slower with nearly every message. Other settings are the defaults: larger chunks and windows of its streams
made no difference.

Three ways for tensors, of which peers.py takes the fastest for each message:

    tensors    a dict of torch tensors, by the TensorDecomposer; NVFlare fetches what is large by its download service
    stream     their octets in one payload, as a stream of chunks (`Cell.send_request`)
    message    their octets in one message, without streaming (`CoreCell.send_request`)
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.message import Message
from nvflare.fuel.utils import fobs

CHANNEL, WAIT_S = "benchmark", 120.0
FETCH, ASK, STEP = "fetch", "ask", "step"
TENSORS, STREAM, MESSAGE = "tensors", "stream", "message"
Shapes = dict[str, tuple[int, ...]]


def pack(way: str, arrays: tiny.Arrays) -> Any:
    """Arrays as the payload of one message."""
    if way == TENSORS:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    octets = [array.reshape(-1).view(np.uint8).data for array in arrays.values()]
    # One tensor needs no copy to be one payload; several do.
    return octets[0] if len(octets) == 1 else b"".join(octets)


def unpack(way: str, payload: Any, shapes: Shapes) -> tiny.Arrays:
    """The arrays of a payload, without a copy. Raises RuntimeError: they are not what was asked for."""
    if way == TENSORS:
        arrays = {name: tensor.numpy() for name, tensor in payload.items()}
    else:
        arrays, start = {}, 0
        for name, shape in shapes.items():
            count = int(np.prod(shape))
            arrays[name] = np.frombuffer(payload, np.float32, count, start).reshape(shape)
            start += 4 * count
    if {name: array.shape for name, array in arrays.items()} != shapes:
        raise RuntimeError("a message came with other tensors")
    return arrays


def cell(folder: Path, port: int, name: str) -> Any:
    """A cell with the certificate of `name`; the server's is that of the coordinator."""
    side, owner = ("server", "hub") if name == "server" else ("client", name)
    credentials = {
        "ca_cert": str(folder / "ca.crt"),
        f"{side}_cert": str(folder / f"{owner}.crt"),
        f"{side}_key": str(folder / f"{owner}.key"),
    }
    fobs.register(TensorDecomposer)
    return Cell(
        fqcn=name,
        root_url=f"stcp://127.0.0.1:{port}",
        secure=True,
        credentials=credentials,
        auth_identity_map={"server": "hub"},
    )


def answer_to(own: Any, topic: str, callback: Any) -> None:
    """Have requests answered, streamed ones and plain ones."""
    own.register_request_cb(channel=CHANNEL, topic=topic, cb=callback)
    own.core_cell.register_request_cb(channel=CHANNEL, topic=topic, cb=callback)


# --- a site -----------------------------------------------------------------------------------------------------


class Site:
    def __init__(self, name: str) -> None:
        self.name = name
        self.encoders: dict[tuple[str, str], tiny.Encoder] = {}
        self.kept: tuple[Shapes, tiny.Arrays] = ({}, {})

    def fetch(self, request: Any) -> Any:
        shapes: Shapes = json.loads(request.get_header("shapes"))
        if self.kept[0] != shapes:
            rng = np.random.default_rng(0)
            self.kept = (
                shapes,
                {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()},
            )
        return Message({}, pack(request.get_header("way"), self.kept[1]))

    def ask(self, request: Any) -> Any:
        return Message({}, bytes(request.payload))

    def step(self, request: Any) -> Any:
        """Gradients of the last step, if there was one, then the activations of the next: one message each way."""
        way, kind = request.get_header("way"), request.get_header("kind")
        encoder = self.encoders.get((way, kind))
        if encoder is None:
            encoder = self.encoders[way, kind] = tiny.Encoder(kind, self.name)
        else:
            encoder.backward(unpack(way, request.payload, tiny.SENT[kind]))
        return Message({}, pack(way, encoder.forward()))


# --- the coordinator -----------------------------------------------------------------------------------------------


class Hub:
    def __init__(self, own: Any) -> None:
        self.cell = own
        self.pool = ThreadPoolExecutor(len(tiny.SITES))
        self.decoders: dict[tuple[str, str], tuple[tiny.Decoder, dict[str, tiny.Arrays]]] = {}

    def send(self, way: str, topic: str, target: str, headers: dict[str, str], payload: Any) -> Any:
        """A request and its answer's payload. Raises RuntimeError: there was none."""
        request = Message(headers, payload)
        if way == MESSAGE:
            reply = self.cell.core_cell.send_request(CHANNEL, topic, target, request, timeout=WAIT_S)
        else:
            reply = self.cell.send_request(
                channel=CHANNEL, topic=topic, target=target, request=request, timeout=WAIT_S
            )
        if reply.payload is None:
            raise RuntimeError(f"no answer from {target}: {reply.headers}")
        return reply.payload

    def fetch(self, order: dict[str, Any]) -> dict[str, Any]:
        shapes = {name: tuple(shape) for name, shape in order["shapes"].items()}
        headers = {"way": order["way"], "shapes": json.dumps(shapes)}
        began = time.perf_counter()
        for _ in range(order["times"]):
            unpack(order["way"], self.send(order["way"], FETCH, "site-1", dict(headers), b"f"), shapes)
        return {"seconds": time.perf_counter() - began}

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        waits = []
        for _ in range(order["requests"]):
            began = time.perf_counter()
            self.send(order["way"], ASK, "site-1", {}, bytes(order["octets"]))
            waits.append(time.perf_counter() - began)
        return {"waits": waits}

    def train(self, order: dict[str, Any]) -> dict[str, Any]:
        way, kind = order["way"], order["kind"]
        decoder, gradients = self.decoders.get((way, kind)) or (tiny.Decoder(kind), {})

        def one(site: str) -> tiny.Arrays:
            payload = pack(way, gradients[site]) if gradients else b"f"
            got = self.send(way, STEP, site, {"way": way, "kind": kind}, payload)
            return unpack(way, got, tiny.SENT[kind])

        losses, began = [], time.perf_counter()
        for _ in range(order["steps"]):
            activations = dict(zip(tiny.SITES, self.pool.map(one, tiny.SITES), strict=True))
            loss, gradients = decoder.step(activations)
            losses.append(loss)
        self.decoders[way, kind] = decoder, gradients
        return {"seconds": time.perf_counter() - began, "losses": losses}


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    folder, port, name = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    own = cell(folder, port, name)
    if name == "server":
        here: set[str] = set()
        ready = threading.Event()

        def connected(agent: Any) -> None:
            here.add(agent.get_fqcn())
            if here >= set(tiny.SITES):
                ready.set()

        own.core_cell.set_cell_connected_cb(connected)
        own.start()
        if not ready.wait(WAIT_S):
            raise SystemExit(f"only {sorted(here)} connected within {WAIT_S:.0f} s")
        hub = Hub(own)
        orders = {"fetch": hub.fetch, "ask": hub.ask, "train": hub.train}
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            print(json.dumps(orders[order["do"]](order)), flush=True)
    else:
        site = Site(name)
        for topic, callback in ((FETCH, site.fetch), (ASK, site.ask), (STEP, site.step)):
            answer_to(own, topic, callback)
        own.start()
        sys.stdin.read()  # until peers.py closes it
    # Its threads would keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
