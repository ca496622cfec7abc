"""Bases of the components that know a task's signature, and what several components build alike.

The kinds that know nothing of tasks (mixers, norms, positions) have their bases in `ir.component`.
Shape letters: B batch, T tokens, D model width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final, Generic, Literal, TypeVar

from ir.component import Case, Component
from ir.op import Array
from ir.types import Axes

if TYPE_CHECKING:
    from ir.builder import Builder, Tensor
    from ir.graph import Graph
    from searchspaces.architecture import ModelConfig
    from searchspaces.signature import Condition, Signature

Activation = Literal["gelu", "relu", "relu2", "silu", "tanh"]
X = TypeVar("X")

ACTIVATIONS: Final[dict[str, Callable[[Builder, Tensor], Tensor]]] = {
    "gelu": lambda b, x: b.gelu(x),
    "relu": lambda b, x: b.relu(x),
    "relu2": lambda b, x: b.square(b.relu(x)),
    "silu": lambda b, x: b.silu(x),
    "tanh": lambda b, x: b.tanh(x),
}
"""Activations by name; relu2 is the squared ReLU (So et al. 2021, "Primer", arXiv 2109.08668)."""


def _unchanged(x: X) -> X:
    return x


@dataclass(frozen=True)
class LayerParts(Generic[X]):
    """What a wiring puts together, as functions on tensors of a graph or on numpy arrays.

    Attributes:
        mix: The token mixer.
        channel: The channel mixer; None leaves that branch of the layer out.
        norm: A norm by its name in the layer; each name has its own parameters.
        parameter: A parameter of the wiring itself, by name, axes and initial distribution.
        reduce: The reducer, to be called on what the first branch leaves; gives back its argument where there is none.
        condition: The condition of each example `[B, C]`; None in models without one.
    """

    mix: Callable[[X], X]
    channel: Callable[[X], X] | None
    norm: Callable[[str, X], X]
    parameter: Callable[[str, Axes, str], X]
    reduce: Callable[[X], X] = _unchanged
    condition: X | None = None


class Block(Component):
    """A wiring: one layer `[..., D] -> [..., D]` out of its parts; with a reducer it leaves fewer tokens.

    Class attributes:
        normalises_output: Whether a norm is the last thing a layer does, so that a model needs none after it.
        reduces: Whether it has a place for a reducer.
        conditioned: Whether it reads the condition.
    """

    kind = "block"
    normalises_output: ClassVar[bool] = False
    reduces: ClassVar[bool] = False
    conditioned: ClassVar[bool] = False

    @abstractmethod
    def build(self, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        """Add the layer's nodes for x `[B, T, D]` or `[B, H, W, D]`."""

    @abstractmethod
    def reference(self, x: Array, layer: LayerParts[Array]) -> Array:
        """The paper's equation in numpy."""


@dataclass(frozen=True)
class EndCase(Case):
    """A case of a stem, conditioner or head: its signature besides the options; a head gets `time` tokens."""

    signature: Signature = field(kw_only=True)


class Stem(Component):
    """A task's input to tokens `[B, T, D]`.

    Class attributes:
        modality: The modality of signature that it reads.
    """

    kind = "stem"
    modality: ClassVar[str] = ""

    def check(self, signature: Signature) -> str | None:
        """Why this stem cannot read a signature's input, or None if it can."""
        return None if signature.modality == self.modality else f"it reads {self.modality}, not {signature.modality}"

    @abstractmethod
    def num_tokens(self, signature: Signature) -> int:
        """Tokens that one example becomes."""

    def grid(self, signature: Signature) -> tuple[int, int] | None:
        """Rows and columns of the tokens where they are an image in row order, else None."""
        return None

    @abstractmethod
    def build(self, b: Builder, x: Tensor, d_model: int, signature: Signature) -> Tensor:
        """Add the nodes from a signature's input to `[B, T, D]`, or to `[B, H, W, D]` where the tokens have a grid."""

    @abstractmethod
    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        """The same in numpy, parameters by their names inside the stem."""


class Conditioner(Component):
    """The side inputs of each example to one vector, which wirings and heads read: the condition `[B, D]`."""

    kind = "conditioner"

    @abstractmethod
    def build(self, b: Builder, inputs: Mapping[str, Tensor], d_model: int, condition: Condition) -> Tensor:
        """Add the nodes from the side inputs of a signature, by name, to `[B, D]`."""

    @abstractmethod
    def reference(self, params: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
        """The same in numpy, parameters by their names inside the conditioner."""


class Head(Component):
    """Tokens `[B, T, D]` to a task's output.

    Class attributes:
        output: The output of signature that it makes.
        modalities: The modalities of signature that it serves.
        shared: Full names of parameters of other parts that it may read.
    """

    kind = "head"
    output: ClassVar[str] = ""
    modalities: ClassVar[tuple[str, ...]] = ("tokens", "image", "series")
    shared: ClassVar[tuple[str, ...]] = ()

    @property
    def conditioned(self) -> bool:
        """Whether it reads the condition."""
        return False

    def check(self, signature: Signature) -> str | None:
        """Why this head cannot make a signature's output, or None if it can."""
        if signature.modality not in self.modalities:
            return f"it serves {', '.join(self.modalities)}, not {signature.modality}"
        return None if signature.output == self.output else f"it makes {self.output}, not {signature.output}"

    def num_tokens(self, signature: Signature) -> int | None:
        """Tokens that one example may have become, or None if any number will do."""
        return None

    @abstractmethod
    def build(self, b: Builder, x: Tensor, signature: Signature) -> Tensor:
        """Add the nodes from x `[B, T, D]` to a signature's output."""

    @abstractmethod
    def reference(self, params: Mapping[str, Array], x: Array, signature: Signature) -> Array:
        """The same in numpy, own parameters by their names inside the head, shared ones by their full names."""

    def build_conditioned(self, b: Builder, x: Tensor, signature: Signature, condition: Tensor) -> Tensor:
        """As `build` in a model that has a condition `[B, C]`, which most heads do not read."""
        return self.build(b, x, signature)

    def reference_conditioned(
        self, params: Mapping[str, Array], x: Array, signature: Signature, condition: Array
    ) -> Array:
        """As `reference` in a model that has a condition `[B, C]`."""
        return self.reference(params, x, signature)


class Macro(Component):
    """How stem, layers and head make a model."""

    kind = "macro"

    @abstractmethod
    def build_model(
        self,
        model: ModelConfig,
        signature: Signature,
        *,
        batch: int = 1,
        seq_len: int | None = None,
        mode: Literal["forward", "step", "prefill"] = "forward",
        max_len: int | None = None,
        expanded: bool = True,
    ) -> Graph:
        """The graph of a whole model; arguments as in `Architecture.graph`.

        Raises:
            InputError: The model does not fit the signature, or a part does not fit the model.
        """
