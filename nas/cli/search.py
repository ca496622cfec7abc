"""`nas search`: search a space, train, compile, measure, and ship the front."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ir.errors import InputError, did_you_mean
from nas.cli import device as device_options
from nas.cli.options import Json, TargetName, Threads, parse_options
from nas.cli.output import Output, console, make_table, output, program, told
from nas.cli.search_latency import predict_latency
from nas.cli.search_supernet import prepare_supernet

if TYPE_CHECKING:
    from nas.budget import Budget
    from nas.cli.search_supernet import SupernetSearch
    from nas.executors.base import Executor
    from nas.objectives.base import Objective
    from nas.strategies.base import Strategy
    from nas.study import Study
    from nas.summary import Yardstick
    from nas.trial import Trial

DEFAULT_TRIALS = 32
DEFAULT_STRATEGY = "predictor_guided"
_NOT_BY_NAME = ("custom", "recorded", "supernet_quality", "predicted_energy", "predicted_latency")
_CONSTRAINT = re.compile(r"\s*([A-Za-z_]+)\s*(<=|>=)\s*(\S+)\s*")


def search(
    space: Annotated[
        str, typer.Argument(help="Search space: a YAML file, or the name of a shipped one; `nas list zoo`.")
    ],
    target: TargetName = "cpu",
    trials: Annotated[
        int | None, typer.Option(min=1, help=f"Trials of the whole study; {DEFAULT_TRIALS} unless --hours is given.")
    ] = None,
    hours: Annotated[float | None, typer.Option(help="Start no trial after this time.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides every random choice.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; one that holds this study is resumed. By default runs/NAME.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="What proposes; `nas list strategies`.")] = DEFAULT_STRATEGY,
    population: Annotated[int | None, typer.Option(min=2, help="Population of an evolutionary strategy.")] = None,
    strategy_option: Annotated[
        list[str] | None, typer.Option(help="Option of the strategy, such as 'eta=4'; repeat it.")
    ] = None,
    executor: Annotated[str, typer.Option(help="Where trials run: serial, or ray.")] = "serial",
    workers: Annotated[int | None, typer.Option(min=1, help="Trials at once, with --executor ray.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join, with --executor ray.")] = None,
    threads: Threads = None,
    data: Annotated[Path | None, typer.Option(help="File for the task, instead of its own data.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Train for this many updates.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Train on this many tokens.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Train for this long; does not repeat exactly.")] = None,
    quality: Annotated[
        str,
        typer.Option(help="Where quality comes from: trained (every trial), or supernet (shared weights, audited)."),
    ] = "trained",
    supernet_steps: Annotated[
        int | None, typer.Option(min=1, help="Updates of the supernet; three times those of a model when omitted.")
    ] = None,
    least_tau: Annotated[
        float | None, typer.Option(help="Kendall tau with trained anchors below which a supernet may not rank.")
    ] = None,
    winners: Annotated[
        int | None,
        typer.Option(min=1, help="Models trained alone after it; as many as the supernet's front has when left out."),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(help="As `nas list objectives` prints them; repeat it. By default quality and latency."),
    ] = None,
    constraint: Annotated[
        list[str] | None, typer.Option(help="Such as 'params<=20e6' or 'latency<=5'; repeat it.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in one call when latency is measured.")] = 1,
    cold_cache: Annotated[
        bool, typer.Option("--cold-cache", help="Overwrite a GPU's second-level cache before each timed call.")
    ] = False,
    latency: Annotated[
        str, typer.Option(help="Where latency comes from: measured, or predicted:PROFILE of `nas profile`.")
    ] = "measured",
    prefer_tuned: Annotated[
        bool, typer.Option("--prefer-tuned", help="Minimise kernels that nobody has tuned yet, besides.")
    ] = False,
    remeasure: Annotated[bool, typer.Option(help="Measure the points of the front again at the end.")] = True,
    seeds: Annotated[
        int, typer.Option(min=1, help="Trainings behind each quality of the front, once it is measured again.")
    ] = 1,
    ship: Annotated[bool, typer.Option(help="Compile an artifact for each point of the front at the end.")] = True,
    device: device_options.Address = None,
    secret_file: device_options.SecretFile = None,
    tls_ca: device_options.TlsCa = None,
    tls_fingerprint: device_options.TlsFingerprint = None,
    device_wait: device_options.Wait = device_options.DEFAULT_WAIT_S,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    json: Json = False,
) -> None:
    """Search a space for its Pareto front, and compile a verified artifact for each point of it.

    Give the same command again to resume after an interruption; a larger --trials goes on with a finished study.
    """
    from nas.api import resolve_target
    from nas.devices import held, use_device
    from nas.profile import require_measurable
    from nas.search import open_study

    training = {"steps": steps, "tokens": tokens, "seconds": seconds}
    names = [*(objective or ["quality", "latency"]), *(["tuning_cost"] if prefer_tuned else [])]
    with output(json) as out_stream:
        budget = _budget(trials, hours)
        chosen = _executor(executor, workers, address, threads)
        loaded = _load_space(space, data)
        measured_on = device_options.find_device(device, secret_file, tls_ca, tls_fingerprint, device_wait)
        measured_on, compiled_for = use_device(measured_on, target, threads)
        if ship:
            resolve_target(compiled_for, threads)  # what would end the shipping is said before anything is trained
        folder = out if out is not None else Path("runs") / loaded.name
        timed = {"batch": batch, "cold_cache": cold_cache}
        objectives = [make_objective(name, training, **timed) for name in dict.fromkeys(names)]
        constraints = [parse_constraint(text, **timed) for text in constraint or ()]
        if latency != "measured":
            objectives, constraints = predict_latency(latency, loaded, objectives, constraints, batch)
        if measured_on is None and any(item.source == "measured" for item in (*objectives, *constraints)):
            require_measurable(resolve_target(compiled_for, threads))  # before a supernet is trained
        supernet = prepare_supernet(
            quality,
            loaded,
            folder,
            objectives,
            constraints,
            seed=seed,
            steps=supernet_steps,
            threshold=least_tau,
            winners=winners,
            threads=threads,
            quiet=quiet,
        )
        if supernet is not None:
            objectives, constraints = supernet.judged(objectives, constraints)
        study = open_study(
            loaded,
            target=compiled_for,
            objectives=objectives,
            constraints=constraints,
            strategy=_strategy(strategy, population, strategy_option),
            storage=folder,
            seed=seed,
            threads=threads,
            device=measured_on,
        )
        with held(measured_on), study:
            _run(study, budget, chosen, quiet=quiet, supernet=supernet)
            if remeasure:
                _remeasure(study, seeds, quiet=quiet)
            if ship:
                _ship(study, quiet=quiet)
        _show_result(study, out_stream, supernet)


def make_objective(name: str, training: dict[str, Any], batch: int = 1, cold_cache: bool = False) -> Objective:
    """Return the objective of a name, with the options of the command line that concern it.

    Args:
        name: Registry key.
        training: Budget of training by unit; None leaves one out.
        batch: Sequences in one call when latency is measured.
        cold_cache: Whether a GPU's second-level cache is overwritten before each timed call.

    Raises:
        InputError: No such objective.
    """
    from nas.objectives.base import REGISTRY

    known = objective_names()
    if name not in known:
        hint = did_you_mean(name, known)
        raise InputError("unknown objective", where="--objective", expected=", ".join(known), found=name, hint=hint)
    options = {"quality": training, **_call_options(batch, cold_cache)}
    return REGISTRY.make(name, options.get(name))


def _call_options(batch: int, cold_cache: bool) -> dict[str, dict[str, Any]]:
    """Return options of the objectives that concern one call of the compiled model."""
    options: dict[str, dict[str, Any]] = {
        name: {"batch": batch} for name in ("latency", "energy", "memory_bytes", "tuning_cost")
    }
    options["latency"] |= {"cold_cache": True} if cold_cache else {}
    return options


def objective_names() -> tuple[str, ...]:
    """Return the objectives that a name alone stands for."""
    from nas.objectives.base import REGISTRY

    return tuple(name for name in REGISTRY.names() if name not in _NOT_BY_NAME)


def parse_constraint(text: str, batch: int = 1, cold_cache: bool = False) -> Objective:
    """Read a constraint such as `params<=20e6`.

    Args:
        text: What was given.
        batch: Sequences in one call when latency is measured.
        cold_cache: Whether a GPU's second-level cache is overwritten before each timed call.

    Raises:
        InputError: It is malformed, or names nothing that can be bounded that way.
    """
    from nas.objectives.base import REGISTRY

    match = _CONSTRAINT.fullmatch(text)
    if match is None:
        raise _bad_constraint(text, "NAME<=NUMBER or NAME>=NUMBER, in quotes")
    name, sign, number = match.groups()
    name = "latency" if name == "latency_ms" else name
    known = objective_names()
    if name not in known:
        raise _bad_constraint(text, f"one of {', '.join(known)}", did_you_mean(name, known))
    try:
        bound = float(number)
    except ValueError as error:
        raise _bad_constraint(text, "a number such as 20e6 after the sign") from error
    if name == "latency" and sign == ">=":
        raise _bad_constraint(text, "an upper bound: 'latency<=5', milliseconds")
    key = {"<=": "max", ">=": "min"}[sign] + ("_ms" if name == "latency" else "")
    return REGISTRY.make(name, {key: bound} | _call_options(batch, cold_cache).get(name, {}))


def _bad_constraint(text: str, expected: str, hint: str | None = None) -> InputError:
    return InputError("bad constraint", where="--constraint", expected=expected, found=repr(text), hint=hint)


def _budget(trials: int | None, hours: float | None) -> Budget:
    from nas.budget import Budget

    return Budget(trials=DEFAULT_TRIALS if trials is None and hours is None else trials, hours=hours)


def _strategy(name: str, population: int | None, given: list[str] | None = None) -> Strategy:
    """Return a strategy; its tournaments have no more members than the population that was asked for."""
    from dataclasses import fields

    from nas.strategies import base as strategies

    options = parse_options(given or [], "--strategy-option")
    if population is None:
        return strategies.get(name, **options)
    usual: dict[str, Any] = {field.name: field.default for field in fields(strategies.REGISTRY.get(name))}
    tournament = {"tournament": min(usual["tournament"], population)} if "tournament" in usual else {}
    return strategies.get(name, **{"population": population, **tournament, **options})


def _executor(name: str, workers: int | None, address: str | None, threads: int | None) -> Executor:
    from nas.executors import base as executors

    if name != "ray":
        given = [option for option, value in (("--workers", workers), ("--address", address)) if value is not None]
        if given and name == "serial":
            raise InputError(
                f"{' and '.join(given)} need another executor",
                where="--executor",
                expected="ray",
                found=name,
                hint="add --executor ray",
            )
        return executors.get(name)
    options: dict[str, Any] = {"workers": workers, "address": address, "cpus_per_trial": threads}
    return executors.get("ray", **{option: value for option, value in options.items() if value is not None})


def _load_space(path_or_name: str, data: Path | None) -> Any:
    """Load a space, with the user's data in place of its own."""
    from dataclasses import replace

    from searchspaces.space import load_space

    loaded = load_space(path_or_name)
    return loaded if data is None else replace(loaded, data=str(data.expanduser().absolute()))


def _run(
    study: Study,
    budget: Budget,
    executor: Executor,
    *,
    quiet: bool,
    supernet: SupernetSearch | None = None,
) -> None:
    """Run the study and train what a supernet ranked first, with progress on stderr."""
    from nas.progress import SearchProgress

    study.run(budget, executor=executor, callbacks=[] if quiet else [SearchProgress(console(stderr=True), budget)])
    if supernet is not None:
        supernet.finish(study)


def _remeasure(study: Study, seeds: int, *, quiet: bool) -> None:
    """Measure the points of the front again, with progress on stderr."""
    from nas.remeasure import remeasure

    with told(quiet, "again trial") as listener:
        remeasure(study, seeds=seeds, callback=listener)


def _ship(study: Study, *, quiet: bool) -> None:
    """Compile the front, with progress on stderr."""
    from nas.ship import ship

    with told(quiet, "artifact of trial") as listener:
        ship(study, callback=listener)


def _show_result(study: Study, out: Output, supernet: SupernetSearch | None = None) -> None:
    """Print the front as a table, where the artifacts are, and what to type next; and as JSON."""
    from nas.summary import artifact_path, format_value, front_lines, noise_lines, result_json, yardstick

    sorted_out = study.front()
    front = sorted_out.nominal
    if not front:
        out.text(*_explain_empty(study))
    else:
        out.table(front_table(study, front))
        out.text(*front_lines(sorted_out), *noise_lines(study), "")
    out.text(*(supernet.lines(study) if supernet is not None else ()))
    found = yardstick(study) if front and any(m.source == "trained" for m in study.goals.metrics) else None
    if found is not None:
        scores = [("chance", found.chance), *found.baselines.items()]
        listed = ", ".join(f"{name} {format_value(score, '')}" for name, score in scores)
        better = "lower" if found.direction == "min" else "higher"
        scale = f"  {found.metric} in {found.unit}, {better} is better; for comparison: {listed}"
        out.text(scale, *_losers(study, front, found), "")
    paths = [path for path in (artifact_path(study, trial) for trial in front) if path is not None]
    if paths:
        trained = supernet is not None or any(metric.source == "trained" for metric in study.goals.metrics)
        heading = "Artifacts:" if trained else "Artifacts, untrained because quality is no objective:"
        out.text(heading, *(f"  {path}" for path in paths), "")
    if front:
        out.text("Next:", *(f"  {command}" for command in _next_commands(study, bool(paths))))
    if out.json:
        out.data(result_json(study) | (supernet.describe(study) if supernet is not None else {}))


def _losers(study: Study, front: tuple[Trial, ...], found: Yardstick) -> list[str]:
    """Name the models of the front that a trivial model beats: nobody should ship them for their quality."""
    from nas.summary import format_value, quality_name

    name = quality_name(study)
    losers: dict[str, list[str]] = {}
    for trial in front:
        for baseline in found.better_baselines(trial.values[name]) if name else ():
            losers.setdefault(baseline, []).append(str(trial.number))
    lines: list[str] = []
    for baseline, trials in losers.items():
        whom = "every model of the front" if len(trials) == len(front) else f"trial {', '.join(trials)}"
        lines.append(f"  worse than {baseline} ({format_value(found.baselines[baseline], '')}): {whom}")
    return lines


def front_table(study: Study, front: tuple[Trial, ...]) -> Any:
    """Return the table of a front."""
    from nas.summary import artifact_manifest, format_count, format_quantity, mixers, parameter_count, value_names

    names = value_names(study)
    columns = ("trial", "token mixers", "params", *names, "compiled vs torch", "on the front")
    sorted_out = study.front()
    table = make_table(*columns, title=f"Pareto front: {len(front)} of {len(study.trials)} trials", right=("params",))
    for trial in front:
        count = parameter_count(study, trial)
        manifest = artifact_manifest(study, trial)
        error = manifest["functions"]["forward"]["verification_error"] if manifest is not None else None
        table.add_row(
            str(trial.number),
            mixers(trial.encoded),
            "-" if count is None else format_count(count),
            *(format_quantity(trial.quantities[name]) if name in trial.quantities else "-" for name in names),
            "-" if error is None else f"error {error:.1e}",
            sorted_out.status(trial),
        )
    return table


def _next_commands(study: Study, with_artifacts: bool) -> list[str]:
    commands = [f"{program()} bench {study.folder} --against eager,compile"] if with_artifacts else []
    return [*commands, f"{program()} report {study.folder}"]


def _explain_empty(study: Study) -> list[str]:
    counted = study.count()
    ends = ", ".join(f"{count} {state}" for state, count in counted.items() if count)
    lines = [f"The front is empty: {ends or 'no trial was run'}."]
    reasons = dict.fromkeys(trial.reason.splitlines()[0] for trial in study.trials if trial.reason)
    return lines + [f"  {reason}" for reason in list(reasons)[:5]]
