"""A bundle's folder: written whole or not at all, and read again with every digest checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from splitpeer.errors import ConfigError, DataError
from splitpeer.export import papers
from splitpeer.export.configs import KEY, inference, metadata
from splitpeer.export.facts import whole
from splitpeer.export.half import DECODER, ENCODERS, MASKS, WHOLE, Half
from splitpeer.storage import durable, reading
from splitpeer.storage.checkpoint import MAX_BYTES

METADATA = "configs/metadata.json"
AGREEMENT = "agreement.json"
SCRIPTS = ("__init__.py", "inference.py", "network.py")
MAX_METADATA = 1 << 20
"""Bytes of metadata.json or agreement.json that are read."""


def refuse_existing(folder: Path) -> None:
    """Raises ConfigError: a bundle goes into a folder of its own."""
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder}: exists: name a new folder with --out, or move it away")


def write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write a bundle's files, all of mode 0600.

    Args:
        folder: a new one.
        contents: of all files by their paths in the bundle.

    Raises:
        ConfigError, DiskTrouble: it exists, or cannot be written; nothing stays.
    """
    refuse_existing(folder)
    part = folder.with_name(folder.name + durable.PART)
    try:
        shutil.rmtree(part, ignore_errors=True)
        for name, data in contents.items():
            durable.make_folder((part / name).parent)
            durable.replace(part / name, data)
        os.rename(part, folder)
        durable.sync_folder(folder.absolute().parent)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise durable.refusal(error, f"{folder}:", "--out") from None


def content(half: Half) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All files of a bundle by their paths, and its facts with the digests of the weights."""
    found = {
        name: safetensors.torch.save(
            {tensor: value.contiguous() for tensor, value in sorted(tensors.items())}, {"format": "pt"}
        )
        for name, tensors in half.weights.items()
    }
    facts = {
        **half.facts,
        "weights": {name: hashlib.sha256(data).hexdigest() for name, data in found.items()},
    }
    if facts["kind"] != MASKS:
        scripts = files("splitpeer.export.scripts")
        found |= {f"scripts/{name}": scripts.joinpath(name).read_bytes() for name in SCRIPTS}
        found["configs/inference.json"] = _json(inference(facts))
    found |= {
        METADATA: _json(metadata(facts)),
        "docs/README.md": papers.readme(facts, half.missing).encode(),
        "docs/data_license.txt": papers.data_license(facts).encode(),
        "LICENSE": papers.licence(facts).encode(),
    }
    return found, facts


def read(folder: Path) -> Half:
    """A half as `content` has it.

    Raises:
        DataError: no bundle of splitpeer export, or a file of it is missing, damaged or not the one that was written.
    """
    path = folder / METADATA
    try:
        facts = reading.document(path, MAX_METADATA)[KEY]
        kind, digests = facts["kind"], dict(facts["weights"])
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder}: no bundle of splitpeer export: it has no {METADATA}") from None
    except (OSError, ValueError, LookupError, TypeError):
        raise DataError(f"{path}: cannot be read, or is none of splitpeer export: export it again") from None
    if kind not in (ENCODERS, DECODER, MASKS, WHOLE):
        raise DataError(f"{path}: holds {str(kind)[:40]!r}, which this program does not know: update it")
    if not whole(facts):
        raise DataError(f"{path}: does not say all that a bundle of splitpeer export says: export it again")
    weights = {}
    for name, digest in digests.items():
        file = folder / name
        if not name.startswith("models/") or "/" in name[7:] or ".." in name:
            raise DataError(f"{path}: names weights outside models/: export it again")
        try:
            data = reading.read(file, MAX_BYTES)
            if hashlib.sha256(data).hexdigest() != digest:
                raise DataError(
                    f"{file}: is not the file that was exported (its digest differs): copy it again"
                )
            weights[name] = safetensors.torch.load(data)
        except (OSError, safetensors.SafetensorError):
            raise DataError(f"{file}: missing, unreadable or damaged: copy it again") from None
    return Half(facts, weights)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=4) + "\n").encode()
