"""How many candidates are built, checked and timed in a second: python tests/bench/bench_tuning.py

Tunes a few GEMMs from an empty database. The second rate leaves out the start of the worker processes.
"""

from __future__ import annotations

import argparse
import tempfile
import time

from codegen import targets
from codegen.kernels.gemm import GemmKernel
from codegen.tuning import TuningDatabase, tune

SHAPES = ((128, 768, 768), (197, 576, 192), (256, 512, 512))
"""Rows, columns and reduced length of each product."""


def main() -> None:
    """Print the rate, what was chosen for each, and what a second run takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=None, help="threads of the kernels; all CPUs when omitted")
    parser.add_argument("--trials", type=int, default=1000, help="candidates to try; all when omitted")
    options = parser.parse_args()
    target = targets.get("cpu", threads=options.threads)
    kernels = [GemmKernel(*shape, bias=True) for shape in SHAPES]
    with tempfile.TemporaryDirectory() as folder:
        database = TuningDatabase(folder)
        ticks: list[float] = []
        start = time.perf_counter()
        tune(kernels, target, database, trials=options.trials, progress=lambda *_: ticks.append(time.perf_counter()))
        first_s = time.perf_counter() - start
        tune(kernels, target, database, trials=options.trials)
        second_s = time.perf_counter() - start - first_s
        records = [database.record(kernel, target) for kernel in kernels]
    tried = [one for record in records if record is not None for one in record.tried]
    trials_s = start + first_s - ticks[0]
    print(
        f"{target.fingerprint}: {len(tried)} candidates in {first_s:.2f} s, {len(tried) / first_s:.1f} a second; "
        f"{len(tried) / trials_s:.1f} a second once the workers run"
    )
    print(f"of these {sum(one['status'] != 'ok' for one in tried)} failed")
    for record in records:
        if record is not None and record.ms is not None and record.rule_ms is not None:
            print(f"{record.kernel}: {record.rule_ms:.3f} ms by rule, {record.ms:.3f} ms chosen: {record.knobs}")
    print(f"second run: {second_s * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
