"""One point of a search space: every choice made, nothing left open.

`Architecture` is what strategies propose, journals store and users pass around. Its `model` is the plain
configuration that a macro (`searchspaces/macros/`) turns into a graph; the two have nothing to do with how the
choices were made.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar

from ir.errors import InputError
from ir.hashing import canonical_hash
from ir.ops.structure import OptionValue
from searchspaces.registry import default_options, default_registry

if TYPE_CHECKING:
    from ir.graph import Graph
    from searchspaces.signature import Signature

# The stem and head that a task's signature calls for where the space names none.
_STEM_OF_MODALITY = {"tokens": "token_embedding", "image": "image_patches", "series": "series_patches"}
_HEAD_OF_OUTPUT = {"next_token": "language_model", "class": "classifier", "forecast": "forecaster"}


@dataclass(frozen=True)
class ComponentConfig:
    """A component with its options settled.

    Attributes:
        key: Registry key, never an alias.
        options: `(name, value)` pairs sorted by name; options that the macro fills in from context are absent.
    """

    key: str
    options: tuple[tuple[str, OptionValue], ...] = ()

    @classmethod
    def of(cls, key: str, **options: OptionValue) -> ComponentConfig:
        """Return the configuration of `key` with the options given by name."""
        return cls(key, tuple(sorted(options.items())))

    @property
    def values(self) -> dict[str, OptionValue]:
        """The options as a dictionary, ready for `**`."""
        return dict(self.options)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.key}({options})" if options else self.key


@dataclass(frozen=True)
class LayerConfig:
    """One block: how it is wired and what it mixes with."""

    wiring: ComponentConfig
    token_mixer: ComponentConfig
    channel_mixer: ComponentConfig


@dataclass(frozen=True)
class ModelConfig:
    """Everything a macro needs besides the task's signature.

    Attributes:
        d_model: Width of the residual stream.
        depth: Number of layers, `len(layers)`.
        norm: Normalisation of every block and of the output.
        position: How positions enter the model.
        causal: True for a decoder, False for a bidirectional encoder.
        layers: Blocks from the input to the output.
        stem: None takes the usual one for the signature, see `stem_for`.
        head: None takes the usual one for the signature, see `head_for`.
        macro: Key of the macro that assembles the model.
    """

    d_model: int
    depth: int
    norm: ComponentConfig
    position: ComponentConfig
    causal: bool
    layers: tuple[LayerConfig, ...]
    stem: ComponentConfig | None = None
    head: ComponentConfig | None = None
    macro: str = "isotropic"

    def stem_for(self, signature: Signature) -> ComponentConfig:
        """Return the stem, the usual one for the signature's modality where the space names none."""
        return self.stem or ComponentConfig(_STEM_OF_MODALITY[signature.modality])

    def head_for(self, signature: Signature) -> ComponentConfig:
        """Return the head, the usual one for the signature's output where the space names none."""
        return self.head or ComponentConfig(_HEAD_OF_OUTPUT[signature.output])


@dataclass(frozen=True)
class Architecture:
    """A model with every choice made, independent of the space it came from.

    Two architectures are equal when all their choices are; `canonical_hash` also sees through choices that build the
    same graph.

    Attributes:
        model: What the macro builds.
    """

    model: ModelConfig

    def graph(
        self,
        signature: Signature,
        *,
        batch: int = 1,
        seq_len: int | None = None,
        mode: Literal["forward", "step"] = "forward",
        max_len: int | None = None,
        expanded: bool = True,
    ) -> Graph:
        """Build the graph of the whole model.

        Args:
            signature: Inputs and outputs, from the task.
            batch: Sequences or images at once.
            seq_len: Positions at once; the signature's by default.
            mode: `forward` reads all positions at once, `step` one position and the state before it.
            max_len: Longest stream that `step` may see, for mixers whose state grows; the sequence length by default.
            expanded: Build composite operations out of primitives.

        Raises:
            InputError: The architecture does not fit the signature.
        """
        macro: Any = default_registry().get("macro", self.model.macro)()
        graph: Graph = macro.build_model(
            self.model, signature, batch=batch, seq_len=seq_len, mode=mode, max_len=max_len, expanded=expanded
        )
        return graph

    def canonical_hash(self, signature: Signature) -> str:
        """Return the canonical hash of the model's graph at batch 1, the key for de-duplication and caches."""
        return canonical_hash(self.graph(signature))

    def describe(self) -> str:
        """Say on one line what the model is, defaults left out; runs of equal layers are counted."""
        model = self.model
        whole = [("position", model.position), ("norm", model.norm), ("stem", model.stem), ("head", model.head)]
        parts = [f"d_model {model.d_model}", f"depth {model.depth}"]
        parts += [f"{kind} {_brief(kind, part)}" for kind, part in whole if part]
        runs = [(len(list(run)), layer) for layer, run in itertools.groupby(model.layers)]
        return f"{', '.join(parts)}: {' + '.join(f'{count} x [{_layer_text(layer)}]' for count, layer in runs)}"

    def __str__(self) -> str:
        return self.describe()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `from_dict` reads it back."""
        model = self.model
        return {
            "macro": model.macro,
            "d_model": model.d_model,
            "depth": model.depth,
            "causal": model.causal,
            "position": _component_data(model.position),
            "norm": _component_data(model.norm),
            "stem": _component_data(model.stem),
            "head": _component_data(model.head),
            "layers": [
                {slot: _component_data(getattr(layer, slot)) for slot in _LAYER_SLOTS} for layer in model.layers
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """Return the architecture that `to_dict` wrote.

        Raises:
            InputError: A key is missing or unknown, or a value is of the wrong type.
        """
        _check_keys(data, _MODEL_KEYS, "architecture")
        layers = data["layers"]
        if not _is_list(layers) or not layers:
            raise _malformed("architecture.layers", "a list of layers", layers)
        model = ModelConfig(
            d_model=_checked(data["d_model"], int, "architecture.d_model"),
            depth=_checked(data["depth"], int, "architecture.depth"),
            causal=_checked(data["causal"], bool, "architecture.causal"),
            norm=_component(data["norm"], "architecture.norm"),
            position=_component(data["position"], "architecture.position"),
            layers=tuple(_layer(layer, f"architecture.layers[{index}]") for index, layer in enumerate(layers)),
            stem=None if data["stem"] is None else _component(data["stem"], "architecture.stem"),
            head=None if data["head"] is None else _component(data["head"], "architecture.head"),
            macro=_checked(data["macro"], str, "architecture.macro"),
        )
        if model.depth != len(model.layers):
            raise _malformed("architecture.depth", f"{len(model.layers)}, the number of layers", model.depth)
        return cls(model)


_LAYER_SLOTS = ("wiring", "token_mixer", "channel_mixer")
_MODEL_KEYS = ("macro", "d_model", "depth", "causal", "position", "norm", "stem", "head", "layers")


def _layer_text(layer: LayerConfig) -> str:
    mixers = (("token_mixer", layer.token_mixer), ("channel_mixer", layer.channel_mixer), ("block", layer.wiring))
    return ", ".join(_brief(kind, config) for kind, config in mixers)


def _brief(kind: str, config: ComponentConfig) -> str:
    """Write a component without the options that have their defaults, as far as it is known here."""
    registry = default_registry()
    defaults = default_options(registry.get(kind, config.key)) if config.key in registry.keys(kind) else {}
    changed = {name: value for name, value in config.options if name not in defaults or value != defaults[name]}
    return str(ComponentConfig.of(config.key, **changed))


def _component_data(config: ComponentConfig | None) -> dict[str, dict[str, Any]] | None:
    return None if config is None else {config.key: {name: _option_data(value) for name, value in config.options}}


def _option_data(value: OptionValue) -> Any:
    return [_option_data(item) for item in value] if isinstance(value, tuple) else value


def _layer(data: Any, where: str) -> LayerConfig:
    _check_keys(data, _LAYER_SLOTS, where)
    return LayerConfig(*(_component(data[slot], f"{where}.{slot}") for slot in _LAYER_SLOTS))


def _component(data: Any, where: str) -> ComponentConfig:
    if not _is_mapping(data) or len(data) != 1:
        raise _malformed(where, "{name: {option: value}}", data)
    ((key, options),) = data.items()
    if not _is_mapping(options):
        raise _malformed(f"{where}.{key}", "a mapping of options", options)
    values = {name: _option(value, f"{where}.{key}.{name}") for name, value in options.items()}
    return ComponentConfig(key, tuple(sorted(values.items())))


def _option(value: Any, where: str) -> OptionValue:
    if _is_list(value):
        return tuple(_option(item, where) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise _malformed(where, "a number, a word, true, false or null", value)


_Plain = TypeVar("_Plain", bool, int, str)


def _checked(value: Any, kind: type[_Plain], where: str) -> _Plain:
    if type(value) is not kind:
        raise _malformed(where, f"a value of type {kind.__name__}", value)
    return value


def _check_keys(data: Any, keys: tuple[str, ...], where: str) -> None:
    if not _is_mapping(data) or set(data) != set(keys):
        raise _malformed(where, f"a mapping with the keys {', '.join(keys)}", list(data) if _is_mapping(data) else data)


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _malformed(where: str, expected: str, found: object) -> InputError:
    return InputError(
        "not an architecture",
        where=where,
        expected=expected,
        found=repr(found)[:80],
        hint="pass what Architecture.to_dict gave",
    )
