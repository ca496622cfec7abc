"""What a task hands to a model and wants back: the shapes around a search space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, cast, get_args

from ir.errors import InputError, did_you_mean
from ir.types import TensorType

Modality: TypeAlias = Literal["tokens", "image", "series", "video"]
Output: TypeAlias = Literal["next_token", "class", "forecast", "denoise"]

# The sizes that must be positive; every other size must be left at 0.
_SIZES_OF_MODALITY: Final[dict[str, frozenset[str]]] = {
    "tokens": frozenset({"seq_len", "vocab_size"}),
    "image": frozenset({"image_size", "channels"}),
    "series": frozenset({"seq_len", "variates"}),
    "video": frozenset({"seq_len", "image_size", "channels"}),
}
_SIZES_OF_OUTPUT: Final[dict[str, frozenset[str]]] = {
    "next_token": frozenset(),
    "class": frozenset({"num_classes"}),
    "forecast": frozenset({"horizon"}),
    "denoise": frozenset({"out_channels"}),
}
_OUTPUTS_OF_MODALITY: Final[dict[str, tuple[str, ...]]] = {
    "tokens": ("next_token", "class"),
    "image": ("class", "denoise"),
    "series": ("forecast",),
    "video": ("forecast",),
}
_SIZES: Final = (
    "seq_len",
    "vocab_size",
    "image_size",
    "channels",
    "variates",
    "num_classes",
    "horizon",
    "out_channels",
)
_OUTPUT_NAMES: Final[dict[str, str]] = {"forecast": "forecast", "denoise": "noise"}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Side inputs of every model of a task: what is known of each example besides the main input.

    Attributes:
        timestep: Whether there is the input `timestep` float32 [B], such as the time of a diffusion process.
        num_labels: Values of the input `label` int32 [B], the one that stands for no label included; 0 for no input.

    Raises:
        InputError: There is no input at all, or the number of labels is none.
    """

    timestep: bool = False
    num_labels: int = 0

    def __post_init__(self) -> None:
        labels: object = self.num_labels
        if type(labels) is not int or labels < 0:
            raise _bad_size("condition.num_labels", "an integer of at least 1, or 0 for no labels", labels)
        if not (self.timestep or self.num_labels):
            raise InputError(
                "a condition without inputs",
                where="signature.condition",
                expected="`timestep: true`, a positive `num_labels`, or both",
                found="neither",
            )

    def inputs(self, batch: int) -> dict[str, TensorType]:
        """Types of the graph's side inputs at a batch size, by name."""
        found = {"timestep": TensorType((batch,))} if self.timestep else {}
        return found | ({"label": TensorType((batch,), "int32")} if self.num_labels else {})


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Inputs and outputs of every model of a task.

    A size that does not apply is 0. The graph's input is named after the modality (`tokens` int32 [B,T], `image`
    float32 [B,H,W,C], `series` float32 [B,T,variates], `video` float32 [B,T,H,W,C]); its output is `logits`
    ([B,T,vocab] or [B,classes]), `forecast` ([B,horizon,variates] or [B,horizon,H,W,C]) or `noise`
    ([B,H,W,out_channels]). A condition adds inputs.

    Attributes:
        modality: Kind of input, and its name.
        output: What the model predicts.
        seq_len: Input positions of tokens and series, frames of a video.
        vocab_size: Distinct tokens.
        image_size: Height and width of a square image or frame, pixels.
        channels: Values in a pixel.
        variates: Values at one time of a series.
        num_classes: Classes to tell apart.
        horizon: Future times or frames to forecast.
        out_channels: Values that are predicted of the noise in a pixel: its channels, or twice as many with variances.
        condition: What else a model is told of each example; None for nothing.

    Raises:
        InputError: A size that applies is missing, one that does not is given, or modality, output and condition do
            not go together.
    """

    modality: Modality
    output: Output
    seq_len: int = 0
    vocab_size: int = 0
    image_size: int = 0
    channels: int = 0
    variates: int = 0
    num_classes: int = 0
    horizon: int = 0
    out_channels: int = 0
    condition: Condition | None = None

    def __post_init__(self) -> None:
        _require_word("modality", self.modality, get_args(Modality))
        _require_word("output", self.output, _OUTPUTS_OF_MODALITY[self.modality])
        needed = _SIZES_OF_MODALITY[self.modality] | _SIZES_OF_OUTPUT[self.output]
        for name in _SIZES:
            size: object = getattr(self, name)
            if name in needed and not (type(size) is int and size > 0):
                raise _bad_size(name, "an integer of at least 1", size)
            if name not in needed and size != 0:
                raise _bad_size(name, f"0: a {self.modality} to {self.output} signature has no {name}", size)
        given = cast(object, self.condition)
        if not isinstance(given, Condition | None):
            raise _bad_size("condition", "a Condition, or None", given)
        if given is not None and self.output == "next_token":
            raise InputError(
                "a model of the next token takes no condition, because it may stream",
                where="signature.condition",
                expected="none, or another output",
                found=f"output {self.output}",
            )

    @property
    def input_name(self) -> str:
        """Name of the graph's input."""
        return self.modality

    @property
    def output_name(self) -> str:
        """Name of the graph's output."""
        return _OUTPUT_NAMES.get(self.output, "logits")

    def input_shape(self, batch: int) -> tuple[int, ...]:
        """Shape of the graph's input at a batch size."""
        times = () if self.modality == "image" else (self.seq_len,)
        return (batch, *times, *self._values)

    @property
    def _values(self) -> tuple[int, ...]:
        """Shape of the numbers at one time: none of tokens, variates of a series, pixels of an image or frame."""
        if self.modality in ("image", "video"):
            return (self.image_size, self.image_size, self.channels)
        return (self.variates,) if self.modality == "series" else ()

    @property
    def input_dtype(self) -> str:
        """Element type of the graph's input."""
        return "int32" if self.modality == "tokens" else "float32"

    def output_shape(self, batch: int) -> tuple[int, ...]:
        """Shape of the graph's output at a batch size."""
        if self.output == "next_token":
            return (batch, self.seq_len, self.vocab_size)
        if self.output == "denoise":
            return (batch, self.image_size, self.image_size, self.out_channels)
        return (batch, self.num_classes) if self.output == "class" else (batch, self.horizon, *self._values)

    @property
    def positions(self) -> int:
        """Input positions of one example: tokens, times or pixels."""
        return max(self.seq_len, 1) * max(self.image_size, 1) ** 2


def _require_word(name: str, word: str, choices: tuple[str, ...]) -> None:
    if word not in choices:
        raise InputError(
            f"unknown {name} of a signature",
            expected=", ".join(choices),
            found=repr(word),
            hint=did_you_mean(str(word), choices),
        )


def _bad_size(name: str, expected: str, found: object) -> InputError:
    return InputError(f"bad {name} of a signature", where=f"signature.{name}", expected=expected, found=repr(found))
