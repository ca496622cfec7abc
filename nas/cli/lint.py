"""`nas lint`: what is wrong with a search space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.options import Json
from nas.cli.output import Output, output

if TYPE_CHECKING:
    from nas.lint import Lint, Share


def lint(
    space: Annotated[str, typer.Argument(help="A search space: a YAML file or a name.")],
    samples: Annotated[
        int, typer.Option(min=10, help="Architectures to build; a space of no more than these is built whole.")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.")] = 0,
    json: Json = False,
) -> None:
    """Say how many different models a space holds, which choices are idle, and how much its constraints rule out.

    The exit code is 1 where a value is unreachable, a choice makes no difference, or nothing is feasible.
    """
    from nas.cli.models import task_of
    from nas.lint import lint as look
    from searchspaces.space import load_space

    with output(json) as out:
        loaded = load_space(space)
        found = look(loaded, task_of(loaded).signature, samples=samples, seed=seed)
        if out.json:
            out.data(found.to_dict())
        else:
            _show(loaded.name, found, out)
    if not found.is_clean:
        raise typer.Exit(1)


def _show(name: str, found: Lint, out: Output) -> None:
    from nas.summary import format_count

    low, high = (format_count(round(value)) for value in found.distinct_interval)
    distinct = format_count(round(found.distinct)) if found.is_exact else f"about {low} to {high}"
    basis = "all built" if found.is_exact else f"from a sample of {found.built}"
    out.text(f"{name}: {format_count(found.counted)} architectures, {distinct} different models, {basis}")
    if found.unbuildable.value:
        out.text(f"  cannot be built for the task: {_percent(found.unbuildable)}")
    out.text(*(f"  breaks {constraint}: {_percent(share)}" for constraint, share in found.broken.items()))
    if len(found.broken) > 1:
        out.text(f"  infeasible: {_percent(found.infeasible)}")
    out.text(*(f"  not checked, because it is measured: {constraint}" for constraint in found.unchecked))
    for choice in found.unreachable:
        out.text(f"  unreachable: {choice.path} {', '.join(map(str, choice.values))}")
    for choice in found.ignored:
        out.text(f"  makes no difference: {choice.path} {', '.join(map(str, choice.values))} ({choice.tried} tries)")
    if found.is_clean:
        out.text("  every choice makes a difference somewhere")


def _percent(share: Share) -> str:
    low, high = share.interval
    interval = f" [{low:.1%}, {high:.1%}]" if high > low else ""
    return f"{share.value:.1%}{interval}"
