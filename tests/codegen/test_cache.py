"""The cache of compiled libraries: what shares an entry, what does not, and entries that are damaged or too many."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from codegen import cache, lower, targets
from codegen.cache import LibraryCache, Program
from codegen.packing import PackedWeights
from codegen.targets.base import Target
from codegen.tuning import Record, TuningDatabase
from ir.builder import Builder
from ir.graph import Graph
from ir.hashing import canonical_hash
from ir.initializers import initialize
from ir.types import Axis
from tests.codegen.building import run_graph

TARGET = targets.get("cpu", threads=1)
PROGRAM = Program(inputs=[[[2, 3], "float32"]], weights=[], steps=[["copy", {"a": 1}, [0], [1]]], outputs=[[1, [2, 3]]])


def mlp(width: int = 8, names: tuple[str, str] = ("up", "down"), swap: bool = False, scope: str = "") -> Graph:
    """Two products with an activation between, and the difference of two inputs before."""
    b = Builder()
    with b.scope(scope):
        first, second = b.input("first", (3, width)), b.input("second", (3, width))
        x = second - first if swap else first - second
        axes = ((Axis("d", width),), (Axis("hidden", 20),))
        up, down = b.parameter(names[0], axes), b.parameter(names[1], axes[::-1])
        return b.build(y=b.matmul(b.relu(b.matmul(x, up)), down))


def key(graph: Graph, target: Target = TARGET, database: TuningDatabase | None = None, seed: int = 0) -> str:
    """Key of a graph's library."""
    lowered = lower.lower(graph, target, database)
    weights = PackedWeights(lowered, initialize(graph, seed), target)
    return lower.program(lowered, weights).key(target)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the libraries that were built, not taken from the cache."""
    sizes: list[int] = []
    build = lower._library

    def count(*arguments) -> bytes:
        library = build(*arguments)
        sizes.append(len(library))
        return library

    monkeypatch.setattr(lower, "_library", count)
    return sizes


def run(graph: Graph, folder: Path, seed: int = 0) -> np.ndarray:
    """Build and run a graph in this process, with the cache in a folder."""
    inputs = {name: np.full((3, 8), value, np.float32) for name, value in (("first", 2.0), ("second", 0.5))}
    _, outputs = run_graph(graph, initialize(graph, seed), TARGET, folder, inputs)
    return outputs["y"]


def expected(graph: Graph, seed: int = 0) -> np.ndarray:
    """The same by equation, in float64."""
    up, down = (array.astype(np.float64) for array in initialize(graph, seed).values())
    return np.maximum(np.full((3, 8), 1.5) @ up, 0) @ down


def test_second_build_takes_the_library_with_other_weights(builds: list[int], tmp_path: Path) -> None:
    """The same architecture under other names and with other weights is not built again, and computes its own."""
    first, second = mlp(), mlp(names=("a", "b"), scope="layers.0")
    assert canonical_hash(first) == canonical_hash(second)
    for graph, seed in ((first, 0), (second, 1)):
        np.testing.assert_allclose(run(graph, tmp_path, seed), expected(graph, seed), rtol=1e-5, atol=1e-5)
    assert len(builds) == 1


def test_key_ignores_names_and_values() -> None:
    """Names, scopes and weights do not decide the library."""
    assert key(mlp()) == key(mlp(names=("a", "b"), scope="net")) == key(mlp(), seed=7)


@pytest.mark.parametrize("graph", [mlp(width=9), mlp(swap=True)], ids=["width", "order of operands"])
def test_key_sees_the_architecture(graph: Graph) -> None:
    """Another shape, or inputs used the other way round, is another library."""
    assert key(graph) != key(mlp())


def test_key_sees_target_and_knobs(tmp_path: Path) -> None:
    """Threads, instruction set and tuned knobs decide the library too."""
    graph = mlp()
    keys = {key(graph), key(graph, targets.get("cpu", threads=2)), key(graph, dataclasses.replace(TARGET, mcpu="x"))}
    database = TuningDatabase(tmp_path)
    kernel = next(call.kernel for call in lower.lower(graph, TARGET).calls if call.kernel.family == "gemm")
    other = kernel.knob_space(TARGET.isa)[-1]
    database.add(Record(kernel.key, TARGET.fingerprint, "ok", other, 1.0, 1.0))
    keys.add(key(graph, database=database))
    assert len(keys) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(cache, "sources_digest", lambda: "changed"),
        lambda patch: patch.setattr(cache.machine, "versions", lambda: {"tvm": "0"}),
    ],
    ids=["sources", "versions"],
)
def test_key_sees_what_generates_code(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed sources, or other versions of the libraries, find nothing that was made before."""
    before = PROGRAM.key(TARGET)
    change(monkeypatch)
    assert PROGRAM.key(TARGET) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data + b"\0",
    ],
    ids=["empty", "cut", "cut in its digest", "flipped bit", "longer"],
)
def test_damaged_entry_is_built_again(builds: list[int], tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """A damaged library is never loaded; the entry is whole again afterwards."""
    graph = mlp()
    run(graph, tmp_path)
    (path,) = (tmp_path / "libraries").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    np.testing.assert_allclose(run(graph, tmp_path), expected(graph), rtol=1e-5, atol=1e-5)
    assert len(builds) == 2
    run(graph, tmp_path)
    assert len(builds) == 2


def test_cache_removes_what_was_not_used_for_longest(tmp_path: Path) -> None:
    """Beyond the bound the oldest use goes first; reading is a use."""
    entries = LibraryCache(tmp_path, largest_bytes=400)
    for age, name in ((30, "a"), (20, "b"), (10, "c")):
        entries.put(name, name.encode() * 100)
        os.utime(tmp_path / f"{name}.so", (1e9 - age, 1e9 - age))
    assert entries.get("a") == b"a" * 100
    entries.put("d", b"d" * 100)
    assert [name for name in "abcd" if entries.get(name)] == ["a", "c", "d"]


def test_cache_leaves_foreign_files_and_clears_abandoned_ones(tmp_path: Path) -> None:
    """A temporary file of a process that died long ago goes; one being written, and anything else, stays."""
    for name, age_s in ((".k.old.tmp", 7200), (".k.new.tmp", 5), ("notes.txt", 7200)):
        (tmp_path / name).write_bytes(b"x" * 1000)
        now = (tmp_path / name).stat().st_mtime
        os.utime(tmp_path / name, (now - age_s, now - age_s))
    LibraryCache(tmp_path, largest_bytes=200).put("k", b"k" * 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".k.new.tmp", "k.so", "notes.txt"]


def test_cache_that_cannot_be_written_costs_nothing_else(builds: list[int], tmp_path: Path) -> None:
    """A file where the folder should be: the model is built each time."""
    (tmp_path / "libraries").write_text("")
    graph = mlp()
    for count in (1, 2):
        np.testing.assert_allclose(run(graph, tmp_path), expected(graph), rtol=1e-5, atol=1e-5)
        assert len(builds) == count


CHURN = """
import random, sys
from codegen.cache import LibraryCache
entries, names = LibraryCache(sys.argv[1], largest_bytes=20_000), random.Random(sys.argv[2])
for _ in range(300):
    name = names.randrange(8)
    found = entries.get(f"k{name}")
    assert found is None or found == bytes([name]) * 5000
    entries.put(f"k{name}", bytes([name]) * 5000)
"""


def test_cache_serves_concurrent_processes(tmp_path: Path) -> None:
    """Processes that add, read and remove the same entries see whole libraries only."""
    processes = [subprocess.Popen([sys.executable, "-c", CHURN, str(tmp_path), seed]) for seed in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 25_000
