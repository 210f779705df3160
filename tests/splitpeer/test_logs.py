"""One line per event, whatever is in it."""

from __future__ import annotations

import io
import json
import logging

from splitpeer.logs import event, setup

log = logging.getLogger("splitpeer.test")


def test_json_lines() -> None:
    stream = io.StringIO()
    setup("json", "info", stream)
    event(log, "link.refused", logging.WARNING, cause="certificate\nexpired", peer="hub", level="odd", n=3)
    log.debug("not heard")
    try:
        raise ValueError("x")
    except ValueError:
        log.exception("step %d failed", 7)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "warning",
        "event": "link.refused",
        "logger": "splitpeer.test",
        "cause": "certificate\nexpired",
        "peer": "hub",
        "level_": "odd",
        "n": 3,
    }
    assert second["message"] == "step 7 failed"
    assert "ValueError: x" in second["traceback"]


def test_text_lines() -> None:
    stream = io.StringIO()
    setup("text", "debug", stream)
    event(
        log, "step.done", logging.DEBUG, step=3, loss=0.123456789, note='two words "x"\nforged line', empty=""
    )
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert (
        line[9:]
        == r'debug   step.done step=3 loss=0.123457 note="two words \"x\"?forged line" empty=""' + "\n"
    )


def test_setup_again_replaces_and_keeps_libraries_quiet() -> None:
    first, second = io.StringIO(), io.StringIO()
    setup("text", "info", first)
    setup("text", "info", second)
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("of note")
    event(log, "once")
    assert first.getvalue() == ""
    assert "chatter" not in second.getvalue()
    assert second.getvalue().count("\n") == 2
