"""A coordinator that cheats: feature-space hijacking, simulated, because honest traffic cannot show it.

Instead of the segmentation's gradients the coordinator returns those that make the site's activations look like
the output of a network it can invert. What a site could notice of it is tried in
tests/splitpeer/attacks/watch.py.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from splitpeer.attacks.base import Progress, silent
from splitpeer.attacks.image.fora import gradient_penalty
from splitpeer.attacks.networks import critic, image_decoder
from splitpeer.defences.base import Tensors
from splitpeer.errors import AttackImpossible
from splitpeer.models import Decoder, Encoder, build_decoder, build_encoder, site_seed
from splitpeer.training.backward import backward
from splitpeer.training.loss import region_loss
from splitpeer.training.optimiser import Adam, make_optimiser

_TITLE = "hijacked training"


@dataclass
class Hijacked:
    """What a hijacking left behind."""

    images: np.ndarray
    """float32 [N, 1, *spatial]: what the coordinator makes of the private images' activations at the end."""
    before: np.ndarray
    """The same before the first step."""
    gradients: list[dict[str, np.ndarray]]
    """What the site was sent, step by step: float32 [B, C, *spatial] by level."""
    inputs: list[np.ndarray]
    """Its own images of each step, float32 [B, 1, *spatial]: the site knows them."""
    settings: dict[str, Any]
    seconds: float


@dataclass
class _Cast:
    """The networks of a hijacking, and their optimisers."""

    site: nn.Module
    """A copy of the site's encoder."""
    pilot: nn.Module
    """The coordinator's own encoder, whose code the site is to imitate."""
    inverse: nn.Module
    """Turns that code into images."""
    judge: nn.Module
    """Tells the code from what the site sends."""
    honest: _Honest | None
    """Only for a disguise."""
    site_steps: Adam
    judge_steps: Adam


@dataclass(frozen=True, kw_only=True)
class FSHA:
    """Feature-space hijacking by a malicious coordinator.

    An autoencoder learns on public images; a critic (WGAN-GP) learns to tell its code from what the site sends;
    the site is sent the gradient that makes the critic take its activations for code. Labels are not used at all.

    Published: Adam 1e-5 (site and autoencoder) and 1e-4 (critic), penalty 500, 10,000 to 100,000 iterations. Here:
    steps and rates scaled to what a simulation can do in a minute; the site keeps its own optimiser.
    """

    steps: int = 150
    """Hijacked training steps."""
    pilot_steps: int = 150
    """Steps of the autoencoder, before the hijacking."""
    batch: int = 8
    """Samples of a step."""
    site_rate: float = 1e-3
    """Rate of the site's optimiser, which the coordinator sets in the job."""
    pilot_rate: float = 2e-3
    critic_rate: float = 2e-3
    """Learning rate of Adam."""
    penalty: float = 500.0
    """Weight of the critic's gradient penalty."""
    disguise: float = 0.0
    """Share, by norm, of honest gradients mixed in so that the site notices less; needs masks."""
    seed: int = 0
    device: str = "cpu"

    def simulate(
        self,
        encoder: Encoder,
        private: np.ndarray,
        public: np.ndarray,
        masks: np.ndarray | None = None,
        progress: Progress = silent,
    ) -> Hijacked:
        """Hijack a copy of `encoder` while it trains on `private`.

        Args:
            encoder: the site's, as it starts.
            private: float32 [N, 1, *spatial], the site's images.
            public: float32 [M, 1, *spatial], other patients' images.
            masks: [N, regions, *spatial] of the private images, only for a disguise.

        Raises:
            AttackImpossible: a disguise without masks.
        """
        if self.disguise and masks is None:
            raise AttackImpossible(
                "fsha: a disguise is made of honest gradients, which need the label holder's masks"
            )
        started = time.monotonic()
        source = torch.Generator().manual_seed(self.seed)
        shown, mine = _tensor(public, self.device), _tensor(private, self.device)
        cast = self._cast(encoder, masks)
        self._pilot(cast.pilot, cast.inverse, shown, source, progress)
        before = _images(cast.site, cast.inverse, mine)
        gradients, inputs = [], []
        for step in range(self.steps):
            picked = torch.randint(len(mine), (self.batch,), generator=source)
            others = torch.randint(len(shown), (self.batch,), generator=source)
            target = None if masks is None else _tensor(masks[picked.numpy()], self.device)
            returned = self._step(cast, mine[picked], shown[others], target, source)
            gradients.append({name: tensor.cpu().numpy() for name, tensor in returned.items()})
            inputs.append(private[picked.numpy()])
            progress(_TITLE, step + 1, self.steps)
        return Hijacked(
            images=_images(cast.site, cast.inverse, mine),
            before=before,
            gradients=gradients,
            inputs=inputs,
            settings=self._settings(),
            seconds=time.monotonic() - started,
        )  # fmt: skip

    def _cast(self, encoder: Encoder, masks: np.ndarray | None) -> _Cast:
        cut = encoder.backbone.cut
        site = copy.deepcopy(encoder).to(self.device)
        judge = critic(cut, cut.channels, site_seed(self.seed, "critic")).to(self.device)
        honest = None
        if self.disguise and masks is not None:
            honest = _Honest(encoder, masks.shape[1], self.seed, self.device)
        return _Cast(
            site=site,
            pilot=build_encoder(encoder.backbone, seed=site_seed(self.seed, "pilot")).to(self.device),
            inverse=image_decoder(cut, cut.channels, site_seed(self.seed, "inverse")).to(self.device),
            judge=judge,
            honest=honest,
            site_steps=Adam(site.parameters(), self.site_rate),
            judge_steps=Adam(judge.parameters(), self.critic_rate),
        )

    def _step(
        self, cast: _Cast, images: Tensor, public: Tensor, masks: Tensor | None, source: torch.Generator
    ) -> Tensors:
        """One hijacked training step: the site sends, the critic learns, the site gets what is returned here."""
        sent = cast.site(images)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in sent.items()}
        with torch.no_grad():
            code = cast.pilot(public)
        loss = cast.judge(leaves).mean() - cast.judge(code).mean()
        loss = loss + self.penalty * gradient_penalty(cast.judge, code, _plain(leaves), source)
        cast.judge_steps.zero_grad()
        loss.backward()
        cast.judge_steps.step()
        wanted = torch.autograd.grad(-cast.judge(leaves).mean(), list(leaves.values()))
        returned = dict(zip(leaves, wanted, strict=True))
        if cast.honest is not None and masks is not None:
            returned = _mixed(returned, cast.honest.gradients(_plain(leaves), masks), self.disguise)
        cast.site_steps.zero_grad()
        backward(list(sent.values()), list(returned.values()))
        cast.site_steps.step()
        return returned

    def _settings(self) -> dict[str, Any]:
        kept = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "device"}
        return kept | {"published": "10000 to 100000 iterations at 1e-5 and 1e-4"}

    def _pilot(
        self, pilot: nn.Module, inverse: nn.Module, shown: Tensor, source: torch.Generator, progress: Progress
    ) -> None:
        steps = Adam([*pilot.parameters(), *inverse.parameters()], self.pilot_rate)
        for step in range(self.pilot_steps):
            images = shown[torch.randint(len(shown), (self.batch,), generator=source)]
            loss = functional.mse_loss(inverse(pilot(images)), images)
            steps.zero_grad()
            loss.backward()
            steps.step()
            progress(f"{_TITLE}: autoencoder", step + 1, self.pilot_steps)
        pilot.requires_grad_(False)
        inverse.requires_grad_(False)


class _Honest:
    """The rest of an honest training of one site: a decoder that learns the segmentation and returns its gradients."""

    def __init__(self, encoder: Encoder, regions: int, seed: int, device: str, rate: float = 5e-3) -> None:
        self.decoder: Decoder = build_decoder(
            encoder.backbone, ("own",), out_channels=regions, seed=site_seed(seed, "honest")
        ).to(device)
        self._steps = make_optimiser(self.decoder.parameters(), lr=rate)

    def gradients(self, sent: Tensors, masks: Tensor) -> Tensors:
        """Gradient of the segmentation's loss with respect to the activations `sent`; the decoder takes its own
        step."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in sent.items()}
        self._steps.zero_grad()
        region_loss(self.decoder({"own": leaves}), masks).backward()
        self._steps.step()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _mixed(hijack: Tensors, honest: Tensors, share: float) -> Tensors:
    """Mix of both gradients, sample by sample: `share` of the honest one, the rest of the hijacking one, with the
    honest norm."""
    mixed = {}
    for name, wanted in hijack.items():
        long = _norm(honest[name])
        mixed[name] = share * honest[name] + (1 - share) * wanted * long / _norm(wanted).clamp(min=1e-30)
    return mixed


def _norm(tensor: Tensor) -> Tensor:
    norms: Tensor = tensor.flatten(1).norm(dim=1).reshape(-1, *[1] * (tensor.ndim - 1))
    return norms


def _images(site: nn.Module, inverse: nn.Module, private: Tensor) -> np.ndarray:
    with torch.no_grad():
        parts = [inverse(site(part)) for part in private.split(32)]
    return torch.cat(parts).cpu().numpy()


def _plain(tensors: Tensors) -> Tensors:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _tensor(array: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(device)
