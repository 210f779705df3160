"""`splitpeer privacy`: what of this site's privacy budget is spent, and what noise a study needs."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import click

from splitpeer.cli.options import config_option, echo_json, json_option, load_peer, set_option
from splitpeer.cli.terminal import echo
from splitpeer.errors import ConfigError

_COUNT = click.IntRange(min=1)


@click.group(invoke_without_command=True)
@config_option
@set_option
@json_option
@click.pass_context
def privacy(
    context: click.Context, config_file: Path | None, settings: tuple[str, ...], as_json: bool
) -> None:
    """Show how much of the privacy budget in [policy] is spent; may be used while `splitpeer serve` runs."""
    if context.invoked_subcommand is not None:
        return
    from splitpeer.privacy.ledger import read_spent

    config = load_peer(config_file, settings)
    policy = config.policy
    if policy is None or policy.epsilon is None or policy.delta is None:
        raise ConfigError(f"{config.source}: [policy] sets no epsilon and delta: there is no budget to show")
    spent = read_spent(config.peer.state, policy.epsilon, policy.delta)
    if as_json:
        echo_json(asdict(spent))
        return
    from splitpeer.privacy.accounting import FPR

    echo(
        f"epsilon {spent.epsilon:.3g} of {spent.budget:g} is spent (delta {spent.delta:g}), by the patient that paid "
        f"most; {spent.patients} have paid, {spent.half} half of it or more, {spent.full} all of it\n"
        f"a test for that person's images with {FPR:.0%} false alarms finds {spent.detected:.1%} of them at most"
    )
    for spec in policy.defences:
        if (sites := int(spec.values.get("shared", 1))) > 1:
            honest = int(spec.values["honest"])
            relied = "on no other site" if honest == 1 else f"on {honest - 1} of the {sites - 1} others"
            echo(
                f"{spec.brief}: the noise is that of {sites} sites, and the budget counts {relied} to keep theirs "
                "secret"
            )
    if spent.alone > spent.epsilon:
        echo(
            f"if all others tell the coordinator their noise, epsilon is {spent.alone:.3g}, by the patient that paid "
            "most"
        )


@privacy.command()
@click.option("--epsilon", type=click.FloatRange(0, 1000, min_open=True), required=True, help="The budget.")
@click.option("--delta", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=1e-5,
              show_default=True)  # fmt: skip
@click.option("--epochs", type=_COUNT, required=True, help="How often training sends each window.")
@click.option("--windows", type=_COUNT, required=True, help="Windows of a patient.")
@click.option("--evaluations", type=click.IntRange(min=0), default=1, show_default=True,
              help="How often they are sent for evaluation or inference.")  # fmt: skip
@click.option("--patients", type=_COUNT, required=True, help="Patients of this site in the study.")
@click.option("--sites", type=_COUNT, default=1, show_default=True,
              help="Sites of a secure sum that share the noise, all of them honest.")  # fmt: skip
@json_option
def plan(
    epsilon: float,
    delta: float,
    epochs: int,
    windows: int,
    evaluations: int,
    patients: int,
    sites: int,
    as_json: bool,
) -> None:
    """Compute the noise that a study needs, with a frozen encoder and with one that is trained."""
    from splitpeer.privacy.accounting import FPR, detected, epsilon_of_mu, mu_within, noise_for, releases

    found = {}
    for name, many in (("frozen", 1), ("learning", patients)):
        count = releases(epochs=epochs, windows=windows, evaluations=evaluations, patients=many)
        found[name] = {"records": count, "noise": noise_for(epsilon, delta, count)}
    finds = detected(mu_within(epsilon, delta))
    # This site's own noise is a sqrt(sites)-th of it.
    alone = epsilon_of_mu(mu_within(epsilon, delta) * math.sqrt(sites), delta)
    if as_json:
        echo_json(
            {"epsilon": epsilon, "delta": delta, "detected": finds, "sites": sites, "alone": alone, **found}
        )
        return
    for name, each in found.items():
        text = (
            f"dp-gaussian:clip=100,noise={_upwards(each['noise']):.4g},frozen={str(name == 'frozen').lower()}"
            + (f",shared={sites},honest={sites}" if sites > 1 else "")
        )
        echo(f"{name + ' encoder':17} {each['records']:>9} records a patient  {text}")
    echo(
        f"with all of it spent, a test with {FPR:.0%} false alarms finds {finds:.1%} of a person's images at most"
    )

    if sites > 1:
        echo(f"if all other sites work with the coordinator, epsilon is {alone:.3g}")


def _upwards(noise: float) -> float:
    """To four digits: rounded down, it would not last to the end."""
    unit = 10.0 ** (math.floor(math.log10(noise)) - 3)
    return math.ceil(noise / unit) * unit
