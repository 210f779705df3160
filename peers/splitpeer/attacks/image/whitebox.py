"""White-box reconstruction: the image whose activations, under the site's own weights, are those that were seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor, nn

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, View
from splitpeer.attacks.evidence import Evidence, gather, usable_shots
from splitpeer.attacks.image.pca import component, head_of
from splitpeer.attacks.likelihood import Effect, minus_log, minus_log_scale, tells
from splitpeer.attacks.likelihood import wide as _wide
from splitpeer.attacks.networks import frozen
from splitpeer.attacks.optimise import Objective, adam, lbfgs, total_variation
from splitpeer.attacks.pose import pose_images
from splitpeer.attacks.simulated_defences import SimulatedDefences
from splitpeer.errors import AttackImpossible

FLOOR = 0.02
"""Least scatter that is assumed, as a share of a level's own spread: float32, rounding, an encoder that moved."""
ROUNDS = 8
"""Rounds of fitting images and a secret matrix in turn."""


class Misfit:
    """How badly images explain the evidence: minus its log-likelihood, up to a constant.

    Per level sum(count * (gain * f(x) - seen)^2) / (2 scatter^2), where gain and scatter are what the
    defences do on average; if `exact`, where they round or leave values out in hiding, by that law (`likelihood`).
    Not adaptive: the published sum over levels of mean((f(x) - seen)^2) / Var(seen), times the voxels of the image.
    """

    def __init__(
        self, model: nn.Module, evidence: list[Evidence], adaptive: bool, exact: bool = False
    ) -> None:
        self.model, self.evidence, self.adaptive, self.exact = model, evidence, adaptive, exact
        self.effects: list[dict[str, Effect]] = []
        self.matrices: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Levels that carry information, shallowest first."""
        return tuple(sorted(self.evidence[0].levels))

    @torch.no_grad()
    def calibrate(self, simulation: SimulatedDefences, images: Tensor) -> None:
        """Learn what the defences do to activations such as those of `images`.

        A secret matrix over channels is the one that best explains the view if `images` were the truth: one for
        all samples, by least squares.
        """
        self.effects = []
        pairs: dict[str, tuple[list[Tensor], list[Tensor]]] = {
            name: ([], []) for name in simulation.mixed if name in self.names
        }
        for group in self.evidence:
            clean = self.model(pose_images(images, group.poses))
            self._check(clean, group)
            exact = [
                name for name, seen in group.levels.items()
                if self.exact and tells(seen, simulation.left(name), simulation.steps(name))
            ]  # fmt: skip
            self.effects.append(simulation.effects({name: clean[name] for name in group.levels}, exact))
            for name, (sources, results) in pairs.items():
                use = group.views > 0
                gain = _wide(self.effects[-1][name].gain, clean[name])
                sources.append((gain * clean[name])[use].transpose(0, 1).flatten(1))
                results.append(group.levels[name].mean[use].transpose(0, 1).flatten(1))
        self.matrices = {
            name: torch.linalg.lstsq(torch.cat(sources, 1).T, torch.cat(results, 1).T).solution.T
            for name, (sources, results) in pairs.items()
        }

    def __call__(self, images: Tensor, names: tuple[str, ...] | None = None) -> Tensor:
        """Images [B, 1, *spatial] to [B], over the levels `names` (None: all)."""
        total = images.new_zeros(len(images))
        for group, effects in zip(self.evidence, self.effects, strict=True):
            found = self.model(pose_images(images, group.poses))
            for name in names or self.names:
                seen, effect = group.levels[name], effects[name]
                spread = seen.mean.flatten(1).std(1).clamp_min(1e-6)
                if self.adaptive:
                    expected = _wide(effect.gain, found[name]) * found[name]
                    if name in self.matrices:
                        expected = torch.einsum("kc,bc...->bk...", self.matrices[name], expected)
                    misfit = minus_log(expected, seen, effect, FLOOR * spread)
                else:
                    weight = images[0].numel() / (seen.mean[0].numel() * spread.square())
                    misfit = weight * (found[name] - seen.mean).square().flatten(1).sum(1)
                total = total + misfit * (group.views > 0)
        return total

    @torch.no_grad()
    def scale(self) -> Tensor:
        """What the value of a call leaves out, [B]: the same for all images, and another after `calibrate`."""
        total = torch.zeros_like(self.evidence[0].views)
        for group, effects in zip(self.evidence, self.effects, strict=True):
            for name in self.names if self.adaptive else ():
                seen, effect = group.levels[name], effects[name]
                spread = seen.mean.flatten(1).std(1).clamp_min(1e-6)
                total = total + minus_log_scale(seen, effect, FLOOR * spread) * (group.views > 0)
        return total

    def _check(self, found: dict[str, Tensor], group: Evidence) -> None:
        for name, seen in group.levels.items():
            if name not in found or found[name].shape != seen.mean.shape:
                got = tuple(found[name].shape[1:]) if name in found else "nothing"
                raise AttackImpossible(
                    f"the weights do not fit the capture: {name} is {tuple(seen.mean.shape[1:])}, "
                    f"the network makes {got}; give the weights of this site's encoder"
                )


@dataclass(frozen=True)
class Descent:
    """One way down: levels of each stage, and how it is minimised."""

    name: str
    stages: tuple[tuple[str, ...], ...]
    method: str = "lbfgs"


LAWS = ("exact", "scatter")
COMPONENT = "component"
SCHEDULES = ("joint", "shallow", COMPONENT, "adam")


def schedule(name: str, names: tuple[str, ...]) -> Descent:
    """One of `SCHEDULES` but `COMPONENT` over the levels `names`, shallowest first."""
    match name:
        case "joint":
            return Descent("all levels at once", (names,))
        case "shallow":
            return Descent("the shallowest level first", (names[:1], names) if len(names) > 1 else (names,))
        case "adam":
            return Descent("Adam, level by level", tuple(names[: n + 1] for n in range(len(names))), "adam")
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {name!r}")


@dataclass(frozen=True, kw_only=True)
class WhiteBox(Attack):
    """Regularised maximum likelihood: minimise misfit + tv * total variation over the image.

    Several schedules are run and the one with the lowest objective of its own is kept, per sample: equal weights
    from a constant start under-report what is recoverable. Never chosen by the truth. What the defences do to values is
    learned at each start, and for the choice at each end: the mean of other patients, which is flat, tells it badly.

    Args:
        iterations: of L-BFGS in a schedule's last stage; earlier stages and Adam get as many together.
        tv: weight of the total variation, in units of the log-likelihood: 1 / the mean step between voxels.
        schedules: comma-separated: "joint" (L-BFGS, all levels at once), "shallow" (the shallowest level alone
            first), "component" (the others from the principal component too, which is where they start anyway without
            other patients: where values are missing or rounded, the mean of these is a poor start), "adam" (level by
            level; slower, and hardly ever the best).
        batch: samples optimised together.
        law: "exact": where values are rounded, or left out in hiding, by that law; "scatter": by their spread alone.

    Raises:
        ValueError: a schedule or law is unknown.
    """

    name = "whitebox"
    title = "white-box optimisation"
    source = (
        "rMLE: He, Zhang, Lee, ACSAC 2019 and IEEE IoT-J 2020, doi 10.1109/JIOT.2020.3022358; schedules ours"
    )
    goal = "image"
    role = "coordinator"
    needs = ("weights",)
    uses = frozenset({"model", "shadow", "architecture", "adaptive"})
    budget, published = ("iterations",), "5000 iterations of Adam at 0.01 on CIFAR"
    plain = (
        "Knows the site's half of the network, and searches for the image that would have sent what arrived."
    )

    iterations: int = 400
    tv: float = 1.0
    schedules: str = "joint,shallow,component"
    batch: int = 16
    law: str = LAWS[0]

    def __post_init__(self) -> None:
        for name in self.schedules.split(","):
            if name != COMPONENT:
                schedule(name, ())
        if self.law not in LAWS:
            raise ValueError(f"law must be one of {', '.join(LAWS)}, not {self.law!r}")

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """See `Attack.recover`. Raises AttackImpossible where the weights do not fit."""
        model = frozen(knowledge.model, self.device)
        chosen = usable_shots(view, knowledge)
        simulation = SimulatedDefences(view, model, self.seed, adaptive=knowledge.adaptive)
        images, won = [], []
        for first in range(0, len(chosen), self.batch):
            seen = partial(
                gather,
                chosen[first : first + self.batch],
                view.seat.modalities,
                masked=knowledge.adaptive,
                device=self.device,
            )
            evidence = seen()
            misfit = Misfit(model, evidence, knowledge.adaptive)
            ends = self._search(view, knowledge, simulation, misfit, progress)
            found, names = self._likeliest(ends, misfit, simulation)
            if self.law == "exact" and simulation.says_more(evidence):
                whole = [name for name in misfit.names if not simulation.zeros_show(name, evidence)]
                misfit = Misfit(model, seen(whole=whole), knowledge.adaptive, exact=True)
                found, names = self._by_law(misfit, simulation, found, ends, progress)
            images.append((denoised(found, self.tv) if simulation.on_images else found).cpu().numpy())
            won += names
        notes = tuple(f"{name}: {won.count(name)} of {len(won)} samples" for name in dict.fromkeys(won))
        return Recovered(np.concatenate(images), max(map(len, chosen)), notes)

    def _objective(self, misfit: Misfit, x: Tensor, names: tuple[str, ...] | None = None) -> Tensor:
        return misfit(x, names) + self.tv * total_variation(x)

    def _likeliest(
        self, ends: Mapping[str, Tensor], misfit: Misfit, simulation: SimulatedDefences
    ) -> tuple[Tensor, list[str]]:
        """Of ends that were searched under different effects: each by those that it would itself have."""
        if misfit.matrices:  # one matrix for all samples: an end of one is no reason to take another
            return _best(ends, partial(self._objective, misfit))
        values = []
        for x in ends.values():
            misfit.calibrate(simulation, x)
            with torch.no_grad():
                values.append(self._objective(misfit, x) + misfit.scale())
        return _lowest(ends, values)

    def _by_law(
        self,
        misfit: Misfit,
        simulation: SimulatedDefences,
        found: Tensor,
        starts: Mapping[str, Tensor],
        progress: Progress,
    ) -> tuple[Tensor, list[str]]:
        """The exact law has more valleys than the scatter: searched from where that led."""
        misfit.calibrate(simulation, found)
        objective = partial(self._objective, misfit)
        ends = {
            name: lbfgs(objective, x, self.iterations, progress=progress, what=f"by the exact law: {name}")
            for name, x in starts.items()
        }
        return _best(ends, objective)

    def _search(
        self,
        view: View,
        knowledge: Knowledge,
        simulation: SimulatedDefences,
        misfit: Misfit,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """What each schedule ends at, by its name; `misfit` is left calibrated to one of them."""
        start, alike = starting_images(view, knowledge, misfit.evidence, misfit, simulation)
        misfit.calibrate(simulation, start)
        objective = partial(self._objective, misfit)
        for turn in range(ROUNDS if misfit.matrices else 0):
            start = lbfgs(objective, start, self.iterations // ROUNDS, progress=progress,
                          what=f"the secret matrix ({turn + 1}/{ROUNDS})")  # fmt: skip
            misfit.calibrate(simulation, start)
        asked = self.schedules.split(",")
        plans = [schedule(name, misfit.names) for name in asked if name != COMPONENT]
        plans = plans or [schedule("joint", misfit.names)]
        starts = {} if alike is not None and asked == [COMPONENT] else {"": start}
        if alike is not None and COMPONENT in asked:
            starts[", from the principal component"] = alike
        candidates = {}
        for where, first in starts.items():
            if first is alike:
                misfit.calibrate(simulation, first)
            for plan in plans:
                candidates[plan.name + where] = self._descend(plan, objective, first, where, progress)
        return candidates

    def _descend(
        self, plan: Descent, objective: Callable[..., Tensor], x: Tensor, where: str, progress: Progress
    ) -> Tensor:
        for number, names in enumerate(plan.stages):
            what = f"{plan.name}{where} ({number + 1}/{len(plan.stages)})"
            staged = partial(objective, names=names)
            if plan.method == "adam":
                x = adam(staged, x, max(1, self.iterations // len(plan.stages)), progress=progress, what=what)
            else:
                x = lbfgs(staged, x, self.iterations, progress=progress, what=what)
        return x


def _best(candidates: Mapping[str, Tensor], objective: Objective) -> tuple[Tensor, list[str]]:
    """Sample by sample the candidate with the lowest objective, and its name."""
    with torch.no_grad():
        return _lowest(candidates, [objective(x) for x in candidates.values()])


def _lowest(candidates: Mapping[str, Tensor], values: Sequence[Tensor]) -> tuple[Tensor, list[str]]:
    names, images, stacked = list(candidates), list(candidates.values()), torch.stack(list(values))
    best = torch.where(stacked.isfinite(), stacked, torch.inf).argmin(0)
    return torch.stack([images[int(k)][i] for i, k in enumerate(best)]), [names[int(k)] for k in best]


def denoised(images: Tensor, tv: float) -> Tensor:
    """Images [B, channels, *spatial] without the noise that a defence put on them, which fits the view too.

    Total variation as in the search (Chambolle, J. Math. Imaging Vis. 20, 2004); the
    noise's width from the finest diagonal differences inside the head (Donoho & Johnstone, Biometrika 81, 1994)."""
    cleaned = []
    for image in images:
        spatial = tuple(image.shape[1:])
        head = head_of(image.flatten(1), spatial).view(spatial).cpu().numpy()
        cleaned.append(np.stack([_denoised(channel, head, tv) for channel in image.cpu().numpy()]))
    return torch.from_numpy(np.stack(cleaned).astype(np.float32)).to(images)


def _denoised(voxels: np.ndarray, head: np.ndarray, tv: float) -> np.ndarray:
    fine = np.diff(np.diff(voxels, axis=0), axis=1) / 2
    sigma = float(np.median(np.abs(fine[head[:-1, :-1]]))) / 0.6745
    return denoise_tv_chambolle(voxels, tv * sigma**2) if tv * sigma > 0 else voxels


def starting_images(
    view: View, knowledge: Knowledge, evidence: list[Evidence], misfit: Misfit, simulation: SimulatedDefences
) -> tuple[Tensor, Tensor | None]:
    """The mean of the shadow images, else the principal component with the sign that fits; and that too, where the
    first is the mean. Both [B, channels, *window]. `misfit` is left calibrated to neither."""
    reference = evidence[0].levels[misfit.names[0]].mean
    shadow = knowledge.shadow.get(view.seat.name)
    if shadow is not None and not simulation.mixed:
        mean = torch.from_numpy(np.asarray(shadow, np.float32).mean(0)).to(reference)
        alike = _component(view, evidence, misfit, simulation, reference)
        return mean.expand(len(reference), *mean.shape).clone(), alike
    return _component(view, evidence, misfit, simulation, reference), None


def _component(
    view: View, evidence: list[Evidence], misfit: Misfit, simulation: SimulatedDefences, reference: Tensor
) -> Tensor:
    guess = component(evidence, view.window).to(reference)
    guess = guess.expand(-1, len(view.seat.modalities), *guess.shape[2:]).clone()
    values = []
    for sign in (1, -1):
        misfit.calibrate(simulation, sign * guess)
        with torch.no_grad():
            values.append(misfit(sign * guess))
    better = values[0] <= values[1]
    if simulation.mixed:  # one matrix for all: one sign for all
        better = (values[0].sum() <= values[1].sum()).expand_as(better)
    return torch.where(_wide(better, guess), guess, -guess)
