"""How a command ends: exit codes and error lines, in one place for all commands.

0 ok; 1 job failed; 2 connection or authentication; 3 time-out; 4 usage or configuration; 5 a bug;
130 interrupted from the keyboard (128 + SIGINT, as shells do). Everything a user can cause is one line on
standard error; a traceback only with ``--debug``.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from splitpeer.cli.early import INTERRUPTED
from splitpeer.errors import PeerError
from splitproto.errors import DeadlineExceeded, InternalError, SplitprotoError, printable

_CONNECTION, _TIMEOUT, _USAGE, _BUG = 2, 3, 4, 5
_log = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> None:
    """Run one command and leave with its exit code. Never returns."""
    debug = "--debug" in arguments
    try:
        import click
    except ModuleNotFoundError as error:
        _say(f"the command line needs the package {error.name}: in the clone, pip install '.[peer]'")
        sys.exit(_USAGE)
    from splitpeer.cli.root import root

    try:
        # With standalone_mode off, click gives back the code of ctx.exit(), or what the command returned.
        result = root.main(list(arguments), prog_name="splitpeer", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.Abort as error:
        _say("interrupted")
        # click's own, raised from the KeyboardInterrupt.
        leave(error.__cause__ or error, INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(_USAGE)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        _say(f"{error.format_message()}{hint}")
        sys.exit(_USAGE)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        found = _first_known(error)
        code = exit_code(found)
        if code == _BUG:
            _log.debug("command.crashed", exc_info=error)
            hint = "" if debug else "; splitpeer --debug ... shows more"
            _say(f"internal error: {_where(found)}: this is a bug, please report it{hint}")
        else:
            _say(str(found))
        if debug:
            traceback.print_exception(error)
        leave(found, code)


def leave(error: BaseException, code: int) -> NoReturn:
    """End the process with this exit code, also where a thread hangs that would not let it."""
    if getattr(error, "hangs", False):
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def exit_code(error: BaseException) -> int:
    """The exit code of an exception; 5, a bug, for one that is not ours."""
    if isinstance(error, PeerError):
        return error.exit_code
    if not isinstance(error, SplitprotoError):
        return _BUG
    code = getattr(error, "code", None)
    if code is None:  # an error of the CA's folder, never on the wire
        return _USAGE
    if code == InternalError.code:
        return _BUG
    if code == DeadlineExceeded.code:
        return _TIMEOUT
    # 0x05xx: the two sides talk, but their job cannot continue.
    return 1 if code >> 8 == 0x05 else _CONNECTION


def _first_known(error: BaseException) -> BaseException:
    """A task group wraps what its tasks raise: the first that is not a bug speaks for all."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    inner = [_first_known(one) for one in error.exceptions]
    return next((one for one in inner if exit_code(one) != _BUG), inner[0])


def _where(error: BaseException) -> str:
    """Type and innermost place in our code. Not the message: it may contain anything, and may be logged."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/splitp" in f.filename]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return type(error).__name__ + place


def _say(text: str) -> None:
    # A peer may have written part of it: no terminal control gets through.
    print("splitpeer: " + printable(" ".join(text.split())), file=sys.stderr)
