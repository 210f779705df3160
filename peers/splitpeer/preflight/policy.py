"""What a policy wants and does not have yet: it is valid, and protects less, or lets nothing through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from splitpeer.preflight.finding import Finding
from splitpeer.settings.peer import PRIVATE_NOISE, PRIVATE_RATE, PeerConfig, Policy
from splitpeer.site.range_refusals import refused_in


def check_policy(config: PeerConfig) -> Iterator[Finding]:
    """Partners of secure sums, and weights that make `releases = "once"` hold over several runs."""
    policy = config.policy
    if policy is None:
        return
    if policy.preset == "private":
        yield Finding(
            "policy",
            "ok",
            "preset private: only jobs that keep our encoder frozen, sum over us and at least "
            f"{policy.min_partners} of {', '.join(policy.partners) or 'no partners yet'}, and ask for each window "
            f"once, of a coordinator that does not record; a patient is shown in {_runs(policy.max_runs_per_patient)}; "
            "every other job is declined",
        )
        yield from _lowered(config.source, policy)
    wants_one = policy.min_encoder_noise > 0 or policy.min_encoder_rate > 0
    if (policy.releases == "once" or wants_one) and (config.model is None or config.model.weights is None):
        follows = (
            f"no run begins, as min_encoder_noise = {policy.min_encoder_noise:g} wants one that has learned behind it"
            if wants_one
            else 'every run draws a new encoder, for which releases = "once" begins again'
        )
        yield Finding(
            "policy",
            "warning",
            f"{config.source}: [model] weights is not set: {follows}: make one with splitpeer pretrain, and name it",
        )
    refused = refused_in(config.peer.state)
    if policy.fusion == "secure-sum" and refused:
        what = "every job is declined" if refused >= policy.max_range_refusals else "a job may measure more"
        yield Finding(
            "policy",
            "warning",
            f"{config.source}: this site has refused the range of {refused} sums, and each refusal tells the "
            f"coordinator of its values; with [policy] max_range_refusals = {policy.max_range_refusals} {what}: agree "
            "on a range with the coordinator before the next",
        )
    named, wanted = len(policy.partners), policy.min_partners
    if policy.fusion == "secure-sum" and named < wanted:
        few = f"names {named} site, min_partners wants {wanted}" if named else "is empty"
        yield Finding(
            "policy",
            "warning",
            f"{config.source}: [policy] partners {few}: every job is declined: name the other sites of the sum",
        )


def _lowered(source: Path, policy: Policy) -> Iterator[Finding]:
    """What the preset sets and this site has lowered."""
    for key, usual in (("min_encoder_noise", PRIVATE_NOISE), ("min_encoder_rate", PRIVATE_RATE)):
        if (least := getattr(policy, key)) < usual:
            yield Finding(
                "policy",
                "warning",
                f"{source}: [policy] {key} = {least:g} is lower than the preset's {usual:g}: a sum may show more of "
                "the images than was measured",
            )


def _runs(most: int | None) -> str:
    return "any number of runs" if most is None else f"{most} run{'s' * (most > 1)} at most"
