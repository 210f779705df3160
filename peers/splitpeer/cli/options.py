"""Options that several commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from splitpeer.daemon.observe import PeerHead
from splitpeer.data.layouts import LAYOUTS, checked_layout
from splitpeer.errors import ConfigError, DataError
from splitpeer.settings.loading import parse_override
from splitpeer.settings.peer import PeerConfig, find_peer_toml

FILE = click.Path(path_type=Path)
Command = TypeVar("Command", bound=Callable[..., Any])


class _Layout(click.ParamType[str]):
    name = "layout"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"{'|'.join(LAYOUTS)}|PATTERN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return checked_layout(value)
        except DataError as error:
            self.fail(str(error), param, ctx)


LAYOUT = _Layout()
"""A layout's name, or a pattern such as `{patient}/T1*.nii.gz`."""

config_option = click.option(
    "--config",
    "config_file",
    type=FILE,
    help="peer.toml; default: $SPLITPEER_CONFIG, ./peer.toml, ~/.config/splitpeer/peer.toml.",
)
heads_option = click.option(
    "--config",
    "config_files",
    type=FILE,
    multiple=True,
    help="peer.toml, also several; default: $SPLITPEER_CONFIG, ./peer.toml, ~/.config/splitpeer/peer.toml.",
)
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override one key of peer.toml; may be given several times.",
)
budget_option = click.option(
    "--budget",
    default=None,
    metavar="auto|N",
    help="Effort of attacks: auto doubles what their settings say while that gains .01; N: at most N times it (1: just "
    "that, and the report says so). Default: auto, or what sweep.toml says.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def peer_options(command: Command) -> Command:
    """`--config`, `--set` and `--json`, of commands that read one peer.toml and can answer programs."""
    return config_option(set_option(json_option(command)))


def load_peer(
    config_file: Path | None, settings: tuple[str, ...] = (), overrides: Mapping[str, Any] | None = None
) -> PeerConfig:
    """`peer.toml` as the command line wants it: `--config`, `--set`, and a command's own flags by section.key."""
    given = dict(parse_override(setting) for setting in settings)
    flags = {key: value for key, value in (overrides or {}).items() if value is not None}
    if twice := sorted(given.keys() & flags.keys()):
        raise ConfigError(f"--set {twice[0]} and the flag for it are both given: leave one out")
    return PeerConfig.load(find_peer_toml(config_file), given | flags)


def first_modality(config_file: Path | None) -> dict[str, str]:
    """By the site's name, the modality of its `peer.toml` that has its own defence key; {}: no file is named."""
    if config_file is None:
        return {}
    peer = load_peer(config_file).peer
    return {peer.site: peer.modalities[0]} if peer.modalities else {}


def load_heads(files: Sequence[Path], settings: tuple[str, ...] = ()) -> list[PeerHead]:
    """Who and where of each `peer.toml`; of the usual one where none is named. Raises ConfigError."""
    given = dict(parse_override(setting) for setting in settings)
    return [PeerHead.load(file, given) for file in files or (find_peer_toml(),)]


def private_files() -> None:
    """What this command writes holds patients' images or what was made of them: for its own user only."""
    before = os.umask(0o077)
    click.get_current_context().call_on_close(lambda: os.umask(before))


def write_new(path: Path, text: str, *, force: bool = False) -> None:
    """Write a text file that is not there yet. Raises ConfigError."""
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: exists and is not overwritten: move it away, or add --force") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def echo_json(value: object) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, indent=2))
