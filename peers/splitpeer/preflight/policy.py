"""What a policy wants and does not have yet: it is valid, and protects less, or lets nothing through."""

from __future__ import annotations

from collections.abc import Iterator

from splitpeer.preflight.finding import Finding
from splitpeer.settings.peer import PeerConfig


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
    if policy.releases == "once" and (config.model is None or config.model.weights is None):
        yield Finding(
            "policy",
            "warning",
            f"{config.source}: [model] weights is not set: every run draws a new encoder, for which "
            'releases = "once" begins again: make one with splitpeer pretrain, and name it',
        )
    named, wanted = len(policy.partners), policy.min_partners
    if policy.fusion == "secure-sum" and named < wanted:
        few = f"names {named} site, min_partners wants {wanted}" if named else "is empty"
        yield Finding(
            "policy",
            "warning",
            f"{config.source}: [policy] partners {few}: every job is declined: name the other sites of the sum",
        )


def _runs(most: int | None) -> str:
    return "any number of runs" if most is None else f"{most} run{'s' * (most > 1)} at most"
