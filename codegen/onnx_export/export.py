"""A graph as one ONNX model: its nodes, its parameters under their names, and what it is in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
from onnx import ModelProto, helper

from codegen.machine import versions
from codegen.onnx_export.emitter import OPSET, Emitter, value_info
from codegen.onnx_export.nodes import write_nodes
from codegen.onnx_export.table import ONNX
from ir.errors import CompileError, GraphError, VerificationError
from ir.graph import Graph, Node
from ir.hashing import canonical_hash
from ir.op import Array
from ir.ops.structure import Constant, Parameter

IR_VERSION: Final = 8
"""Version of the file format that came with operator set 18."""
LIMIT_BYTES: Final = 2**31 - 2**24
"""Largest sum of weights; one protobuf message holds below 2 GiB, and the nodes need a little of that."""


def to_onnx(graph: Graph, params: Mapping[str, Array], metadata: Mapping[str, Any] | None = None) -> ModelProto:
    """Return a graph as an ONNX model, checked but not run.

    Inputs and outputs keep names, shapes and types. An output that is called as an input, as states are, gets
    `.next` behind its name; the metadata property `nas.signature` says which belong together.

    Args:
        graph: Graph without component nodes.
        params: A float32 array for each parameter.
        metadata: Anything to keep inside, as JSON under `nas.metadata`.

    Raises:
        CompileError: The weights exceed what one file can hold.
        GraphError: A component node is left, or a parameter value is missing or has another shape.
        VerificationError: The ONNX checker refuses the model.
    """
    _check_size(graph)
    e, outputs = Emitter(ONNX), output_names(graph)
    e.reserve([*graph.inputs, *graph.parameters, *outputs.values()])
    values = {node.results[0]: name for name, node in graph.inputs.items()}
    for name, node in graph.parameters.items():
        if node.id in graph.live:
            values[node.results[0]] = e.parameter(name, _value_of(node, name, params))
    write_nodes(e, graph, values)
    known = {name: graph.type_of(value) for value, name in values.items()}
    for name, value in graph.outputs:
        e.rename(values[value], outputs[name])
    held = {tensor.name for tensor in e.initializers}
    proto = helper.make_graph(
        e.nodes,
        graph.name or "main",
        [value_info(name, node.types[0]) for name, node in graph.inputs.items()],
        [value_info(outputs[name], graph.type_of(value)) for name, value in graph.outputs],
        e.initializers,
        value_info=[
            value_info(name, kind) for name, kind in known.items() if name not in held and name not in graph.inputs
        ],
    )
    return _checked(_model(proto, graph, metadata))


def _value_of(node: Node, name: str, params: Mapping[str, Array]) -> Array:
    found = np.shape(params[name]) if name in params else None
    if found != node.types[0].shape:
        message = "parameter value is missing" if found is None else "parameter value has another shape"
        raise GraphError(message, where=name, expected=str(node.types[0].shape), found=str(found))
    return params[name]


def output_names(graph: Graph) -> dict[str, str]:
    """Name in the ONNX model of each output: its own unless an input or a parameter has it."""
    taken, names = {*graph.inputs, *graph.parameters}, {}
    for name, _ in graph.outputs:
        chosen = name
        while chosen in taken:
            chosen += ".next"
        taken.add(chosen)
        names[name] = chosen
    return names


def _check_size(graph: Graph) -> None:
    held = [node.types[0].size_bytes for node in graph.nodes if isinstance(node.op, Parameter | Constant)]
    if sum(held) > LIMIT_BYTES:
        raise CompileError(
            "the weights exceed one ONNX file, and weights in files beside it are not written",
            where="weights",
            expected=f"at most {LIMIT_BYTES / 1e9:.2f} GB",
            found=f"{sum(held) / 1e9:.2f} GB",
            hint="choose a smaller model, or the nas format, which has no such limit",
        )


def _model(proto: onnx.GraphProto, graph: Graph, metadata: Mapping[str, Any] | None) -> ModelProto:
    version = versions()["nas"] or ""
    model = helper.make_model(
        proto,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="nas",
        producer_version=version,
    )
    properties = {
        "nas.graph_hash": canonical_hash(graph),
        "nas.tool_version": version,
        "nas.signature": json.dumps(_signature(graph)),
    }
    if metadata:
        properties["nas.metadata"] = json.dumps(metadata, default=str, sort_keys=True)
    helper.set_model_props(model, properties)
    return model


def _signature(graph: Graph) -> dict[str, Any]:
    names = output_names(graph)
    inputs = [(name, node.types[0]) for name, node in graph.inputs.items()]
    outputs = [(names[name], graph.type_of(value)) for name, value in graph.outputs]
    described = {
        role: [{"name": name, "shape": list(kind.shape), "dtype": kind.dtype} for name, kind in specs]
        for role, specs in (("inputs", inputs), ("outputs", outputs))
    }
    return described | {"carried": {name: names[name] for name in carried(graph)}}


def carried(graph: Graph) -> list[str]:
    """Names of the inputs that an output of the same name and type renews from call to call."""
    types = {name: graph.type_of(value) for name, value in graph.outputs}
    return [name for name, node in graph.inputs.items() if types.get(name) == node.types[0]]


def _checked(model: ModelProto) -> ModelProto:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError("the ONNX checker refuses the model", found=str(error).strip()) from error
    return model
