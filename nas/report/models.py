"""The part of a report that shows each model of the front: its choices, its layers, its kernels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ir.errors import InputError, NasError
from nas.report.contents import Contents
from nas.summary import component_text, describe_architecture, format_count, format_value
from nas.trial import Trial

_SHOWN_KERNELS = 12


def render_models(contents: Contents) -> str:
    """Return the section, empty where the front is."""
    if not contents.front:
        return ""
    return "<h2>Models</h2>\n" + "".join(_model(contents, trial) for trial in contents.front)


def _model(contents: Contents, trial: Trial) -> str:
    try:
        described = describe_architecture(trial)
    except InputError as error:  # a journal of another version's components still has the rest to show
        described = f"cannot be read by this version: {error.message}"
    values = ", ".join(
        f"{name} {format_value(quantity.value, quantity.unit)}" for name, quantity in trial.quantities.items()
    )
    parts = (
        f'<h3 id="trial-{trial.number}">Trial {trial.number}</h3>\n<p>{escape(described)}</p>\n'
        f'<p class="note">{escape(values)} · <code>{escape(trial.hash[:16])}</code></p>\n',
        _folded("layers", _layers(trial)),
        _folded("graph", _graph(contents, trial)),
        _folded("kernels", _kernels(contents.manifests.get(trial.number))),
        _folded("beside other runtimes", _bench(contents.benches.get(trial.number, ()))),
    )
    return "".join(parts)


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>\n" if body else ""


def _layers(trial: Trial) -> str:
    """Draw the model from the input to the output, a line for each part."""
    stages = trial.encoded.get("stages")
    if not stages:
        return f"<pre>{escape(json.dumps(dict(trial.encoded), indent=1))}</pre>"
    whole = trial.encoded
    lines = [
        f"{'causal' if whole.get('causal') else 'bidirectional'}, "
        f"norm {component_text(whole.get('norm'))}, position {component_text(whole.get('position'))}",
        "",
        f"   stem  {component_text(whole.get('stem'))}",
    ]
    number = 0
    for stage in stages:
        entry = f"{component_text(stage['transition'])}, " if stage["transition"] else ""
        lines += ["     |", f"        {entry}width {stage['d_model']}"]
        for layer in stage["layers"]:
            wiring, mixer, channels = (
                component_text(layer[name]) for name in ("wiring", "token_mixer", "channel_mixer")
            )
            lines += ["     |", f"{number:>4} +- {mixer}", f"     +- {channels}    [{wiring}]"]
            number += 1
    lines += ["     |", f"   head  {component_text(whole.get('head'))}"]
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _graph(contents: Contents, trial: Trial) -> str:
    """Write the graph with components as nodes: a page of operations helps nobody."""
    task = contents.study.evaluator.task
    if task is None or not hasattr(trial.architecture, "graph"):
        return ""
    from ir.text import print_graph

    try:
        graph = trial.architecture.graph(task.signature, expanded=False)
    except NasError as error:
        return f"<p>{escape(str(error))}</p>"
    return f"<pre>{escape(print_graph(graph))}</pre>"


def _kernels(manifest: Mapping[str, Any] | None) -> str:
    """Count the kernels of an artifact, those with the most operations first."""
    if manifest is None or not manifest["functions"]["forward"]["kernels"]:
        return ""
    calls: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    for kernel in manifest["functions"]["forward"]["kernels"]:
        calls[kernel["kernel"]] += 1
        flops[kernel["kernel"]] += int(kernel.get("flops", 0))
    rows = [f"{'calls':>6} {'FLOP':>9}  kernel"]
    rows += [f"{calls[name]:>6} {format_count(count):>9}  {name}" for name, count in flops.most_common(_SHOWN_KERNELS)]
    if len(flops) > _SHOWN_KERNELS:
        rows.append(f"{'':>17} and {len(flops) - _SHOWN_KERNELS} more with fewer")
    return f"<pre>{escape(chr(10).join(rows))}</pre>"


def _bench(results: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'threads':>7} {'runtime':12} {'median ms':>10} {'times nas':>10}"] if results else []
    for result in results:
        for runtime, entry in result["results"].items():
            if entry["status"] == "ok":
                figures = f"{entry['median_ms']:>10.3f} {entry['ratio']:>10.2f}"
            else:
                figures = f"{entry['status']}: {entry.get('reason', '')}"
            lines.append(f"{result['threads']:>7} {runtime:12} {figures}")
    return f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""
