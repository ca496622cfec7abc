"""Weights in the layouts that kernels read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from codegen.gpu.registry import generator
from codegen.kernels.base import Array, Kernel, Knobs
from codegen.selection.state import KernelCall, Static, Table
from codegen.targets.base import Target
from ir.graph import Value
from ir.ops.structure import Constant, Parameter

if TYPE_CHECKING:
    from codegen.lower import Lowered


class PackedWeights:
    """Static operands as arrays, each distinct one once."""

    def __init__(self, lowered: Lowered, params: Mapping[str, Array], target: Target) -> None:
        self.lowered, self.params, self.target = lowered, params, target
        self.arrays: dict[str, Array] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._values: dict[Value, Array] = {}

    def name(self, call: KernelCall, index: int) -> str:
        """Name of the packed array that serves one static operand."""
        operand, kernel = call.operands[index], call.kernel
        assert isinstance(operand, Static | Table)
        knobs = self.lowered.knobs[kernel.key]
        layout = (kernel.key, index) if packs(kernel, index, self.target) else (kernel.inputs[index].shape,)
        identity = (operand, layout)
        if identity not in self._names:
            array = operand.constant.evaluate() if isinstance(operand, Table) else self._array(operand)
            array = array.reshape(kernel.inputs[index].shape)
            packed = _pack(kernel, index, array, self.target, knobs)
            name = f"{len(self._names)}.{self.label(operand)}"
            self.arrays[name] = np.asarray(array if packed is None else packed, order="C")
            self._names[identity] = name
        return self._names[identity]

    def _array(self, static: Static) -> Array:
        parts = [self._value(value) for value in static.values]
        turned = [np.swapaxes(part, -1, -2) if static.transpose else part for part in parts]
        whole = turned[0] if len(turned) == 1 else np.concatenate(turned, axis=-1)
        return whole.astype(np.float32, copy=False) if whole.dtype.kind == "f" else whole

    def _value(self, value: Value) -> Array:
        """Value of a static node; a parameter, which most are, is not computed, so it stays as it is."""
        node = self.lowered.graph.node(value.node)
        return np.asarray(self.params[node.op.label]) if isinstance(node.op, Parameter) else self._evaluate(value)

    def _evaluate(self, value: Value) -> Array:
        """Value of a static node, computed in float64."""
        if value not in self._values:
            node = self.lowered.graph.node(value.node)
            if isinstance(node.op, Parameter):
                results: tuple[Array, ...] = (np.asarray(self.params[node.op.label], np.float64),)
            elif isinstance(node.op, Constant):
                array = node.op.evaluate()
                results = (array.astype(np.float64) if array.dtype.kind == "f" else array,)
            else:
                results = node.op.evaluate_all(tuple(self._evaluate(operand) for operand in node.operands))
            self._values.update(zip(node.results, results, strict=True))
        return self._values[value]

    def label(self, static: Static | Table) -> str:
        """Names of the parameters behind a static operand, for people."""
        if isinstance(static, Table):
            return "table"
        names: list[str] = []
        pending = [value.node for value in static.values]
        while pending:
            node = self.lowered.graph.node(pending.pop(0))
            names += [node.op.label] if isinstance(node.op, Parameter) else []
            pending += [operand.node for operand in node.operands]
        return "+".join(dict.fromkeys(names)) or "constant"


def packs(kernel: Kernel, index: int, target: Target) -> bool:
    """Tell whether a kernel's constant input has a layout of its own on a target."""
    if target.gpu is None:
        return kernel.packs(index)
    rule = generator(kernel, target.gpu).packs
    return rule is not None and rule(kernel, index)


def _pack(kernel: Kernel, index: int, array: Array, target: Target, knobs: Knobs) -> Array | None:
    if target.gpu is None:
        return kernel.pack(index, array, target.isa, knobs)
    pack = generator(kernel, target.gpu).pack
    return pack(kernel, target.gpu, knobs, index, array) if pack else None


class Layouts:
    """Layouts that weights have in functions of a model, so that its other functions read them so, too.

    Args:
        params: Parameters of all functions.
        target: What they are compiled for.
    """

    def __init__(self, params: Mapping[str, Array], target: Target) -> None:
        self._params, self._target = params, target
        self._shapes: dict[str, tuple[int, ...]] = {}

    def fit(self, lowered: Lowered) -> Lowered:
        """Return other knobs for kernels whose weights are here already, in a layout that those knobs read."""
        if self._target.gpu is not None:
            return lowered  # no knob of these changes a layout
        isa, chosen = self._target.isa, dict(lowered.knobs)
        packed = PackedWeights(lowered, self._params, self._target)
        for call in lowered.calls:
            kernel = call.kernel
            labels = {index: packed.label(operand) for index, operand in _packed_operands(call)}
            known = {index: self._shapes[label] for index, label in labels.items() if label in self._shapes}
            for knobs in (chosen[kernel.key], *kernel.knob_space(isa)) if known else ():
                if all(kernel.packed_shape(index, isa, knobs) == shape for index, shape in known.items()):
                    chosen[kernel.key] = knobs
                    break
        return replace(lowered, knobs=chosen)

    def remember(self, lowered: Lowered, packed: PackedWeights) -> None:
        """Add the layouts of a function."""
        for call in lowered.calls:
            for index, operand in _packed_operands(call):
                self._shapes.setdefault(packed.label(operand), packed.arrays[packed.name(call, index)].shape)


def _packed_operands(call: KernelCall) -> list[tuple[int, Static]]:
    """List the weights of a call that its kernel reads in a layout of its own."""
    return [
        (index, operand)
        for index, operand in enumerate(call.operands)
        if isinstance(operand, Static) and call.kernel.packs(index)
    ]
