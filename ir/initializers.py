"""Initial values of parameters: a closed list of named distributions, seeded by parameter name.

A parameter's values depend on the seed and its own name alone, so adding a layer does not change the others.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from ir.errors import GraphError, did_you_mean
from ir.graph import Graph
from ir.ops.structure import Parameter
from ir.types import axes_shape

FloatArray = npt.NDArray[np.float32]
Params = dict[str, FloatArray]
"""Parameter values by name, float32."""

Shape = tuple[int, ...]
Initializer = Callable[[np.random.Generator, Shape, tuple[float, ...]], npt.NDArray[np.float64]]


def _fan_in(rng: np.random.Generator, shape: Shape, arguments: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """Normal with variance gain / fan-in, fan-in being all but the last size (LeCun et al. 1998)."""
    gain = arguments[0] if arguments else 1.0
    return rng.standard_normal(shape) * math.sqrt(gain / max(math.prod(shape[:-1]), 1))


def _normal(rng: np.random.Generator, shape: Shape, arguments: tuple[float, ...]) -> npt.NDArray[np.float64]:
    return rng.standard_normal(shape) * arguments[0]


def _uniform(rng: np.random.Generator, shape: Shape, arguments: tuple[float, ...]) -> npt.NDArray[np.float64]:
    return rng.uniform(arguments[0], arguments[1], shape)


def _constant(rng: np.random.Generator, shape: Shape, arguments: tuple[float, ...]) -> npt.NDArray[np.float64]:
    return np.full(shape, arguments[0])


def _taps(rng: np.random.Generator, shape: Shape, arguments: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """Along the first axis the last place, a causal convolution's newest token, has one value and all others another.

    So start the convolutions of multi-dconv-head attention (So et al. 2021).
    """
    taps = np.full(shape, arguments[1])
    taps[-1] = arguments[0]
    return taps


def _sinusoid(rng: np.random.Generator, shape: Shape, arguments: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """Sine and cosine by turns of row t at the frequencies 10000^(-2i/D): positions of Vaswani et al. (2017)."""
    rows, columns = np.arange(shape[0])[:, None], np.arange(math.prod(shape[1:]))
    angles = rows / 10000.0 ** (2 * (columns // 2) / columns.size)
    return np.reshape(np.where(columns % 2 == 0, np.sin(angles), np.cos(angles)), shape)


def _log_arange(rng: np.random.Generator, shape: Shape, arguments: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """log(1), log(2), ... along the first axis: the S4D-real start of a state matrix (Gu et al. 2022)."""
    ranks = np.reshape(np.arange(1, shape[0] + 1, dtype=np.float64), (-1, *[1] * (len(shape) - 1)))
    return np.broadcast_to(np.log(ranks), shape)


def _softplus_inverse_log_uniform(
    rng: np.random.Generator, shape: Shape, arguments: tuple[float, ...]
) -> npt.NDArray[np.float64]:
    """Values whose softplus is log-uniform between two bounds: step-size bias of Mamba (Gu and Dao 2023)."""
    low, high = arguments
    step = np.exp(rng.uniform(math.log(low), math.log(high), shape))
    return step + np.log(-np.expm1(-step))


INITIALIZERS: Final[dict[str, tuple[Initializer, tuple[int, ...]]]] = {
    "fan_in": (_fan_in, (0, 1)),
    "normal": (_normal, (1,)),
    "uniform": (_uniform, (2,)),
    "constant": (_constant, (1,)),
    "taps": (_taps, (2,)),
    "sinusoid": (_sinusoid, (0,)),
    "log_arange": (_log_arange, (0,)),
    "softplus_inverse_log_uniform": (_softplus_inverse_log_uniform, (2,)),
}
"""Each distribution with the numbers of arguments it takes."""


def initialize(graph: Graph, seed: int) -> Params:
    """Draw a value for every parameter of a graph.

    Args:
        graph: Graph whose parameters are wanted.
        seed: Seed of the streams; each parameter has its own stream.

    Raises:
        GraphError: An unknown initial distribution.
    """
    return {name: draw(node.op, seed) for name, node in graph.parameters.items() if isinstance(node.op, Parameter)}


def draw(parameter: Parameter, seed: int) -> FloatArray:
    """Draw one parameter's value.

    Raises:
        GraphError: An unknown initial distribution, or the wrong number of arguments.
    """
    function, arguments = parse(parameter.init, where=parameter.label)
    digest = hashlib.sha256(parameter.label.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
    return function(rng, axes_shape(parameter.axes), arguments).astype(np.float32)


def parse(text: str, *, where: str | None = None) -> tuple[Initializer, tuple[float, ...]]:
    """Split `name(1.0, 2.0)` into the distribution and its arguments.

    Raises:
        GraphError: The text does not name a distribution with its arguments.
    """
    match = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", text)
    name = match.group(1) if match else text
    if match is None or name not in INITIALIZERS:
        raise GraphError("unknown initial distribution", where=where, found=text, hint=did_you_mean(name, INITIALIZERS))
    function, counts = INITIALIZERS[name]
    try:
        arguments = tuple(float(part) for part in (match.group(2) or "").split(",") if part.strip())
    except ValueError as error:
        raise GraphError("an argument is not a number", where=where, found=text) from error
    if len(arguments) not in counts:
        raise GraphError("wrong number of arguments", where=where, expected=f"{counts} for {name}", found=text)
    return function, arguments
