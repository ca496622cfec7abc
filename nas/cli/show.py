"""`nas show`: what a space, a run, an artifact or a graph is, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ir.errors import CompileError, GraphError, InputError
from nas.cli.options import Json, Model, Pick, TargetName, Threads, TrialNumber
from nas.cli.output import Output, make_table, output

if TYPE_CHECKING:
    from ir.graph import Graph
    from nas.tasks.base import Task
    from searchspaces.architecture import Architecture
    from searchspaces.space import Space

_SHOWN_VALUES = 12


def show(
    model: Model,
    ir: Annotated[bool, typer.Option("--ir", help="Print the graph of one model.")] = False,
    after_each_pass: Annotated[bool, typer.Option("--after-each-pass", help="Print it after every pass.")] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Say which kernel serves each node.")] = False,
    pick: Pick = "centroid",
    trial: TrialNumber = None,
    target: TargetName = "cpu",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Show a space (axes, number of architectures, smallest to largest), a run, an artifact or a graph.

    With --ir or --kernels, show how one model of it is built or compiled.
    """
    with output(json) as out:
        if ir or after_each_pass:
            _show_graph(model, trial, pick, after_each_pass, out)
        elif kernels:
            _show_kernels(model, trial, pick, target, threads, out)
        else:
            _show_itself(model, trial, out)


def profile_space(space: Space, task: Task) -> dict[str, dict[str, Any]]:
    """Return the cost of the smallest, the middle and the largest architecture of a space.

    Args:
        space: The space.
        task: Its task.

    Returns:
        By corner: `architecture`, `params`, `flops`, `peak_activation_bytes` and `state_bytes`, None where a model
        does not stream.
    """
    corners = {"min": space.smallest(), "centroid": space.centroid(), "max": space.largest()}
    return {name: _profile(architecture, task) for name, architecture in corners.items()}


def _profile(architecture: Architecture, task: Task) -> dict[str, Any]:
    from ir.cost import profile, state_bytes

    cost = profile(architecture.graph(task.signature))
    try:
        step = architecture.graph(task.signature, mode="step", max_len=task.signature.positions)
        state = state_bytes(step)
    except (GraphError, InputError):  # it looks ahead, so it does not stream
        state = None
    return {
        "architecture": architecture.describe(),
        "params": cost.params,
        "flops": cost.flops,
        "peak_activation_bytes": cost.peak_activation_bytes,
        "state_bytes": state,
    }


def _show_itself(text: str, trial: int | None, out: Output) -> None:
    from nas.cli import models

    if models.is_run(text):
        _show_run(text, trial, out)
    elif trial is not None:
        raise InputError("only a run has trials", where="--trial", expected="a run folder", found=text)
    elif models.is_artifact(text):
        _show_artifact(Path(text), out)
    elif models.is_graph(text):
        _show_graph_summary(models.read_graph(Path(text)), out)
    else:
        from searchspaces.space import load_space

        _show_space(load_space(text), out)


def _show_space(space: Space, out: Output) -> None:
    from nas.cli.models import task_of
    from nas.summary import format_count, format_value

    task = task_of(space)
    profiles = profile_space(space, task)
    length = task.signature.positions
    if out.json:
        out.data(_space_json(space, profiles, length))
        return
    out.text(str(space), "")
    table = make_table(
        "", *profiles, right=tuple(profiles), title=f"Cost of one forward pass, batch 1, length {length}"
    )
    rows = (("params", ""), ("flops", "FLOP"), ("peak_activation_bytes", "bytes"), ("state_bytes", "bytes"))
    for key, unit in rows:
        values = [corner[key] for corner in profiles.values()]
        texts = [
            "-" if value is None else format_value(value, unit) if unit else format_count(value) for value in values
        ]
        table.add_row(key.replace("_", " "), *texts)
    out.table(table)
    out.text(*(f"  {name:9} {corner['architecture']}" for name, corner in profiles.items()))


def _space_json(space: Space, profiles: dict[str, Any], length: int) -> dict[str, Any]:
    return {
        "name": space.name,
        "description": space.description,
        "task": space.task,
        "length": length,
        "axes": [{"path": axis.path, "values": list(axis.values)} for axis in space.axes()],
        "architectures": space.size(),
        "constraints": [str(constraint) for constraint in space.constraints],
        "profile": profiles,
    }


def _show_run(folder: str, number: int | None, out: Output) -> None:
    from nas.cli.models import find_trial, open_run
    from nas.cli.search import front_table
    from nas.summary import describe_architecture, format_quantity, result_json, trial_json

    study = open_run(folder)
    if number is None:
        counted = ", ".join(f"{count} {state}" for state, count in study.count().items() if count)
        if out.json:
            out.data(result_json(study))
            return
        out.text(f"{folder}: {counted or 'no trial yet'}")
        if front := study.pareto_front():
            out.table(front_table(study, front))
        return
    trial = find_trial(study, number)
    if out.json:
        out.data(trial_json(study, trial) | {"architecture": dict(trial.encoded)})
        return
    out.text(f"trial {trial.number}: {describe_architecture(trial)}")
    out.text(*(f"  {name}: {format_quantity(quantity)}" for name, quantity in trial.quantities.items()))


def _show_artifact(path: Path, out: Output) -> None:
    from codegen import container

    manifest = container.open_file(path).manifest
    if out.json:
        out.data(manifest)
        return
    forward = manifest["functions"]["forward"]
    out.text(f"{path}: {manifest['target']['fingerprint']}, {path.stat().st_size / 1e6:.2f} MB")
    for name, function in manifest["functions"].items():
        if len(manifest["functions"]) > 1:
            out.text(f"  {name}")
        out.text(*_signature_lines(function))
    lines = [
        ("graph", forward["graph_hash"][:16]),
        ("kernels", f"{len(forward['kernels'])} calls; list them with --kernels"),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items() if version)),
    ]
    if memory := forward["memory"]:
        weights, activations = (memory[key] / 1e6 for key in ("weight_bytes", "activation_bytes"))
        lines.append(("memory", f"{weights:.2f} MB of weights, {activations:.2f} MB of activations"))
    if forward["verification_error"] is not None:
        lines.append(("error", f"{forward['verification_error']:.1e} of the output's scale, against torch"))
    elif "unverified" in manifest["self_test"]:
        lines.append(("error", f"not run: {manifest['self_test']['unverified']}"))
    if latency := manifest["latency"]:
        low, high = latency["interval_ms"]
        text = f"{latency['median_ms']:.4g} ms, median in [{low:.4g}, {high:.4g}], {latency['threads']} thread(s)"
        lines.append(("latency", text))
    out.text(*(f"  {name:8} {value}" for name, value in lines))
    out.text(*(f"  {name:8} {value}" for name, value in manifest["metadata"].items() if isinstance(value, str | int)))


def _signature_lines(function: dict[str, Any]) -> list[str]:
    """Describe what a function takes and gives; what it carries is summed up."""
    lines: list[str] = []
    for role in ("input", "output"):
        for item in function[f"{role}s"]:
            if item["name"] not in function["carried"]:
                lines.append(f"  {role:7} {item['name']}: {item['dtype']}{item['shape']}")
    carried = function["carried"]
    return lines + ([f"  {'state':7} {len(carried)} array(s), from call to call"] if carried else [])


def _show_graph_summary(graph: Graph, out: Output) -> None:
    from ir.cost import profile
    from ir.hashing import canonical_hash
    from nas.summary import format_count, format_value

    cost = profile(graph)
    inputs = {name: str(node.types[0]) for name, node in graph.inputs.items()}
    outputs = {name: str(graph.type_of(value)) for name, value in graph.outputs}
    if out.json:
        out.data({"hash": canonical_hash(graph), "inputs": inputs, "outputs": outputs, **vars(cost)})
        return
    out.text(f"graph {graph.name}: {len(graph.nodes)} nodes, {canonical_hash(graph)[:16]}")
    out.text(*(f"  input   {name}: {kind}" for name, kind in inputs.items()))
    out.text(*(f"  output  {name}: {kind}" for name, kind in outputs.items()))
    out.text(
        f"  {format_count(cost.params)} params, {format_value(cost.flops, 'FLOP')}, at most "
        f"{format_value(cost.peak_activation_bytes, 'bytes')} of activations"
    )


def _graphs(text: str, trial: int | None, pick: str) -> tuple[str, list[tuple[str, Graph]]]:
    """Return what one model is called, and its graph: as components where it has some, then as operations."""
    from nas.api import build_graph
    from nas.cli.models import find_model

    found = find_model(text, trial=trial, pick=pick)
    if found.study is not None:
        task, architecture = found.study.evaluator.task, found.model.architecture
    elif hasattr(found.model, "graph_json"):
        from ir.serialize import graph_from_json

        return found.title, [("artifact", graph_from_json(found.model.graph_json))]
    elif not hasattr(found.model, "to_dict"):
        return found.title, [("file", found.model)]
    else:
        task, architecture = found.task, found.model
    whole = build_graph(architecture, task, expanded=False)
    return found.title, [("components", whole), ("expand_components", build_graph(architecture, task))]


def _show_graph(text: str, trial: int | None, pick: str, after_each_pass: bool, out: Output) -> None:
    from ir.op import snake_case
    from ir.text import print_graph

    title, graphs = _graphs(text, trial, pick)
    if after_each_pass:
        from codegen.lower import simplify

        graphs = [*graphs]
        simplify(graphs[-1][1], lambda name, graph: graphs.append((snake_case(name), graph)))
    else:
        graphs = graphs[-1:]
    if out.json:
        out.data({"model": title, "graphs": [{"after": name, "text": print_graph(graph)} for name, graph in graphs]})
        return
    out.text(f"# {title}")
    for name, graph in graphs:
        out.text(*([f"# after {name}: {len(graph.nodes)} nodes"] if after_each_pass else []), print_graph(graph))


def _show_kernels(text: str, trial: int | None, pick: str, target: str, threads: int | None, out: Output) -> None:
    from nas.cli.models import is_artifact

    if is_artifact(text):
        from codegen import container

        title, kernels = text, container.open_file(text).manifest["functions"]["forward"]["kernels"]
    else:
        from codegen.compile import describe_kernels
        from nas.api import resolve_target

        title, graphs = _graphs(text, trial, pick)
        kernels = describe_kernels(graphs[-1][1], resolve_target(target, threads))
    if out.json:
        out.data({"model": title, "kernels": kernels})
        return
    if not kernels:
        raise CompileError("this model has no kernels", where=title)
    out.table(_kernel_table(title, kernels))


def _kernel_table(title: str, kernels: list[dict[str, Any]]) -> Any:
    from nas.summary import format_count

    table = make_table("scope", "kernel", "FLOP", "knobs", "nodes", right=("FLOP",), title=f"Kernels of {title}")
    for kernel in kernels:
        knobs = ", ".join(f"{name}={value}" for name, value in kernel.get("knobs", {}).items())
        nodes = [str(node).rpartition(".")[2] for node in kernel.get("nodes", ())]
        table.add_row(
            str(kernel.get("scope", "")),
            str(kernel["kernel"]),
            format_count(kernel.get("flops", 0)),
            knobs + (" (tuned)" if kernel.get("tuned") else ""),
            ", ".join(nodes),
        )
    return table
