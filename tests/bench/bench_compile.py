"""How long `-O1` takes for models of 12 layers, first and seen before: python tests/bench/bench_compile.py

Each first compile has an empty cache. The worker process, which a program starts once, is started before and timed
apart. Compiles of a seen architecture come with new weights, and include packing and the comparison with torch. The
phases are timed in this process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from codegen import lower, targets
from codegen.cache import LibraryCache
from codegen.code_workers import worker_for
from codegen.compile import compile_graph
from codegen.inputs import sample_inputs
from codegen.packing import PackedWeights
from codegen.reference import torch_outputs
from codegen.targets.base import Target
from ir.builder import Builder
from ir.graph import Graph
from ir.hashing import canonical_hash
from ir.initializers import initialize
from ir.types import Axis
from nas.suites.cpu import vit_tiny


def decoder(tokens: int = 256, width: int = 256, heads: int = 4, hidden: int = 1024, depth: int = 12) -> Graph:
    """Pre-norm layers of rotary causal attention and gated units, between an embedding and a tied head."""
    b = Builder()
    model, inner = (Axis("d_model", width),), (Axis("hidden", hidden),)
    table = b.parameter("embedding", ((Axis("vocab", 256),), model), "normal(0.5)")
    x = b.take(table, b.input("tokens", (1, tokens), "int32"))
    for layer in range(depth):
        with b.scope(f"layers.{layer}"):
            h = b.rms_norm(x, b.parameter("norm_mixer", (model,), "constant(1)"))
            q, k, v = (b.split_heads(b.linear(h, name, model), heads) for name in "qkv")
            x = x + b.linear(b.merge_heads(b.attention(b.rope(q), b.rope(k), v, causal=True)), "o", model)
            h = b.rms_norm(x, b.parameter("norm_channel", (model,), "constant(1)"))
            x = x + b.linear(b.silu(b.linear(h, "gate", inner)) * b.linear(h, "up", inner), "down", model)
    return b.build(logits=b.matmul(x, table, transpose_b=True))


MODELS: dict[str, Callable[[], Graph]] = {"decoder d=256 T=256": decoder, "ViT-Tiny": vit_tiny}


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Print the time that the block takes."""
    start = time.perf_counter()
    yield
    print(f"    {name:34s} {(time.perf_counter() - start) * 1e3:8.1f} ms", flush=True)


def print_phases(graph: Graph, target: Target) -> None:
    """Time what a compile consists of, one after the other, in this process."""
    params, inputs = initialize(graph, 0), sample_inputs(graph)
    with phase("torch reference"):
        torch_outputs(graph, params, inputs)
    with phase("canonical hash"):
        canonical_hash(graph)
    with phase("simplify, select kernels"):
        lowered = lower.lower(graph, target)
    with phase("pack weights"):
        weights = PackedWeights(lowered, params, target)
        program = lower.program(lowered, weights)
    with phase("key of the library"):
        key = program.key(target)
    with phase("write TIR and Relax"):
        module = lower.relax_module({"forward": (lowered, weights)}, target)
    with phase("passes, LLVM, link"):
        library = lower._library(module, target)
    with tempfile.TemporaryDirectory() as folder:
        cache = LibraryCache(folder)
        cache.put(key, library)
        with phase(f"read {len(library) / 1e3:.0f} KB from the cache"):
            cache.get(key)


def main() -> None:
    """Print first and second compile times of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=None, help="threads to compile for; all CPUs when omitted")
    parser.add_argument("--repeats", type=int, default=5, help="compiles of the seen architecture")
    parser.add_argument("--phases", action="store_true", help="time the phases too")
    options = parser.parse_args()
    target = targets.get("cpu", threads=options.threads)
    start = time.perf_counter()
    worker_for(target.threads).start()
    print(f"start of the worker: {time.perf_counter() - start:.2f} s", flush=True)
    for name, build in MODELS.items():
        graph = build()
        with tempfile.TemporaryDirectory() as root:
            seconds: list[float] = []
            for seed in range(1 + options.repeats):
                params = initialize(graph, seed)
                start = time.perf_counter()
                compile_graph(graph, params, target, tuning_root=Path(root))
                seconds.append(time.perf_counter() - start)
        again = sorted(seconds[1:])
        print(
            f"{name} on {target.fingerprint}: first {seconds[0]:.2f} s; "
            f"seen before: median {again[len(again) // 2]:.3f} s, of {again[0]:.3f} to {again[-1]:.3f} s",
            flush=True,
        )
        if options.phases:
            print_phases(graph, target)


if __name__ == "__main__":
    main()
