"""From files to `Knowledge`: what an adversary is granted, each part named by the user who asks for the attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from splitpeer.attacks.base import Knowledge, View
from splitpeer.audit.cohort import Samples
from splitpeer.defences.network import build_network
from splitpeer.defences.specs import by_place
from splitpeer.errors import ConfigError
from splitpeer.models import Decoder, build_decoder
from splitpeer.storage import checkpoint

KINDS = {
    "weights": "checkpoint of the site's encoder, from the site's state folder",
    "initial": "checkpoint of step 0, where the coordinator handed the weights out",
    "decoder": "checkpoint of the coordinator",
    "shadow": "folder with similar images of other patients, a folder per modality",
}


def grant(
    view: View, files: Mapping[str, tuple[Path, ...]], others: Samples | None, *, queries: bool = False
) -> Knowledge:
    """What an adversary knows who is granted `files` (see `parse_knows`) and the patients `others`.

    Args:
        queries: it may only query the encoder, and does not see its weights.

    Raises:
        ConfigError, DataError: see `with_model`.
    """
    knowledge = Knowledge(queries=queries)
    for kind, paths in files.items():
        if kind == "weights":
            knowledge = with_model(knowledge, view, paths[-1])
            if len(paths) > 1:
                knowledge = with_models(knowledge, view, paths)
        elif kind == "initial":
            knowledge = with_model(knowledge, view, paths[-1], initial=True)
        elif kind == "decoder":
            knowledge = with_decoder(knowledge, view, paths[-1])
    return knowledge if others is None else with_shadow(knowledge, view, others)


def with_model(knowledge: Knowledge, view: View, path: Path, *, initial: bool = False) -> Knowledge:
    """Grant the weights of the site's encoder.

    Raises:
        ConfigError: the file holds another network than the capture's job names.
        DataError: it cannot be read.
    """
    tensors, meta, _ = checkpoint.read(path)
    model = _encoder(view, _parameters(tensors, view), path)
    if initial:
        return replace(knowledge, initial_model=model)
    return replace(knowledge, model=model, weights_step=int(meta.get("step", 0)))


def with_models(knowledge: Knowledge, view: View, paths: Sequence[Path]) -> Knowledge:
    """Grant the weights of the site's encoder at several steps. Raises as `with_model`."""
    models = {}
    for path in paths:
        tensors, meta, _ = checkpoint.read(path)
        models[int(meta.get("step", 0))] = _encoder(view, _parameters(tensors, view), path)
    return replace(knowledge, models=models)


def with_decoder(knowledge: Knowledge, view: View, path: Path) -> Knowledge:
    """Grant the coordinator's own half. Raises as `with_model`."""
    tensors, _, _ = checkpoint.read(path)
    return replace(knowledge, decoder=_decoder(view, _parameters(tensors), path))


def with_shadow(knowledge: Knowledge, view: View, samples: Samples) -> Knowledge:
    """Grant similar images of other patients, for each seat of which all channels are there; and their masks."""
    stacked = {seat.name: samples.at(seat) for seat in (view.seat, *view.seats)}
    images = {name: found for name, found in stacked.items() if found is not None}
    return replace(
        knowledge, shadow=images, shadow_masks=samples.masks, shadow_patients=tuple(samples.patients)
    )


def _parameters(tensors: Mapping[str, Tensor], view: View | None = None) -> dict[str, Tensor]:
    """Weights by name; where a site's checkpoint holds several seats, of the seat under attack."""
    start = "model/"
    if view is not None and any(name.startswith(f"{view.seat.name}/") for name in tensors):
        start = f"{view.seat.name}/model/"
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def _encoder(view: View, parameters: Mapping[str, Tensor], path: Path) -> nn.Module:
    # Without defences, or where they were tried offline, the checkpoint is a bare encoder's; trained parts of
    # defences (a bottleneck, learnt noise) are in the same checkpoint.
    plain, width = by_place(view.defences).activations, len(view.seat.modalities)
    networks = [
        build_network(view.backbone, written, key=bytes(32), seed=0, strict=False, in_channels=width)
        for written in dict.fromkeys([plain, ()])
    ]
    fitting = [network for network in networks if _fits(network, parameters)]
    return _loaded((fitting or networks)[0], parameters, path, "encoder")


def _decoder(view: View, parameters: Mapping[str, Tensor], path: Path) -> Decoder:
    # How the levels are fused and how many regions there are is not in the job on the wire, but in the shapes.
    seats = [seat.name for seat in view.seats]
    for fusion in ("concat", "mean"):
        decoder = build_decoder(view.backbone, seats, fusion, seed=0)
        regions = _outputs(decoder, parameters)
        if regions != decoder.out_channels:
            decoder = build_decoder(view.backbone, seats, fusion, regions, seed=0)
        if _fits(decoder, parameters):
            break
    _loaded(decoder, parameters, path, "decoder")
    return decoder


def _outputs(decoder: Decoder, parameters: Mapping[str, Tensor]) -> int:
    """Output channels of the checkpoint's last convolution; the decoder's own if the checkpoint has none."""
    last = next(name for name, module in decoder.named_modules() if module is decoder.last)
    bias = parameters.get(f"{last}.bias")
    return len(bias) if bias is not None and bias.ndim == 1 and len(bias) else decoder.out_channels


def _fits(network: nn.Module, parameters: Mapping[str, Tensor]) -> bool:
    own = network.state_dict()
    return own.keys() == parameters.keys() and all(own[n].shape == parameters[n].shape for n in own)


def _loaded(network: nn.Module, parameters: Mapping[str, Tensor], path: Path, what: str) -> nn.Module:
    if not _fits(network, parameters):
        own = network.state_dict()
        differs = next(
            n for n in sorted(own.keys() | parameters.keys())
            if n not in own or n not in parameters or own[n].shape != parameters[n].shape
        )  # fmt: skip
        raise ConfigError(
            f"{path}: not the {what} of this capture's job ({differs} differs): "
            "take the checkpoint of the same run and site"
        )
    network.load_state_dict(dict(parameters))
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.eval()


def parse_knows(texts: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """`weights=FILE`, `decoder=FILE`, `shadow=DIR` ... of a command line. Raises ConfigError."""
    known: dict[str, tuple[Path, ...]] = {}
    for text in texts:
        kind, equals, path = text.partition("=")
        if kind not in KINDS or not equals or not path:
            raise ConfigError(f"--knows {text}: write one of {', '.join(f'{k}=PATH' for k in KINDS)}")
        if kind in known and kind != "weights":
            raise ConfigError(f"--knows {kind} is given twice: only weights may be given for several steps")
        known[kind] = (*known.get(kind, ()), Path(path))
    return known
