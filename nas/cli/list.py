"""`nas list`: what there is to choose from."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ir.errors import InputError, NasError
from nas.cli.options import Json
from nas.cli.output import make_table, output
from nas.documents import table, write_into

# Long texts that would squeeze the other columns of a table.
_ONLY_IN_JSON = frozenset({"paper", "file", "url", "checks", "note", "published"})


class Kind(str, Enum):
    """What `nas list` lists."""

    components = "components"
    spaces = "spaces"
    zoo = "zoo"
    targets = "targets"
    tasks = "tasks"
    strategies = "strategies"
    objectives = "objectives"
    executors = "executors"


def list_entries(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    into: Annotated[
        Path | None, typer.Option(help="Put a table of the components or the zoo between the marks of this document.")
    ] = None,
    json: Json = False,
) -> None:
    """List components, shipped spaces, published architectures (zoo), targets, tasks, strategies, objectives."""
    with output(json) as out:
        entries = _LISTS[kind]()
        if into is not None:
            write_into(into, kind.value, _document_table(kind, entries))
            return
        if out.json:
            out.data(entries)
            return
        columns = [key for key in dict.fromkeys(key for entry in entries for key in entry) if key not in _ONLY_IN_JSON]
        shown = make_table(*columns)
        for column in shown.columns:
            column.no_wrap = column.header in ("kind", "name", "available")
        for entry in entries:
            shown.add_row(*(_cell(entry.get(column)) for column in columns))
        out.table(shown)


def list_components() -> list[dict[str, Any]]:
    """Describe every component: kind, name, aliases, options and paper."""
    from ir.component import KINDS
    from searchspaces.registry import components

    return [
        {
            "kind": kind,
            "name": name,
            "aliases": {alias: dict(preset) for alias, preset in component.aliases.items()},
            "options": _component_options(component),
            "description": _first_line(component),
            "paper": component.paper,
        }
        for kind in KINDS
        for name, component in components(kind).items()
    ]


def list_zoo() -> list[dict[str, Any]]:
    """Describe every published architecture: its parts, its paper, and its size beside the printed one."""
    from ir.cost import profile
    from nas.checks.zoo import check_names
    from searchspaces.architecture import part_names
    from searchspaces.space import ZOO, load_space, shipped_spaces

    entries: list[dict[str, Any]] = []
    for name, path in shipped_spaces().items():
        if not name.startswith(f"{ZOO}/"):
            continue
        space = load_space(path)
        architecture, signature, published = space.smallest(), space.signature, space.published
        assert signature is not None, "a space of the zoo has a signature"
        assert published is not None, "a space of the zoo says what is published"
        cost = profile(architecture.graph(signature))
        entries.append(
            {
                "name": name,
                "description": space.description,
                "parts": part_names(architecture.model, signature),
                "params": cost.params,
                "macs": cost.macs,
                "published": {"params": published.params, "macs": published.macs, "source": published.source}
                | {"deviation": dict(published.deviation)},
                "note": published.note,
                "checks": check_names(architecture, signature),
                "paper": published.paper,
                "url": published.url,
                "file": str(path),
            }
        )
    return entries


def list_spaces() -> list[dict[str, Any]]:
    """Describe every shipped search space."""
    from searchspaces.space import ZOO, load_space, shipped_spaces

    entries: list[dict[str, Any]] = []
    for name, path in shipped_spaces().items():
        if name.startswith(f"{ZOO}/"):
            continue
        space = load_space(path)
        entries.append(
            {
                "name": name,
                "task": space.task,
                "architectures": space.size(),
                "description": space.description,
                "file": str(path),
            }
        )
    return entries


def list_targets() -> list[dict[str, Any]]:
    """Describe every target, and whether it is to be had here."""
    from codegen import targets

    entries: list[dict[str, Any]] = []
    for name in targets.available():
        try:
            found = targets.get(name)
        except NasError as error:
            entries.append({"name": name, "available": False, "here": error.message})
        else:
            entries.append({"name": name, "available": True, "here": f"{found.fingerprint}, {found.threads} threads"})
    return entries


def list_tasks() -> list[dict[str, Any]]:
    """Describe every task."""
    from nas import tasks

    entries: list[dict[str, Any]] = []
    for name in tasks.names():
        task = tasks.get(name)
        takes_data = any(field.name == "data" for field in fields(task))
        entries.append(
            {
                "name": name,
                "metric": task.metric.name,
                "unit": task.metric.unit,
                "better": "lower" if task.direction == "min" else "higher",
                "options": task.options,
                "takes data": takes_data,
                "description": task.description,
            }
        )
    return entries


def _list_registry(registry: Any, hidden: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Describe the entries of a registry of dataclasses."""
    kinds = {name: registry.get(name) for name in registry.names() if name not in hidden}
    return [
        {"name": name, "options": _field_options(kind), "description": _first_line(kind)}
        for name, kind in kinds.items()
    ]


def list_strategies() -> list[dict[str, Any]]:
    """Describe every strategy."""
    from nas.strategies.base import REGISTRY

    return _list_registry(REGISTRY)


def list_objectives() -> list[dict[str, Any]]:
    """Describe every objective that has a name of its own."""
    from nas.objectives.base import REGISTRY

    return _list_registry(REGISTRY, hidden=("custom", "recorded"))


def list_executors() -> list[dict[str, Any]]:
    """Describe every executor."""
    from nas.executors.base import REGISTRY

    return _list_registry(REGISTRY)


_LISTS = {
    Kind.components: list_components,
    Kind.spaces: list_spaces,
    Kind.zoo: list_zoo,
    Kind.targets: list_targets,
    Kind.tasks: list_tasks,
    Kind.strategies: list_strategies,
    Kind.objectives: list_objectives,
    Kind.executors: list_executors,
}

# Fields of objectives that describe them and are not for a user to set.
_FIXED_FIELDS = frozenset({"name", "unit", "direction", "source", "cheap"})


def _component_options(component: Any) -> dict[str, Any]:
    from searchspaces.registry import default_options

    specs = component.option_specs()
    options: dict[str, Any] = {}
    for name, default in default_options(component).items():
        spec = specs[name]
        limits = {"choices": list(spec.choices), "minimum": spec.minimum, "maximum": spec.maximum, "doc": spec.doc}
        options[name] = {"default": default} | {
            key: value for key, value in limits.items() if value not in (None, [], "")
        }
    return options


def _field_options(kind: type[Any]) -> dict[str, Any]:
    if not is_dataclass(kind):
        return {}
    return {
        field.name: None if field.default is MISSING else field.default
        for field in fields(kind)
        if field.init and field.name not in _FIXED_FIELDS
    }


def _first_line(kind: type[Any]) -> str:
    return (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")


def _document_table(kind: Kind, entries: list[dict[str, Any]]) -> str:
    """Write what a document shows of components or of the zoo.

    Raises:
        InputError: Documents show nothing else.
    """
    if kind is Kind.components:
        rows = [
            [entry["kind"].replace("_", " "), f"`{entry['name']}`", _aliases(entry), entry["description"]]
            for entry in entries
        ]
        return table(["kind", "name", "aliases", "what it is"], rows)
    if kind is not Kind.zoo:
        raise InputError("only components and the zoo have a table in documents", where="list", found=kind.value)
    rows = [
        [
            f"`{entry['name']}`",
            f"[{entry['paper']}]({entry['url']})",
            _beside(entry["params"], entry["published"]["params"], 1e6),
            _beside(entry["macs"], entry["published"]["macs"], 1e9),
        ]
        for entry in entries
    ]
    numbers = ["M parameters (printed)", "G multiply-adds (printed)"]
    return table(["name", "paper", *numbers], rows, right=numbers)


def _aliases(entry: dict[str, Any]) -> str:
    return ", ".join(f"`{alias}`" for alias in entry["aliases"])


def _beside(found: float, printed: float | None, unit: float) -> str:
    return f"{found / unit:.2f} ({'-' if printed is None else f'{printed / unit:.2f}'})"


def _cell(value: Any) -> str:
    """Write a value for a table."""
    if isinstance(value, dict):
        return ", ".join(
            f"{name}={_option_text(option)}" if option != {} else str(name) for name, option in value.items()
        )
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _option_text(option: Any) -> str:
    if not isinstance(option, dict):
        return str(option)
    if "default" not in option:
        return "+".join(f"{name}={value}" for name, value in option.items())
    return str(option["default"])
