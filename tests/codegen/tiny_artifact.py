"""A small compiled model for tests of everything that handles artifacts: `sum = x @ w + ids`, `sign = relu(sum)`."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from codegen import _tvm, targets
from codegen._tvm import relax
from codegen.artifact import Artifact, Function, describe_target
from codegen.container import TensorSpec

ROWS, INNER, COLUMNS = 4, 8, 16
VOCABULARY = 100


@functools.cache
def library(outputs: int = 2, *, logarithm: bool = False) -> bytes:
    """Compile `forward(x, ids, w)`; with `logarithm`, of a logarithm, so that negative products give NaN."""
    builder = relax.BlockBuilder()
    x = _variable("x", (ROWS, INNER), "float32")
    ids = _variable("ids", (ROWS, 1), "int32")
    w = _variable("w", (INNER, COLUMNS), "float32")
    with builder.function("forward", [x, ids, w]):
        with builder.dataflow():
            total = builder.emit(relax.op.add(relax.op.matmul(x, w), relax.op.astype(ids, "float32")))
            if logarithm:
                total = builder.emit(relax.op.log(total))
            both = relax.Tuple([total, builder.emit(relax.op.nn.relu(total))])
            result = builder.emit_output(total if outputs == 1 else both)
        builder.emit_func_output(result)
    executable = _tvm.tvm.compile(builder.get(), _tvm.Target(targets.get("cpu", threads=1).to_tvm()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        executable.export_library(str(path))
        return path.read_bytes()


def _variable(name: str, shape: tuple[int, ...], dtype: str) -> relax.Var:
    # TVM takes whole numbers as expressions; its annotations do not say so.
    return relax.Var(name, relax.TensorType(list(shape), dtype))  # pyright: ignore[reportArgumentType]


def make(outputs: int = 2, *, logarithm: bool = False) -> Artifact:
    """Build the artifact with expected outputs computed by numpy."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, INNER), np.float32)
    w = rng.standard_normal((INNER, COLUMNS), np.float32)
    ids = np.arange(ROWS, dtype=np.int32)[:, None]
    total = x @ w + ids.astype(np.float32)
    if logarithm:
        with np.errstate(invalid="ignore"):
            total = np.log(total)
    names: Sequence[str] = ("sum", "positive")[:outputs]
    arrays = (total, np.maximum(total, 0))
    forward = Function(
        inputs=(
            TensorSpec("x", (ROWS, INNER), "float32"),
            TensorSpec("ids", (ROWS, 1), "int32", below=VOCABULARY),
        ),
        outputs=tuple(TensorSpec(name, (ROWS, COLUMNS), "float32") for name in names),
        weights=("w",),
        graph_json='{"format_version": 1}',
        graph_hash="0" * 64,
        example_inputs={"x": x, "ids": ids},
        expected_outputs=dict(zip(names, arrays, strict=False)),
        verification_error=1e-7,
        kernels=({"node": "matmul", "kernel": "default"},),
    )
    return Artifact(
        library=library(outputs, logarithm=logarithm),
        functions={"forward": forward},
        weights={"w": w},
        parameters={"w": w, "unpacked": w.T},
        target=describe_target(targets.get("cpu", threads=1)),
        threads=1,
    )


def with_forward(artifact: Artifact, **fields: Any) -> Artifact:
    """Change what the artifact says of its function `forward`."""
    return replace(artifact, functions={"forward": replace(artifact.forward, **fields)})


def damaged_copy(path: Path, offset: int) -> Path:
    """Copy a file with all bits of one byte flipped."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    copy = path.with_name(f"damaged_{offset}.nas")
    copy.write_bytes(data)
    return copy


def with_target(artifact: Artifact, **fields: object) -> Artifact:
    """Change what the artifact says of its target."""
    return replace(artifact, target={**artifact.target, **fields})
