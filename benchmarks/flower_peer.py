"""Flower's side of `peers.py`: the ServerApp and ClientApp of a vertical split training, run by its own daemons.

As its example `vertical-fl` has it: the coordinator asks for activations and returns gradients. Two changes make a step
faster. Gradients of one step and the request for the next are one message, and the ServerApp looks for answers every
.05 s (`Grid.pull_messages`) instead of every 3 s (`Grid.send_and_receive`). A SuperNode starts a process for every
message, so a site's weights and optimiser go through the context's state, as in the example; one that has nothing to
do looks for messages every 3 s, and no setting changes that.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

WAIT_S, LOOK_S = 120.0, 0.05
# Flower looks for these assignments in the text.
server = ServerApp()
client = ClientApp()


def packed(arrays: tiny.Arrays) -> Any:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def unpacked(record: Any) -> tiny.Arrays:
    return {name: array.numpy() for name, array in record.items()}


def site(message: Any, context: Any) -> Any:
    """Gradients of the last step, if there was one, then the activations of the next."""
    name = list(tiny.SITES)[int(context.node_config["partition-id"])]
    encoder = tiny.Encoder(str(context.run_config["kind"]), name)
    if "state" in context.state:
        encoder.resume(unpacked(context.state["state"]))
        encoder.forward()  # its graph ended with the process
        encoder.backward(unpacked(message.content["gradients"]))
    activations = encoder.forward()
    context.state["state"] = packed(encoder.state())
    content = RecordDict({"activations": packed(activations), "from": ConfigRecord({"site": name})})
    return Message(content, reply_to=message)


def coordinator(grid: Any, context: Any) -> None:
    """All steps; writes their seconds and losses to the run's `out`."""
    decoder = tiny.Decoder(str(context.run_config["kind"]))
    ends = time.monotonic() + WAIT_S
    while len(nodes := list(grid.get_node_ids())) < len(tiny.SITES):
        if time.monotonic() > ends:
            raise RuntimeError(f"only {len(nodes)} nodes within {WAIT_S:.0f} s")
        time.sleep(LOOK_S)
    site_of: dict[int, str] = {}
    gradients: dict[str, tiny.Arrays] = {}
    seconds, losses = [], []
    for _ in range(int(context.run_config["steps"])):
        began = time.perf_counter()
        messages = []
        for node in nodes:
            kept = {"gradients": packed(gradients[site_of[node]])} if gradients else {}
            messages.append(Message(RecordDict(kept), dst_node_id=node, message_type="train.step"))
        activations = {}
        for node, content in answers(grid, messages):
            site_of[node] = str(content["from"]["site"])
            activations[site_of[node]] = unpacked(content["activations"])
        loss, gradients = decoder.step(activations)
        seconds.append(time.perf_counter() - began)
        losses.append(loss)
    Path(str(context.run_config["out"])).write_text(json.dumps({"seconds": seconds, "losses": losses}))


def answers(grid: Any, messages: list[Any]) -> list[tuple[int, Any]]:
    """Send the messages; (node, content) of each answer. Raises RuntimeError: one failed, or did not come."""
    awaited = set(grid.push_messages(messages))
    got, ends = [], time.monotonic() + WAIT_S
    while awaited:
        if time.monotonic() > ends:
            raise RuntimeError(f"no answer within {WAIT_S:.0f} s")
        for reply in grid.pull_messages(awaited):
            if reply.has_error():
                raise RuntimeError(f"a node failed: {reply.error}")
            awaited.discard(reply.metadata.reply_to_message_id)
            got.append((reply.metadata.src_node_id, reply.content))
        time.sleep(LOOK_S if awaited else 0)
    return got


client.train("step")(site)
server.main()(coordinator)
