"""Streams: models that read token by token, or some tokens at once, and carry a state from call to call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from codegen.functions import Carried, LoadedFunction, Role
from codegen.manifest import BATCH, PREFILL, STEP
from ir.errors import InputError

if TYPE_CHECKING:
    from codegen.runtime import LoadedModel, Output

_TOKENS = 1  # axis of tokens of what a stream reads and gives


@dataclass(frozen=True)
class State:
    """What a stream carries; never changed, so it can be kept, handed on and taken up again.

    Attributes:
        position: Tokens read so far.
        arrays: The model's own arrays by name, none before the first token.
    """

    position: int = 0
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])


class Stream:
    """One sequence, or a batch of them, on its way through a model; made by `LoadedModel.stream`.

    Args:
        model: A model with a function `step`.
        state: Where to begin; at the start of a sequence when None.
    """

    def __init__(self, model: LoadedModel, state: State | None = None) -> None:
        self._model = model
        self._state = state or State()

    @property
    def state(self) -> State:
        """What has been read so far, for the model."""
        dict(self._state.arrays)  # leaves the buffers of the model, where the next token would change it
        return self._state

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return self._state.position

    def fork(self) -> Stream:
        """Return another stream that goes on from here; the two do not share anything that changes."""
        return Stream(self._model, self.state)

    def step(self, *arrays: Any, **named: Any) -> Output:
        """Read one token, as `LoadedModel.step`."""
        output, self._state = self._model.advance(STEP, arrays, named, self._state, last_use=True)
        return output

    def feed(self, *arrays: Any, **named: Any) -> Output:
        """Read any number of tokens, `[B, T]`, through `prefill` as far as it fits, else one by one.

        Returns:
            The outputs of all of them, along the same axis.

        Raises:
            InputError: An input does not fit, or the stream would be longer than the model can see. What was read
                until then counts.
        """
        step = self._model.role(STEP)
        specs = step.first.given
        given = step.check_names(arrays, named, specs)
        count = _length(given, specs)
        pieces: list[dict[str, np.ndarray]] = []
        done = 0
        while done < count:
            taken, role = self._next(count - done)
            piece = {name: array[:, done : done + taken] for name, array in given.items()}
            output, self._state = self._model.advance(role, (), piece, self._state, last_use=True)
            pieces.append(output if isinstance(output, dict) else {"": output})
            done += taken
        joined = {name: np.concatenate([piece[name] for piece in pieces], axis=_TOKENS) for name in pieces[0]}
        return joined[""] if set(joined) == {""} else joined

    def _next(self, left: int) -> tuple[int, str]:
        """Return how many tokens to read at once, and the role of what reads them."""
        fitting = [length for length in self._model.prefill_lengths if length <= left]
        return (max(fitting), PREFILL) if fitting else (1, STEP)


def start(function: LoadedFunction, state: State, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return what a function carries at a state: its position, and zeros at the start of a stream.

    Whoever calls it holds the lock of the function's model until the arrays have been used.

    Raises:
        InputError: The state is another model's, or another batch's.
    """
    arrays: dict[str, np.ndarray] = {}
    carried = state.arrays.seen() if isinstance(state.arrays, Carried) else state.arrays
    for spec in function.inputs:
        if spec.name == function.position:
            arrays[spec.name] = np.asarray(state.position, spec.dtype)
        elif spec.name in function.carried:
            axes = spec.axes or (None,) * len(spec.shape)
            shape = tuple(sizes.get(axis, n) if axis else n for axis, n in zip(axes, spec.shape, strict=True))
            array = np.zeros(shape, spec.dtype) if not carried else carried.get(spec.name)
            if array is None or array.shape != shape or array.dtype != spec.dtype:
                raise InputError(
                    "the state is not one of this stream",
                    where=spec.name,
                    expected=f"{spec.dtype}{list(shape)}",
                    found="none" if array is None else f"{array.dtype}{list(array.shape)}",
                    hint=f"a state keeps its {BATCH}; begin another stream for another one",
                )
            arrays[spec.name] = array
    return arrays


def check_room(function: LoadedFunction, state: State, tokens: int) -> None:
    """Check that a stream may go on.

    Raises:
        InputError: It is as long as the model can see.
    """
    bounds = [spec.below for spec in function.inputs if spec.name == function.position and spec.below is not None]
    if bounds and state.position + tokens > bounds[0] + tokens_of(function) - 1:
        raise InputError(
            "the stream is longer than the model was compiled for",
            where=function.name,
            expected=f"at most {bounds[0] + tokens_of(function) - 1} tokens",
            found=f"{state.position + tokens}",
            hint="compile it with a larger --seq-len, or begin another stream",
        )


def tokens_of(function: LoadedFunction) -> int:
    """Return how many tokens one call reads."""
    return function.given[0].shape[_TOKENS]


def lengths(role: Role) -> Sequence[int]:
    """Return how many tokens the functions of a role read."""
    return [tokens_of(function) for function in role.functions]


def _length(given: Mapping[str, np.ndarray], specs: Sequence[Any]) -> int:
    counts = {array.shape[_TOKENS] if array.ndim > _TOKENS else 0 for array in given.values()}
    if len(counts) != 1 or 0 in counts:
        raise InputError(
            "a stream reads tokens",
            where=specs[0].name,
            expected="[batch, tokens]",
            found=", ".join(str(list(array.shape)) for array in given.values()),
        )
    return counts.pop()
