"""Products in bfloat16: the pass, what is stored between kernels, and whole models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import nas
from codegen import targets
from codegen.compile import compile_graph, describe_kernels, with_precision
from codegen.container import TOLERANCES
from ir.builder import Builder, Tensor
from ir.errors import CompileError
from ir.graph import Graph
from ir.initializers import initialize
from ir.interpret import evaluate
from ir.types import Axis

TOKENS, WIDTH, HIDDEN = 9, 24, 50


def _parameter(b: Builder, name: str, *sizes: int) -> Tensor:
    return b.parameter(name, tuple((Axis(f"axis{index}", size),) for index, size in enumerate(sizes)))


def _affine(b: Builder, x: Tensor, name: str, inputs: int, outputs: int) -> Tensor:
    return b.matmul(x, _parameter(b, f"{name}.weight", inputs, outputs)) + _parameter(b, f"{name}.bias", outputs)


def _graph(write: Callable[[Builder, Tensor], Tensor]) -> Graph:
    b = Builder()
    return b.build(y=write(b, b.input("x", (1, TOKENS, WIDTH))))


def _block(b: Builder, x: Tensor) -> Tensor:
    """Pre-norm attention and feed-forward, as in an encoder."""
    y = b.layer_norm(x, _parameter(b, "norm1", WIDTH))
    q, k, v = (b.reshape(_affine(b, y, name, WIDTH, WIDTH), 1, TOKENS, 2, WIDTH // 2) for name in "qkv")
    mixed = b.reshape(b.attention(q, k, v, scale=0.3), 1, TOKENS, WIDTH)
    x = x + _affine(b, mixed, "out", WIDTH, WIDTH)
    y = b.layer_norm(x, _parameter(b, "norm2", WIDTH))
    return x + _affine(b, b.gelu(_affine(b, y, "up", WIDTH, HIDDEN)), "down", HIDDEN, WIDTH)


def _kernels(graph: Graph) -> list[str]:
    listed = describe_kernels(with_precision(graph, "bfloat16"), targets.get("cpu", threads=1))
    return [str(record["kernel"]) for record in listed]


def test_encoder_passes_bfloat16_between_kernels():
    """Norms and gelu write what products read; the residual stream stays float32, and so does the output."""
    kernels = _kernels(_graph(_block))
    products = [kernel for kernel in kernels if kernel.startswith("gemm")]
    assert all("precision=bfloat16" in kernel for kernel in products)
    assert all(kernel.endswith("out_dtype=bfloat16)") for kernel in kernels if kernel.startswith("norm"))
    (up,) = (kernel for kernel in products if "gelu" in kernel)
    assert up.endswith("a_dtype=bfloat16,out_dtype=bfloat16)")
    others = [kernel for kernel in products if kernel != up]
    assert not any("out_dtype" in kernel for kernel in others)
    assert sum("a_dtype=bfloat16" in kernel for kernel in others) >= len(others) - 1  # one reads attention


def test_value_with_another_reader_stays_float32():
    """What a product and anything else read is kept as it is, and so is what the caller gets."""

    def two_readers(b: Builder, x: Tensor) -> Tensor:
        y = b.layer_norm(x)
        return b.exp(y) * _affine(b, y, "w", WIDTH, WIDTH)

    assert not any("_dtype" in kernel for kernel in _kernels(_graph(two_readers)))
    b = Builder()
    y = b.layer_norm(b.input("x", (1, TOKENS, WIDTH)))
    graph = b.build(y=y, z=_affine(b, y, "w", WIDTH, WIDTH))
    assert not any("_dtype" in kernel for kernel in _kernels(graph))


def test_odd_rows_are_not_stored_as_pairs():
    """A product over an odd length reads float32 and rounds it itself."""

    def odd(b: Builder, x: Tensor) -> Tensor:
        return _affine(b, b.gelu(_affine(b, x, "up", WIDTH, 33)), "down", 33, WIDTH)

    up, down = _kernels(_graph(odd))
    assert "dtype" not in up
    assert down.endswith("precision=bfloat16)")


def test_reshapes_do_not_stand_in_the_way():
    """A value under another shape is the same memory, so it is stored alike."""

    def reshaped(b: Builder, x: Tensor) -> Tensor:
        return _affine(b, b.reshape(b.layer_norm(x), TOKENS, WIDTH), "w", WIDTH, WIDTH)

    assert [kernel.count("_dtype=bfloat16") for kernel in _kernels(_graph(reshaped))] == [1, 1]


def test_products_of_two_activations_stay_float32():
    """Rounding what changes with every call costs more than it saves."""
    graph = _graph(lambda b, x: b.matmul(x, x, transpose_b=True))
    assert "bfloat16" not in _kernels(graph)[0]


@pytest.mark.parametrize("target", ["cpu", "cpu:avx2"])
@pytest.mark.parametrize("threads", [1, 2])
def test_model_in_bfloat16_equals_torch(target: str, threads: int, tmp_path: Path):
    """The artifact states its precision, agrees with torch and loads; against float32 it is within 2 %."""
    graph = _graph(_block)
    params = initialize(graph, 0)
    artifact = compile_graph(
        graph, params, targets.get(target, threads=threads), precision="bfloat16", tuning_root=tmp_path
    )
    assert artifact.verification_error is not None
    assert artifact.verification_error <= TOLERANCES["bfloat16"]
    assert '"precision":"bfloat16"' in artifact.graph_json.replace(" ", "")
    artifact.save(tmp_path / "model.nas")
    model = nas.load(tmp_path / "model.nas", threads=threads)
    x = np.random.default_rng(1).standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
    (exact,) = evaluate(graph, {"x": x}, params).values()
    error = np.abs(model(x=x) - exact).max() / np.abs(exact).max()
    assert 1e-6 < error <= TOLERANCES["bfloat16"]


def test_gated_product_keeps_its_precision(tmp_path: Path):
    """Both halves of a gated unit are one product in bfloat16; norms, softmax and leftovers still fit together."""

    def gated(b: Builder, x: Tensor) -> Tensor:
        y = b.rms_norm(x, _parameter(b, "norm", WIDTH))
        gate = b.silu(b.matmul(y, _parameter(b, "gate", WIDTH, HIDDEN)))
        hidden = gate * b.matmul(y, _parameter(b, "up", WIDTH, HIDDEN))
        return x + b.matmul(hidden, _parameter(b, "down", HIDDEN, WIDTH))

    graph = _graph(gated)
    norm, up, down = _kernels(graph)
    assert "gate=silu" in up
    assert [kernel.count("_dtype=bfloat16") for kernel in (norm, up, down)] == [1, 2, 1]
    target = targets.get("cpu", threads=1)
    artifact = compile_graph(graph, initialize(graph, 0), target, precision="bfloat16", tuning_root=tmp_path)
    assert artifact.verification_error is not None
    assert artifact.verification_error <= TOLERANCES["bfloat16"]


def test_precision_of_an_artifact_is_kept_or_changed(tmp_path: Path):
    """Compiling again keeps what the graph states unless another precision is asked for."""
    graph = _graph(lambda b, x: _affine(b, x, "w", WIDTH, WIDTH))
    first = nas.compile(graph, threads=1, precision="bfloat16", tuning_dir=tmp_path)
    again = nas.compile(first, threads=1, tuning_dir=tmp_path)
    exact = nas.compile(first, threads=1, precision="float32", tuning_dir=tmp_path)
    assert again.graph_hash == first.graph_hash != exact.graph_hash
    assert exact.graph_hash == nas.compile(graph, threads=1, tuning_dir=tmp_path).graph_hash


def test_unknown_precision_is_refused():
    """The message lists what there is."""
    with pytest.raises(CompileError, match="float32 or bfloat16"):
        with_precision(_graph(_block), "bfloat61")
