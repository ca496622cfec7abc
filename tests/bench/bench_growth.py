"""How the time of the recurrent models grows with the tokens: python tests/bench/bench_growth.py

Each model is compiled at every length and checked against torch; the lengths are then timed in turns in one process.
The exponent is the slope of a least-squares line through log time over log tokens, and the steepest doubling is
printed beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from codegen import rounds, runtime, targets
from codegen.compile import compile_graph
from codegen.measure import device_lock
from ir.initializers import initialize
from nas.suites.cpu import RECURRENT

LENGTHS = (512, 1024, 2048, 4096, 8192)


def median_ms(name: str, threads: int, lengths: tuple[int, ...]) -> list[float]:
    """Median milliseconds of a call at each length."""
    target = targets.get("cpu", threads=threads)
    with tempfile.TemporaryDirectory(prefix="nas-bench-") as folder:
        calls = {}
        for tokens in lengths:
            graph = RECURRENT[name](tokens=tokens)
            path = Path(folder) / f"{tokens}.nas"
            compile_graph(graph, initialize(graph, seed=0), target).save(path)
            calls[str(tokens)] = runtime.load(path, threads=threads, self_test=False).prepare()
        with device_lock("cpu"):
            times = rounds.run_rounds(calls, 20.0 * len(lengths))
    return [float(np.median(times[str(tokens)])) * 1e3 for tokens in lengths]


def main() -> None:
    """Print a line for each model and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(RECURRENT))
    parser.add_argument("--threads", default="1,2")
    options = parser.parse_args()
    for threads in map(int, options.threads.split(",")):
        for name in options.models.split(","):
            times = median_ms(name, threads, LENGTHS)
            slope = np.polyfit(np.log(LENGTHS), np.log(times), 1)[0]
            steepest = max(np.log2(np.divide(times[1:], times[:-1])))
            listed = "  ".join(f"{tokens}: {ms:.1f} ms" for tokens, ms in zip(LENGTHS, times, strict=True))
            print(
                f"{name:7s} {threads} thread(s)  T^{slope:.3f} (steepest doubling T^{steepest:.3f})  {listed}",
                flush=True,
            )


if __name__ == "__main__":
    main()
