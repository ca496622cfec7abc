"""Which functions an artifact gets: `forward` for some sizes, and `prefill` and `step` of a model that streams."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ir.errors import GraphError, InputError, NasError

if TYPE_CHECKING:
    from codegen.compile import Source
    from ir.graph import Graph
    from ir.op import Array

Build: TypeAlias = "Callable[..., Graph]"
"""Builds a graph of a model, given keywords of `Architecture.graph`."""

_NOISE = 0.1  # on parameters of a probe: those that begin as zeros would hide what depends on what
_SEED = 0
_PROBED_TOKENS = 5  # odd, and enough for states of short convolutions to be outgrown


def make_sources(
    build: Build, batches: Sequence[int], lengths: Sequence[int], *, step: bool, prefill: bool
) -> dict[str, Source]:
    """Return the functions of a model.

    Args:
        build: Builds its graphs.
        batches: Sequences in one call, a function for each; the usual one where empty.
        lengths: Tokens in a sequence, a function for each; the usual one where empty.
        step: Whether to add the function for one token and the state before it.
        prefill: Whether to add those for as many tokens as `lengths` say and the state before them.

    Raises:
        InputError: The model has no such function, or cannot be of such a size.
    """
    from codegen.compile import Source
    from codegen.manifest import BATCH, FORWARD, PREFILL, SEQ_LEN, STEP

    if prefill:
        _require_prefill(build)
    sizes = _grid(batches, lengths)
    graphs = {tuple(one.values()): build(**one) for one in sizes}
    axes = _axes(list(zip(sizes, graphs.values(), strict=True)))
    padded = [axis for axis in (BATCH, SEQ_LEN) if _is_padded(build, sizes, axis, axes)]
    sources = {_name(FORWARD, one, sizes): Source(graphs[tuple(one.values())], FORWARD, axes, padded) for one in sizes}
    longest = {"max_len": max(lengths)} if lengths else {}
    for role, wanted, counted in ((PREFILL, prefill, lengths or [None]), (STEP, step, [None])):
        if not wanted:
            continue
        grid = _grid(batches, [count for count in counted if count])
        made = [build(mode=role, **one, **longest) for one in grid]
        own = _axes(list(zip(grid, made, strict=True)))
        rows = [BATCH] if BATCH in padded else []
        sources |= {
            _name(role, one, grid): Source(graph, role, own, rows) for one, graph in zip(grid, made, strict=True)
        }
    return sources


def _grid(batches: Sequence[int], lengths: Sequence[int]) -> list[dict[str, int]]:
    """List all pairs of sizes, smallest first; a size that is not named is left out."""
    named = [("batch", sorted(set(batches))), ("seq_len", sorted(set(lengths)))]
    choices = [[{key: size} for size in sizes] or [{}] for key, sizes in named]
    return [one | other for one, other in itertools.product(*choices)]


def _name(role: str, sizes: Mapping[str, int], grid: Sequence[Mapping[str, int]]) -> str:
    """Name a function: the smallest of a role as the role, others with their sizes."""
    letters = {"batch": "b", "seq_len": "t"}
    words = [f"{letters[key]}{size}" for key, size in sizes.items()]
    return role if sizes == grid[0] else "_".join([role, *words])


def _axes(built: Sequence[tuple[Mapping[str, int], Graph]]) -> dict[str, tuple[str | None, ...]]:
    """Say of each input and output that grows along which axes it does."""
    if len(built) == 1:
        return {}
    shapes = [_shapes(graph) for _, graph in built]
    found: dict[str, tuple[str | None, ...]] = {}
    for name, first in shapes[0].items():
        axes = [
            _axis(name, [own[name][place] for own in shapes], [one for one, _ in built]) for place in range(len(first))
        ]
        found[name] = tuple(axes)
    return found


def _axis(name: str, found: Sequence[int], sizes: Sequence[Mapping[str, int]]) -> str | None:
    if len(set(found)) == 1:
        return None
    for key in sizes[0]:
        if found == [one[key] for one in sizes]:
            return key
    raise InputError(
        "the model has one size only, for its inputs do not grow with the batch and the length alone",
        where=name,
        expected="one --batch and one --seq-len",
        found=f"sizes {', '.join(map(str, found))}",
    )


def _shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    shapes = {name: graph.type_of(value).shape for name, value in graph.outputs}
    return {name: node.types[0].shape for name, node in graph.inputs.items()} | shapes


def _is_padded(
    build: Build, sizes: Sequence[Mapping[str, int]], axis: str, axes: Mapping[str, tuple[str | None, ...]]
) -> bool:
    """Tell whether a smaller input gives the same results in a larger one, whatever stands behind it.

    Each size is held against the next smaller one, and the smallest against half of it.
    """
    steps = sorted({one[axis] for one in sizes if axis in one})
    if len(steps) < 2:
        return False
    base = {**sizes[0]}
    chain = [size for size in (steps[0] // 2, *steps) if size]
    try:
        graphs = [build(**{**base, axis: size}) for size in chain]
    except (GraphError, InputError):
        return False
    params = _noisy(graphs[0])
    return all(_agree(small, large, params, axis, axes) for small, large in itertools.pairwise(graphs))


def _agree(
    small: Graph, large: Graph, params: Mapping[str, Array], axis: str, axes: Mapping[str, tuple[str | None, ...]]
) -> bool:
    from codegen.container import relative_error
    from codegen.inputs import sample_inputs
    from codegen.reference import TOLERANCE, torch_outputs

    whole, shapes = sample_inputs(large, _SEED), _shapes(small)
    part = {name: array[tuple(map(slice, shapes[name]))] for name, array in whole.items()}
    if {name: node.types[0].shape for name, node in small.parameters.items()} != {
        name: node.types[0].shape for name, node in large.parameters.items()
    }:
        return False
    few, many = torch_outputs(small, params, part), torch_outputs(large, params, whole)
    if not any(axis in axes.get(name, ()) for name in few):
        return False
    return all(
        axis in axes[name] and relative_error(many[name][tuple(map(slice, array.shape))], array) <= TOLERANCE
        for name, array in few.items()
    )


def _noisy(graph: Graph) -> dict[str, Any]:
    from ir.initializers import initialize

    rng = np.random.default_rng(_SEED)
    return {
        name: (array + _NOISE * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in initialize(graph, _SEED).items()
    }


def _require_prefill(build: Build) -> None:
    """Check on a few tokens that reading some at once leaves the state that reading one by one does.

    Raises:
        InputError: It does not.
    """
    from codegen.container import relative_error
    from codegen.reference import TOLERANCE, torch_outputs

    calls = 2
    whole = {"batch": 1, "max_len": calls * _PROBED_TOKENS}
    try:
        step, several = build(mode="step", **whole), build(mode="prefill", seq_len=_PROBED_TOKENS, **whole)
    except NasError as error:
        raise _no_prefill(str(error).splitlines()[0]) from error
    params = _noisy(step)
    tokens = np.random.default_rng(_SEED).integers(0, 2, (1, calls * _PROBED_TOKENS), dtype=np.int32)
    ends: list[dict[str, Array]] = []
    for graph, count in ((step, 1), (several, _PROBED_TOKENS)):
        outputs = {name: np.zeros(shape, np.float32) for name, shape in _shapes(graph).items()}
        for start in range(0, tokens.shape[1], count):
            given = {"tokens": tokens[:, start : start + count], "position": np.asarray(start, np.int32)}
            state = {name: outputs[name] for name in graph.inputs if name not in given}
            outputs = torch_outputs(graph, params, given | state)
        ends.append(outputs)
    for name, array in ends[0].items():
        found = ends[1][name] if name in step.inputs else ends[1][name][:, -1:]
        if not relative_error(found, array) <= TOLERANCE:
            raise _no_prefill(f"another {name} than token by token")


def _no_prefill(found: str) -> InputError:
    return InputError(
        "this model reads a stream token by token only",
        where="prefill",
        expected="mixers whose step takes several tokens, such as attention without a window or a linear recurrence",
        found=found,
        hint="compile it with --step alone",
    )
