"""Checks what a space file says about components against the components themselves.

The schema knows that a mixer is a name with options; here the name must exist, the options must be the component's
own, and their values of the right type and within bounds. What comes out is a `SlotDomain` that needs no more checks
of that sort.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from ir.component import Component, OptionSpec, TokenMixer
from ir.errors import did_you_mean
from ir.ops.structure import OptionValue
from searchspaces.domains import Axis, ComponentDomain, Context, SlotDomain
from searchspaces.order import UNORDERED, Order
from searchspaces.registry import Entry, Registry, UnknownComponent, default_options
from searchspaces.schema import LayerSlotSection, SlotSection, written
from searchspaces.violations import shown
from searchspaces.yaml_source import DataPath, Source, format_path

_SECTIONS = ("model", "block", "stages")
_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a word", types.NoneType: "null"}


@dataclass(frozen=True)
class Checker:
    """Turns the slots of one file into domains.

    Attributes:
        source: The file, for its places.
        registry: Where components come from.
        causal: The space holds decoders, where a token mixer must not look ahead.
    """

    source: Source
    registry: Registry
    causal: bool

    def slot(self, kind: str, section: SlotSection | LayerSlotSection, path: DataPath) -> SlotDomain:
        """Return what may fill a slot.

        Args:
            kind: Kind of component.
            section: The slot as the schema read it.
            path: Where it stands in the file.

        Raises:
            SpaceError: A component or option is unknown, given twice, of the wrong type or out of bounds, or a
                mixer looks ahead in a decoder.
        """
        if isinstance(section, LayerSlotSection) and section.pattern is not None:
            turns: list[SlotDomain] = []
            for index, turn in enumerate(section.pattern):
                turns += [self.slot(kind, turn.slot, (*path, "pattern", index))] * turn.times
            entries = tuple({id(entry): entry for turn in turns for entry in turn.entries}.values())
            return SlotDomain(kind, format_path(path), entries, pattern=tuple(turns))
        found: list[ComponentDomain] = []
        for index, item in enumerate(section.choice or ()):
            ((name, options),) = item.items()
            place = self.source.resolve((*path, "choice", index, name))
            entry = self._component(kind, _place_name(path), name, options, place)
            if any(_overlap(entry, other) for other in found):
                raise self.source.error(
                    f"`{name}` is offered twice",
                    place,
                    expected="each component once",
                    found=f"`{name}` again, with options that the other one allows too",
                    hint="merge the two: give each option a {choice: [...]}",
                    at_key=True,
                )
            found.append(entry)
        per_layer = isinstance(section, LayerSlotSection) and section.per_layer
        return SlotDomain(kind, format_path(path), tuple(found), per_layer)

    def check_fit(self, slot: SlotDomain, contexts: Sequence[Context], path: DataPath) -> None:
        """Check that each component of a slot can be built in some context.

        Raises:
            SpaceError: One cannot, whatever is chosen for its options and above it.
        """
        for index, part in enumerate(slot.pattern):
            self.check_fit(part, contexts, (*path, "pattern", index))
        for index, entry in enumerate(() if slot.pattern else slot.entries):
            problem = entry.first_problem(contexts)
            if problem:
                widths = sorted({context.d_model for context in contexts})
                raise self.source.error(
                    f"`{entry.label}` can never be built",
                    self.source.resolve((*path, "choice", index, entry.label)),
                    expected=f"options that fit d_model {_listed(widths)}",
                    found=problem,
                    hint="change its options or the width so that at least one combination fits",
                    at_key=True,
                )

    def _component(
        self, kind: str, slot: str, name: str, options: Mapping[str, Any], path: DataPath
    ) -> ComponentDomain:
        try:
            entry = self.registry.lookup(kind, name)
        except UnknownComponent as error:
            raise self.source.error(
                f"unknown {slot} `{name}`",
                path,
                expected=error.expected,
                found=error.found,
                hint=error.hint,
                at_key=path[-1] == name,
            ) from error
        self._refuse_lookahead(entry, name, path)
        domains = {option: self._option(entry, name, option, domain, path) for option, domain in options.items()}
        defaults = default_options(entry.component) | dict(entry.preset)
        single = {option: values[0] for option, values in domains.items() if len(values) == 1}
        free = tuple(sorted((option, values) for option, values in domains.items() if len(values) > 1))
        settled = {option: value for option, value in (defaults | single).items() if option not in dict(free)}
        return ComponentDomain(name, entry.key, entry.component, tuple(sorted(settled.items())), free)

    def _refuse_lookahead(self, entry: Entry, name: str, path: DataPath) -> None:
        component = entry.component
        if self.causal and issubclass(component, TokenMixer) and component.causality == "bidirectional":
            raise self.source.error(
                f"`{name}` looks ahead, which a decoder must not",
                path,
                expected="a token mixer that can be causal",
                found=f"`{name}`, which is always bidirectional",
                hint="remove it, or write `causal: false` under `model` if the task allows it",
                at_key=True,
            )

    def _option(self, entry: Entry, label: str, name: str, domain: Any, path: DataPath) -> Sequence[OptionValue]:
        """Return the checked values that an option may take."""
        specs = entry.component.option_specs()
        own = [option for option, spec in specs.items() if not spec.from_context and option not in entry.preset]
        place = self.source.resolve((*path, name))
        if name not in own:
            raise self.source.error(
                f"`{label}` has no option `{name}`" if name not in specs else f"`{name}` is not for the space to set",
                place,
                expected=f"one of {', '.join(own)}" if own else "no options",
                found=f"`{name}`",
                hint=did_you_mean(name, own) or f"remove it: {_why_not(name, label, entry)}",
                at_key=True,
            )
        kinds = _accepted_types(entry.component, name)
        form, values = written(domain)
        if form == "range" and not specs[name].choices:
            for value in (values[0], values[min(1, len(values) - 1)], values[-1]):  # those between are of the same type
                self._value(name, value, specs[name], kinds, (*place, form))
            return values if int in kinds else tuple(float(cast(float, value)) for value in values)
        if form == "choice":
            places = [(*place, form, index) for index in range(len(values))]
        else:
            places = [(*place, form) if form == "range" else place] * len(values)
        checked = (self._value(name, value, specs[name], kinds, at) for value, at in zip(values, places, strict=True))
        return ascending(tuple(checked))

    def _value(
        self, name: str, value: OptionValue, spec: OptionSpec, kinds: tuple[type, ...], place: DataPath
    ) -> OptionValue:
        if type(value) is int and int not in kinds and float in kinds:
            value = float(value)
        problem: str | None = None
        expected = " or ".join(str(choice) for choice in spec.choices)
        if type(value) not in kinds:
            problem = "an option of the wrong type"
            expected = expected or " or ".join(_TYPE_NAMES[kind] for kind in kinds)
        elif spec.choices and value not in spec.choices:
            problem = "a value that the option does not have"
        elif isinstance(value, (int, float)) and spec.minimum is not None and value < spec.minimum:
            problem, expected = "too small", f"at least {spec.minimum:.12g}"
        elif isinstance(value, (int, float)) and spec.maximum is not None and value > spec.maximum:
            problem, expected = "too large", f"at most {spec.maximum:.12g}"
        if problem is None:
            return value
        close = did_you_mean(value, [str(choice) for choice in spec.choices]) if isinstance(value, str) else None
        raise self.source.error(
            problem, place, expected=expected, found=shown(value), hint=close or f"{name}: {spec.doc}"
        )


def value_axis(path: str, domain: Any) -> Axis:
    """Return the axis of a fixed value, a choice or a range of the schema."""
    form, values = written(domain)
    return Axis(path, values if form == "range" else ascending(values))


def ascending(values: Sequence[OptionValue]) -> tuple[OptionValue, ...]:
    """Return numbers from the smallest to the largest, and words as they stand."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return tuple(sorted(numbers)) if len(numbers) == len(values) else tuple(values)


@cache
def _accepted_types(component: type[Component], name: str) -> tuple[type, ...]:
    """Return the plain types that an option's annotation allows."""
    annotation = get_type_hints(component)[name]
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    kinds: dict[type, None] = {}
    for member in members:
        literals: tuple[object, ...] = get_args(member) if get_origin(member) is Literal else ()
        kinds |= {type(literal): None for literal in literals} or {member: None}
    return tuple(kinds)


def _place_name(path: DataPath) -> str:
    """Name the place in the model that a path leads to."""
    return next(part for part in path if isinstance(part, str) and part not in _SECTIONS).replace("_", " ")


def _why_not(name: str, label: str, entry: Entry) -> str:
    if name in entry.preset:
        return f"`{label}` is `{entry.key}` with {name} set to {entry.preset[name]}"
    if name in entry.component.option_specs():
        return "it follows from the model around the component"
    return "it would have no effect"


def _overlap(first: ComponentDomain, second: ComponentDomain) -> bool:
    """Tell whether two entries of a slot can give the same component."""
    if first.label == second.label:
        return True
    if first.key != second.key:
        return False
    mine, theirs = ({name: (value,) for name, value in entry.settled} | dict(entry.free) for entry in (first, second))
    return all(set(mine[name]) & set(theirs[name]) for name in mine)


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths)) if len(widths) <= 6 else f"from {widths[0]} to {widths[-1]}"


def require_offered(required: Sequence[str], slots: Sequence[SlotDomain], source: Source) -> tuple[str, ...]:
    """Return the keys behind `at_least_one_of`, aliases resolved.

    Raises:
        SpaceError: A name is not among the components that the blocks offer.
    """
    offered = {name: entry.key for slot in slots for entry in slot.entries for name in (entry.key, entry.label)}
    for index, name in enumerate(required):
        if name not in offered:
            raise source.error(
                f"`{name}` is required but not offered",
                ("constraints", "at_least_one_of", index),
                expected=f"components among {', '.join(sorted(offered))}",
                found=f"`{name}`",
                hint=did_you_mean(name, offered) or f"add `{name}` to block.token_mixer, or remove it here",
            )
    return tuple(dict.fromkeys(offered[name] for name in required))


def read_order(groups: Sequence[Sequence[str]], blocks: Sequence[Sequence[SlotDomain]], source: Source) -> Order:
    """Return the order behind `order`: groups of token mixers, or of channel mixers, aliases resolved.

    Raises:
        SpaceError: A name is not offered, stands in two groups, or names both kinds of component.
    """
    if not groups:
        return UNORDERED
    slots = {"token_mixer": 1, "channel_mixer": 2}
    offered = {
        kind: {
            name: entry.key for block in blocks for entry in block[slot].entries for name in (entry.key, entry.label)
        }
        for kind, slot in slots.items()
    }
    first = groups[0][0]
    kind = "channel_mixer" if first in offered["channel_mixer"] else "token_mixer"
    seen: set[str] = set()
    for number, group in enumerate(groups):
        for index, name in enumerate(group):
            key = offered[kind].get(name)
            if key is None or key in seen:
                raise source.error(
                    f"`{name}` cannot be ordered",
                    ("constraints", "order", number, index),
                    expected=f"groups of different {kind}s among {', '.join(sorted(offered[kind]))}",
                    found=f"`{name}`" if key is None else f"`{name}` a second time",
                    hint="name each component once" if key else did_you_mean(name, offered[kind]),
                )
            seen.add(key)
    return Order(slots[kind], tuple(frozenset(offered[kind][name] for name in group) for group in groups))
