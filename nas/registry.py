"""Find the open set: one file per entry in a package's folder, and entry points of third parties."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from ir.errors import InputError, did_you_mean

T = TypeVar("T")

# Files of a package that are machinery, not entries.
_RESERVED = frozenset({"__init__", "base"})


class Registry(Generic[T]):
    """Names of a package's entries and the classes they stand for; file stem = name.

    Args:
        kind: What an entry is called in messages.
        package: Import name of the package; also the entry-point group of third parties.
        base: Class that every entry inherits from.
    """

    def __init__(self, kind: str, package: str, base: type[T]) -> None:
        self._kind = kind
        self._package = package
        self._base = base

    def names(self) -> tuple[str, ...]:
        """Return every name, sorted; no entry is imported.

        Raises:
            InputError: Two entries share a name.
        """
        return tuple(sorted({*self._shipped(), *self._installed()}))

    def get(self, name: str) -> type[T]:
        """Return the class of a name.

        Raises:
            InputError: No such name, two entries share it, or the entry is not what it should be.
        """
        installed = self._installed()
        if name in self._shipped():
            module = import_module(f"{self._package}.{name}")
            return self._only_class(vars(module), module.__name__)
        if name in installed:
            loaded = installed[name].load()
            return self._checked(loaded, installed[name].value)
        raise InputError(
            f"unknown {self._kind} {name!r}",
            expected="one of " + ", ".join(self.names()),
            found=name,
            hint=did_you_mean(name, self.names()),
        )

    def make(self, name: str, options: dict[str, Any] | None = None) -> T:
        """Return an instance with options by keyword.

        Raises:
            InputError: As `get`, or an option that the class does not take.
        """
        kind = self.get(name)
        known = tuple(inspect.signature(kind).parameters)
        for option in options or ():
            if option not in known:
                raise InputError(
                    f"{self._kind} {name} has no option {option!r}",
                    expected="one of " + ", ".join(known) if known else "no options",
                    found=option,
                    hint=did_you_mean(option, known),
                )
        return kind(**(options or {}))

    def name_of(self, kind: type[Any]) -> str:
        """Return the name of an entry's class: its file's stem, or the class itself where it is registered nowhere."""
        package, _, stem = kind.__module__.rpartition(".")
        return stem if package == self._package else f"{kind.__module__}.{kind.__qualname__}"

    def _shipped(self) -> dict[str, str]:
        folder = Path(str(import_module(self._package).__file__)).parent
        stems = (path.stem for path in folder.glob("*.py"))
        return {stem: f"{self._package}.{stem}" for stem in stems if stem not in _RESERVED and not stem.startswith("_")}

    def _installed(self) -> dict[str, EntryPoint]:
        taken = self._shipped()
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self._package):
            if taken.setdefault(point.name, point.value) != point.value:
                raise InputError(
                    f"two {self._kind} entries are named {point.name!r}",
                    expected="each name once",
                    found=f"{taken[point.name]} and {point.value}",
                    hint="uninstall one of the packages, or rename its entry point",
                )
            found[point.name] = point
        return found

    def _only_class(self, members: dict[str, Any], module: str) -> type[T]:
        own = [
            member
            for name, member in members.items()
            if inspect.isclass(member) and member.__module__ == module and issubclass(member, self._base)
            if not name.startswith("_")
        ]
        return self._checked(own[0] if len(own) == 1 else None, module)

    def _checked(self, loaded: object, place: str) -> type[T]:
        if inspect.isclass(loaded) and issubclass(loaded, self._base):
            return loaded
        raise InputError(
            f"a {self._kind} entry is not one",
            where=place,
            expected=f"one public subclass of {self._base.__module__}.{self._base.__name__}",
            found=repr(loaded),
        )
