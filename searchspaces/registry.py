"""Finds components: a file in the folder of its kind is a component, and nothing else has to know about it.

`searchspaces/token_mixers/mamba.py` holds one public `Component` subclass and is the token mixer `mamba`. Third
parties add components through entry points of the group `nas.components`, named `kind.key` (`token_mixer.my_mixer`).
A file is imported when its component is asked for, so that loading a space costs only what it uses.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ir.component import KINDS, Component
from ir.errors import InputError, did_you_mean
from ir.ops.structure import OptionValue

FOLDERS: Mapping[str, str] = {kind: f"{kind}s" for kind in KINDS}
ENTRY_POINT_GROUP = "nas.components"


class RegistryError(InputError):
    """A component file or entry point breaks the rules of the registry."""


class UnknownComponent(InputError):
    """No component of the kind has this name."""


@dataclass(frozen=True)
class Entry:
    """What a name stands for: a component and the options that the name presets."""

    key: str
    component: type[Component]
    preset: Mapping[str, OptionValue] = field(default_factory=dict[str, OptionValue])


class Registry:
    """The components under one package, and those of installed entry points; folders are listed once.

    Args:
        folder: Folder with one subfolder for each kind.
        package: Import name of that folder.
        entry_points: Third parties' components; those of the environment by default.
    """

    def __init__(
        self, folder: Path, package: str, entry_points: tuple[importlib.metadata.EntryPoint, ...] | None = None
    ) -> None:
        self._folder = folder
        self._package = package
        self._entry_points = entry_points
        self._listed: dict[str, dict[str, Path]] = {}
        self._loaded: dict[tuple[str, str], type[Component]] = {}
        self._aliases: dict[str, dict[str, Entry]] = {}

    def keys(self, kind: str) -> tuple[str, ...]:
        """Return the keys of a kind in alphabetical order; imports nothing."""
        return tuple(sorted((*self._files(kind), *self._external(kind))))

    def names(self, kind: str) -> tuple[str, ...]:
        """Return keys and aliases of a kind in alphabetical order."""
        return tuple(sorted((*self.keys(kind), *self.aliases(kind))))

    def components(self, kind: str) -> dict[str, type[Component]]:
        """Return every component of a kind by key."""
        return {key: self._load(kind, key) for key in self.keys(kind)}

    def aliases(self, kind: str) -> dict[str, Entry]:
        """Return the aliases of a kind.

        Raises:
            RegistryError: Two components claim the same name.
        """
        if kind not in self._aliases:
            self._aliases[kind] = self._collect_aliases(kind)
        return self._aliases[kind]

    def lookup(self, kind: str, name: str) -> Entry:
        """Return what a key or an alias stands for.

        Raises:
            UnknownComponent: Nothing of that kind has this name; the message suggests the closest.
        """
        if name in self.keys(kind):
            return Entry(name, self._load(kind, name))
        if name in self.aliases(kind):
            return self.aliases(kind)[name]
        raise UnknownComponent(
            f"unknown {kind.replace('_', ' ')} `{name}`",
            expected=f"one of {', '.join(self.names(kind))}",
            found=f"`{name}`",
            hint=did_you_mean(name, self.names(kind)) or "`nas list` shows them with their options",
        )

    def get(self, kind: str, name: str) -> type[Component]:
        """Return the component class of a key or alias.

        Raises:
            UnknownComponent: As `lookup`.
        """
        return self.lookup(kind, name).component

    def _files(self, kind: str) -> dict[str, Path]:
        if kind not in self._listed:
            paths = (self._folder / FOLDERS[kind]).glob("*.py")
            self._listed[kind] = {path.stem: path for path in paths if not path.stem.startswith("_")}
        return self._listed[kind]

    def _external(self, kind: str) -> dict[str, importlib.metadata.EntryPoint]:
        points = self._entry_points
        if points is None:
            points = _installed_entry_points()
        found: dict[str, importlib.metadata.EntryPoint] = {}
        for point in points:
            point_kind, _, key = point.name.partition(".")
            if point_kind not in FOLDERS or not key:
                raise RegistryError(
                    f"bad entry point `{point.name}` in the group {ENTRY_POINT_GROUP}",
                    where=point.value,
                    expected=f"`kind.key` with a kind among {', '.join(FOLDERS)}",
                    found=f"`{point.name}`",
                    hint="rename the entry point in the package that declares it",
                )
            if point_kind != kind:
                continue
            taken = self._files(kind).get(key) or (found[key].value if key in found else None)
            if taken:
                raise _duplicate(kind, key, self._relative(taken), point.value)
            found[key] = point
        return found

    def _relative(self, place: Path | str) -> str:
        return str(place.relative_to(self._folder.parent)) if isinstance(place, Path) else place

    def _load(self, kind: str, key: str) -> type[Component]:
        if (kind, key) not in self._loaded:
            path = self._files(kind).get(key)
            loaded: Any = self._load_file(kind, key, path) if path else self._external(kind)[key].load()
            place = self._relative(path) if path else self._external(kind)[key].value
            self._loaded[kind, key] = _checked(loaded, kind, key, place)
        return self._loaded[kind, key]

    def _load_file(self, kind: str, key: str, path: Path) -> type[Component]:
        module = importlib.import_module(f"{self._package}.{FOLDERS[kind]}.{key}")
        found = [
            member
            for name, member in vars(module).items()
            if inspect.isclass(member)
            and issubclass(member, Component)
            and member.__module__ == module.__name__
            and not name.startswith("_")
        ]
        if len(found) != 1:
            raise RegistryError(
                f"`{key}` must define one component",
                where=self._relative(path),
                expected="one public subclass of Component",
                found=", ".join(member.__name__ for member in found) or "none",
                hint="begin the names of helpers with an underscore",
            )
        return found[0]

    def _collect_aliases(self, kind: str) -> dict[str, Entry]:
        components = self.components(kind)
        entries: dict[str, Entry] = {}
        for key, component in components.items():
            for alias, preset in component.aliases.items():
                other = components.get(alias) or (entries[alias].component if alias in entries else None)
                if other:
                    raise _duplicate(kind, alias, _place(other), _place(component))
                entries[alias] = Entry(key, component, preset)
        return entries


def default_options(component: type[Component]) -> dict[str, OptionValue]:
    """Return the default of every option that a space may set."""
    specs = component.option_specs()
    defaults = component()
    return {name: getattr(defaults, name) for name, spec in specs.items() if not spec.from_context}


def _place(component: type[Component]) -> str:
    return component.__module__.replace(".", "/") + ".py"


def _duplicate(kind: str, name: str, first: str, second: str) -> RegistryError:
    return RegistryError(
        f"two components are named {kind} `{name}`",
        expected="each key and alias once",
        found=f"{first} and {second}",
        hint="rename one of them",
    )


def _checked(loaded: Any, kind: str, key: str, place: str) -> type[Component]:
    if inspect.isclass(loaded) and issubclass(loaded, Component):
        return loaded
    raise RegistryError(
        f"{kind} `{key}` is not a component",
        where=place,
        expected="a subclass of ir.component.Component",
        found=repr(loaded),
        hint="point the entry point at the class",
    )


@cache
def _installed_entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))


@cache
def default_registry() -> Registry:
    """Return the registry of the shipped components and the installed entry points."""
    return Registry(Path(__file__).parent, "searchspaces")


def components(kind: str) -> dict[str, type[Component]]:
    """Return every component of a kind by key."""
    return default_registry().components(kind)


def get(kind: str, name: str) -> type[Component]:
    """Return the component class of a key or alias.

    Raises:
        UnknownComponent: Nothing of that kind has this name; the message suggests the closest.
    """
    return default_registry().get(kind, name)
