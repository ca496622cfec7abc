"""Latency on a device against latency measured directly, on loopback: python tests/bench/bench_device.py

One machine is both. A model is measured directly and through a device in turns; the ratio of the medians says what the
way through the device adds, which should be nothing beyond the noise that repeated direct measurements show.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from codegen import targets
from codegen.compile import compile_graph
from codegen.devices.client import Device
from codegen.measure import measure_latency
from ir.builder import Builder
from ir.graph import Graph
from ir.initializers import initialize
from ir.types import Axis


def mlp(rows: int = 128, width: int = 256, hidden: int = 1024) -> Graph:
    """Two products with an activation between them."""
    b = Builder()
    outer, inner = (Axis("d_model", width),), (Axis("hidden", hidden),)
    up, down = b.parameter("up", (outer, inner)), b.parameter("down", (inner, outer))
    return b.build(y=b.matmul(b.gelu(b.matmul(b.input("x", (rows, width)), up)), down))


def main() -> None:
    """Print the medians of each pair and the geometric mean of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    graph = mlp()
    with tempfile.TemporaryDirectory(prefix="nas-bench-") as folder:
        path = compile_graph(graph, initialize(graph, 0), targets.get("cpu", threads=1)).save(Path(folder) / "mlp.nas")
        command = [sys.executable, "-m", "nas", "device", "serve", "--port", "0", "--cache", f"{folder}/cache"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            device = Device.of(server.stdout.readline().split(" listens on ")[1].split(" ")[0])
            ratios: list[float] = []
            with device.hold():
                for _ in range(options.pairs):
                    here = measure_latency(path, threads=1, max_seconds=options.seconds)
                    there = device.measure_latency(path, threads=1, max_seconds=options.seconds)
                    ratios.append(there.median_ms / here.median_ms)
                    noisy = " noisy" if here.noisy or there.noisy else ""
                    print(
                        f"direct {here.median_ms:.4f} ms, device {there.median_ms:.4f} ms, {ratios[-1]:.4f}{noisy}",
                        flush=True,
                    )
            server.terminate()
    mean, spread = np.exp(np.mean(np.log(ratios))), np.exp(np.std(np.log(ratios)))
    print(f"device / direct: {mean:.4f}, times or over {spread:.4f} from pair to pair")


if __name__ == "__main__":
    main()
