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
_STEM_OF_MODALITY = {
    "tokens": "token_embedding",
    "image": "image_patches",
    "series": "series_patches",
    "video": "video_patches",
}
_HEAD_OF_OUTPUT = {
    "next_token": "language_model",
    "class": "classifier",
    "forecast": "forecaster",
    "denoise": "denoiser",
}
_USUAL_CONDITIONER = "embedding_sum"


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


NO_REDUCER = ComponentConfig("none")


@dataclass(frozen=True)
class LayerConfig:
    """One block: how it is wired and what it mixes with; a reducer stands between its two branches."""

    wiring: ComponentConfig
    token_mixer: ComponentConfig
    channel_mixer: ComponentConfig
    reducer: ComponentConfig = NO_REDUCER


@dataclass(frozen=True)
class StageConfig:
    """Layers of one width.

    Attributes:
        d_model: Width of the residual stream.
        layers: Blocks from the stage's input to its output; none leaves a linear model between stem and head.
        transition: How tokens enter the stage; None in the first, whose tokens the stem makes.
    """

    d_model: int
    layers: tuple[LayerConfig, ...]
    transition: ComponentConfig | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Everything a macro needs besides the task's signature.

    Attributes:
        stages: Parts of equal width from the input to the output; one makes an isotropic model, several a pyramid.
        norm: Normalisation of every block, and of the output unless `final_norm` says otherwise.
        position: How positions enter the model.
        causal: True for a decoder, False for a bidirectional encoder.
        stem: None takes the usual one for the signature, see `stem_for`.
        head: None takes the usual one for the signature, see `head_for`.
        final_norm: Norm before the head; None takes `norm`.
        conditioner: What makes side inputs one vector; None takes the usual one, see `conditioner_for`.
        macro: What assembles the model.
    """

    stages: tuple[StageConfig, ...]
    norm: ComponentConfig
    position: ComponentConfig
    causal: bool
    stem: ComponentConfig | None = None
    head: ComponentConfig | None = None
    final_norm: ComponentConfig | None = None
    conditioner: ComponentConfig | None = None
    macro: ComponentConfig = ComponentConfig("staged")

    @property
    def d_model(self) -> int:
        """Width of the first stage."""
        return self.stages[0].d_model

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """Blocks of all stages."""
        return tuple(layer for stage in self.stages for layer in stage.layers)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def stem_for(self, signature: Signature) -> ComponentConfig:
        """Return the stem, the usual one for the signature's modality where the space names none."""
        return self.stem or ComponentConfig(_STEM_OF_MODALITY[signature.modality])

    def head_for(self, signature: Signature) -> ComponentConfig:
        """Return the head, the usual one for the signature's output where the space names none."""
        usual = "frame_forecaster" if signature.modality == "video" else _HEAD_OF_OUTPUT[signature.output]
        return self.head or ComponentConfig(usual)

    def conditioner_for(self, signature: Signature) -> ComponentConfig | None:
        """Return the conditioner, the usual one where the space names none, or None where there is no condition."""
        usual = ComponentConfig(_USUAL_CONDITIONER) if signature.condition else None
        return self.conditioner or usual


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
        mode: Literal["forward", "step", "prefill"] = "forward",
        max_len: int | None = None,
        expanded: bool = True,
    ) -> Graph:
        """Build the graph of the whole model.

        Args:
            signature: Inputs and outputs, from the task.
            batch: Sequences or images at once.
            seq_len: Positions at once; the signature's by default.
            mode: `forward` reads all positions at once, `step` one position and the state before it, `prefill` some
                positions, as many as `seq_len`, and the state before them.
            max_len: Longest stream that `step` may see, for mixers whose state grows; the sequence length by default.
            expanded: Build composite operations out of primitives.

        Raises:
            InputError: The architecture does not fit the signature.
        """
        chosen = self.model.macro
        macro: Any = default_registry().get("macro", chosen.key).create(chosen.values)
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
        whole += [("conditioner", model.conditioner)]
        parts = [f"d_model {'-'.join(str(stage.d_model) for stage in model.stages)}", f"depth {model.depth}"]
        parts += [f"{kind} {brief(kind, part)}" for kind, part in whole if part]
        return f"{', '.join(parts)}: {' | '.join(_stage_text(stage) for stage in model.stages)}"

    def __str__(self) -> str:
        return self.describe()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `from_dict` reads it back."""
        model = self.model
        return {
            "macro": _component_data(model.macro),
            "causal": model.causal,
            **{slot: _component_data(getattr(model, slot)) for slot in _MODEL_SLOTS},
            **({"conditioner": _component_data(model.conditioner)} if model.conditioner else {}),
            "stages": [
                {
                    "d_model": stage.d_model,
                    "transition": _component_data(stage.transition),
                    "layers": [
                        {slot: _component_data(getattr(layer, slot)) for slot in LAYER_SLOTS} for layer in stage.layers
                    ],
                }
                for stage in model.stages
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """Return the architecture that `to_dict` wrote.

        Raises:
            InputError: A key is missing or unknown, or a value is of the wrong type.
        """
        _check_keys(data, _MODEL_KEYS, "architecture", optional=("conditioner",))
        whole = {slot: _optional(data[slot], f"architecture.{slot}") for slot in _MODEL_SLOTS}
        model = ModelConfig(
            stages=tuple(
                _stage(stage, f"architecture.stages[{index}]")
                for index, stage in enumerate(_list(data["stages"], "architecture.stages", least=1))
            ),
            causal=_checked(data["causal"], bool, "architecture.causal"),
            norm=_component(data["norm"], "architecture.norm"),
            position=_component(data["position"], "architecture.position"),
            stem=whole["stem"],
            head=whole["head"],
            final_norm=whole["final_norm"],
            conditioner=_optional(data.get("conditioner"), "architecture.conditioner"),
            macro=_component(data["macro"], "architecture.macro"),
        )
        return cls(model)


def part_names(model: ModelConfig, signature: Signature) -> list[str]:
    """Name the different components of a model, from its input to its output."""
    whole = [model.stem_for(signature), model.position, model.norm]
    layers = [getattr(layer, slot) for layer in model.layers for slot in LAYER_SLOTS]
    transitions = [stage.transition for stage in model.stages if stage.transition]
    conditioner = model.conditioner_for(signature)
    configs = [*whole, *([conditioner] if conditioner else []), *transitions, *layers, model.head_for(signature)]
    return [key for key in dict.fromkeys(config.key for config in configs) if key != "none"]


LAYER_SLOTS = ("wiring", "token_mixer", "channel_mixer", "reducer")
_MODEL_SLOTS = ("position", "norm", "final_norm", "stem", "head")
_MODEL_KEYS = ("macro", "causal", *_MODEL_SLOTS, "stages")


def _stage(data: Any, where: str) -> StageConfig:
    _check_keys(data, ("d_model", "transition", "layers"), where)
    layers = _list(data["layers"], f"{where}.layers")
    return StageConfig(
        _checked(data["d_model"], int, f"{where}.d_model"),
        tuple(_layer(layer, f"{where}.layers[{index}]") for index, layer in enumerate(layers)),
        _optional(data["transition"], f"{where}.transition"),
    )


def _list(data: Any, where: str, *, least: int = 0) -> list[Any]:
    if not _is_list(data) or len(data) < least:
        raise _malformed(where, "a list" if least == 0 else f"a list of at least {least}", data)
    return data


def _optional(data: Any, where: str) -> ComponentConfig | None:
    return None if data is None else _component(data, where)


def _stage_text(stage: StageConfig) -> str:
    runs = [(len(list(run)), layer) for layer, run in itertools.groupby(stage.layers)]
    return " + ".join(f"{count} x [{_layer_text(layer)}]" for count, layer in runs) or "no layers"


def _layer_text(layer: LayerConfig) -> str:
    mixers = [("token_mixer", layer.token_mixer), ("channel_mixer", layer.channel_mixer), ("block", layer.wiring)]
    mixers += [("reducer", layer.reducer)] if layer.reducer != NO_REDUCER else []
    return ", ".join(brief(kind, config) for kind, config in mixers)


def brief(kind: str, config: ComponentConfig) -> str:
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
    _check_keys(data, LAYER_SLOTS, where)
    return LayerConfig(*(_component(data[slot], f"{where}.{slot}") for slot in LAYER_SLOTS))


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


def _check_keys(data: Any, keys: tuple[str, ...], where: str, optional: tuple[str, ...] = ()) -> None:
    if not _is_mapping(data) or set(data) - set(optional) != set(keys):
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
