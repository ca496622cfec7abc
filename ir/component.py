"""What a component is: one class that declares its options and builds its graph.

A component file holds one public class, a frozen dataclass whose fields are its options:

    class MyMixer(TokenMixer):
        num_heads: int = option(4, minimum=1, doc="Heads.")
        causal: bool = context_option(True)

        def build(self, b: Builder, x: Tensor) -> Tensor: ...
        def reference(self, params: Params, x: Array) -> Array: ...

Shapes, cost, the torch module, the compiled kernels and the supernet are derived from `build`; `reference` is the
paper's equation in plain numpy, written independently of `build`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from ir._typing import dataclass_transform
from ir.errors import GraphError, did_you_mean
from ir.op import Array, snake_case
from ir.ops.structure import ComponentOptions, OptionValue
from ir.types import TensorType

if TYPE_CHECKING:
    from ir.builder import Builder, Tensor

Causality = Literal["causal", "either", "bidirectional"]
State = dict[str, TensorType]
Aliases = Mapping[str, Mapping[str, bool | int | float | str | None]]
T = TypeVar("T")
C = TypeVar("C", bound="Component")

KINDS = (
    "token_mixer",
    "channel_mixer",
    "reducer",
    "norm",
    "position",
    "block",
    "transition",
    "macro",
    "stem",
    "conditioner",
    "head",
)


@dataclass(frozen=True)
class OptionSpec:
    """What an option accepts.

    Attributes:
        doc: One line for people.
        choices: Allowed values; empty when any value of the type will do.
        minimum: Smallest allowed number.
        maximum: Largest allowed number.
        from_context: Filled by the macro (causality, position, length), not by the search space.
    """

    doc: str = ""
    choices: tuple[OptionValue, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    from_context: bool = False


def option(
    default: T,
    *,
    doc: str = "",
    choices: Sequence[OptionValue] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> T:
    """Declare an option of a component; its type is the annotation."""
    spec = OptionSpec(doc, tuple(choices), minimum, maximum)
    return dataclasses.field(default=default, metadata={"option": spec})


def context_option(default: T, *, doc: str = "", choices: Sequence[OptionValue] = ()) -> T:
    """Declare an option that the macro fills from the model around the component."""
    spec = OptionSpec(doc, tuple(choices), from_context=True)
    return dataclasses.field(default=default, metadata={"option": spec})


@dataclass(frozen=True)
class Case:
    """Options and sizes with which the conformance suite builds a component; sizes are odd on purpose.

    Attributes:
        options: Options, those of the context too.
        batch: Examples.
        time: Tokens.
        d_model: Width.
        grid: Rows and columns of tokens that lie on an image, for components that are `spatial`; stands for `time`.
    """

    options: Mapping[str, OptionValue] = dataclasses.field(default_factory=dict[str, OptionValue])
    batch: int = 2
    time: int = 7
    d_model: int = 12
    grid: tuple[int, int] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """`[B, T, D]`, or `[B, H, W, D]` on a grid."""
        return (self.batch, *(self.grid or (self.time,)), self.d_model)


@dataclass(frozen=True)
class Limit:
    """A case in which a component must equal another one of its kind: what the paper says it contains.

    Both are built at the sizes of the case and given the same input; tokens on a grid are one sequence to a component
    that is not spatial. The other component reads its parameters from this one's, by name, unless `adapt` makes them.

    Attributes:
        says: The claim, such as "a window over all tokens is full attention".
        case: Options of this component and sizes.
        other: Key of the other component.
        options: Its options, those of the context too.
        values: Parameters of this component that are set to a number throughout, by name.
        adapt: Makes the other component's parameters out of this one's.
    """

    says: str
    case: Case
    other: str
    options: Mapping[str, OptionValue] = dataclasses.field(default_factory=dict[str, OptionValue])
    values: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    adapt: Callable[[Mapping[str, Array]], Mapping[str, Array]] | None = None


@dataclass_transform(frozen_default=True, field_specifiers=(option, context_option))
class Component(ABC):  # noqa: B024 (what `build` takes depends on the kind)
    """Base of every component; subclasses become frozen dataclasses by being defined.

    Class attributes:
        kind: One of `KINDS`.
        paper: Where the equation comes from: authors, year, title, identifier.
        aliases: Other names in a search space, each with the options it presets.
        cases: What the conformance suite builds.
        limits: Cases in which it equals another component.
    """

    kind: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    aliases: ClassVar[Aliases] = {}
    cases: ClassVar[tuple[Case, ...]] = (Case(),)
    limits: ClassVar[tuple[Limit, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True)(cls)

    @classmethod
    def key(cls) -> str:
        """Registry key: snake_case of the class name, equal to the file name."""
        return snake_case(cls.__name__)

    @classmethod
    def option_specs(cls) -> dict[str, OptionSpec]:
        """What each option accepts, by name, in order."""
        return {field.name: field.metadata["option"] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def create(cls: type[C], options: Mapping[str, OptionValue], context: Mapping[str, OptionValue] | None = None) -> C:
        """Make a component from option values; context options absent from `options` come from `context`.

        Raises:
            GraphError: An unknown option, or a value the option does not accept.
        """
        specs = cls.option_specs()
        for name, value in options.items():
            if name not in specs:
                raise GraphError(f"{cls.key()} has no option '{name}'", hint=did_you_mean(name, specs))
            _check_value(f"{cls.key()}.{name}", value, specs[name])
        given = context or {}
        filled = {name: given[name] for name, spec in specs.items() if spec.from_context and name in given}
        return cls(**{**filled, **options})

    def options(self) -> ComponentOptions:
        """Option values that differ from their defaults, sorted by name: what a component node carries."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = [(field.name, getattr(self, field.name), field.default) for field in fields]
        return tuple(sorted((name, value) for name, value, default in values if value != default))


def _check_value(where: str, value: OptionValue, spec: OptionSpec) -> None:
    if spec.choices and value not in spec.choices:
        raise GraphError("value is not among the choices", where=where, expected=str(spec.choices), found=repr(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        if spec.minimum is not None and value < spec.minimum:
            raise GraphError("value is too small", where=where, expected=f"at least {spec.minimum}", found=str(value))
        if spec.maximum is not None and value > spec.maximum:
            raise GraphError("value is too large", where=where, expected=f"at most {spec.maximum}", found=str(value))


class TokenMixer(Component):
    """Mixes along the token axis: `[B, T, D] -> [B, T, D]`, or over the plane if spatial: `[B, H, W, D]` to the same.

    Class attributes:
        spatial: Whether its tokens lie on the grid of an image.
        causality: `causal` always, `bidirectional` never, or `either` by the context option `causal`.
        growth: Exponent of FLOPs in T for long T, everything but the projections' share counted.
        forms: Values of the option `form` that compute the same function, if it has one.
    """

    kind = "token_mixer"
    spatial: ClassVar[bool] = False
    causality: ClassVar[Causality] = "either"
    growth: ClassVar[float] = 1.0
    forms: ClassVar[tuple[str, ...]] = ()

    @property
    def is_causal(self) -> bool:
        """Whether output t depends on inputs up to t only."""
        return self.causality == "causal" or (self.causality == "either" and bool(getattr(self, "causal", False)))

    def check(self, d_model: int) -> str | None:
        """Why this mixer cannot be built at a width, or None if it can."""
        return None

    def check_tokens(self, tokens: tuple[int, ...]) -> str | None:
        """Why this mixer cannot mix so many tokens, `(T,)` or `(H, W)`, or None if it can."""
        return None

    def growth_exponent(self) -> float:
        """Exponent of FLOPs in T with these options; `growth` unless an option changes it."""
        return self.growth

    @abstractmethod
    def build(self, b: Builder, x: Tensor) -> Tensor:
        """Add the mixer's nodes for x `[B, T, D]`, or `[B, H, W, D]` if spatial; the result has the shape of x."""

    @abstractmethod
    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        """The paper's equation in numpy, parameters by their names inside the component."""

    def build_with_weights(self, b: Builder, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `build` for x `[B, T, D]`, and the attention weights `[B, H, T, T]` that reducers decide by.

        Raises:
            GraphError: The mixer has none.
        """
        raise GraphError(
            "a reducer asks for attention weights that this token mixer does not have",
            where=self.key(),
            expected="a token mixer such as softmax_attention",
            found=self.key(),
        )

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        """Types of what a causal mixer carries from token to token, for up to `max_len` tokens."""
        return {}

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One token of a causal mixer: x `[B, 1, D]` at run-time `position` (int32 scalar) and the new state.

        The default serves mixers without state.
        """
        return self.build(b, x), {}


class ChannelMixer(Component):
    """Mixes channels: `[..., D] -> [..., D]`, of each token by itself unless spatial.

    Class attributes:
        spatial: Whether it also looks at near tokens on the grid of an image, `[B, H, W, D]`, as a convolution between
            its matrices does.
    """

    kind = "channel_mixer"
    spatial: ClassVar[bool] = False

    def check(self, d_model: int) -> str | None:
        """Why this mixer cannot be built at a width, or None if it can."""
        return None

    @abstractmethod
    def build(self, b: Builder, x: Tensor) -> Tensor:
        """Add the nodes for x `[..., D]`."""

    @abstractmethod
    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        """The equation in numpy."""


class Norm(Component):
    """Normalises tokens: `[..., D] -> [..., D]`.

    Class attributes:
        tokenwise: Whether each token is normalised by itself.
    """

    kind = "norm"
    tokenwise: ClassVar[bool] = True

    @abstractmethod
    def build(self, b: Builder, x: Tensor) -> Tensor:
        """Add the nodes for x `[..., D]`."""

    @abstractmethod
    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        """The equation in numpy."""


class Reducer(Component):
    """Leaves fewer tokens between a layer's two branches: `[B, T, D] -> [B, M, D]`, M known when the graph is built.

    Class attributes:
        needs_attention: Whether it decides by the weights of the layer's attention, `[B, H, T, T]`.
    """

    kind = "reducer"
    needs_attention: ClassVar[bool] = False

    @abstractmethod
    def build(self, b: Builder, x: Tensor, weights: Tensor | None) -> Tensor:
        """Add the nodes for x `[B, T, D]` and, if needed, the attention weights `[B, H, T, T]`."""

    @abstractmethod
    def reference(self, params: Mapping[str, Array], x: Array, weights: Array | None) -> Array:
        """The equation in numpy."""


class Transition(Component):
    """Brings tokens on a grid from one stage of a pyramid to the next: `[B, H, W, C] -> [B, H', W', D]`."""

    kind = "transition"

    @abstractmethod
    def build(self, b: Builder, x: Tensor, d_model: int) -> Tensor:
        """Add the nodes for x `[B, H, W, C]`; returns `[B, H', W', d_model]`."""

    @abstractmethod
    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        """The equation in numpy."""


class Position(Component):
    """How attention and the stem learn where a token stands; each hook defaults to doing nothing.

    Class attributes:
        bounded: Whether it knows only the positions below the `max_len` it was built with.
    """

    kind = "position"
    bounded: ClassVar[bool] = False

    def embed(self, b: Builder, x: Tensor, max_len: int, position: Tensor | None = None) -> Tensor:
        """Add position to embeddings `[B, T, D]`; `position` is the run-time start when streaming."""
        return x

    def rotate(self, b: Builder, x: Tensor, position: Tensor | None = None) -> Tensor:
        """Turn queries or keys `[B, T, H, K]` by their position."""
        return x

    def check(self, head_dim: int) -> str | None:
        """Why heads of a size cannot be told their position this way, or None if they can."""
        return None

    def slopes(self, num_heads: int) -> tuple[float, ...] | None:
        """Slopes of a linear score bias, one a head."""
        return None
