"""Kernels timed one by one: checked against float64 references first, then beside torch and the machine's peak."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from codegen import _tvm, peers, targets
from codegen.comparison import LIMITS
from codegen.container import relative_error
from codegen.kernel_cases import KernelCase, cases_of
from codegen.measure import device_lock, pinned_worker
from codegen.roofline import Probe, make_probe
from codegen.rounds import figures, run_rounds
from codegen.targets.base import Target
from ir.errors import InputError, KernelCrash, KernelTimeout, NasError, VerificationError

TOLERANCES: Final = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest error against float64, relative to the output's scale."""

_OURS, _EAGER, _PEAK = "nas", "eager", "fma"
_LIMIT_S = 120.0


def bench_kernels(
    families: Sequence[str],
    threads: int,
    *,
    isa: str | None = None,
    seconds: float = 2.0,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Time the cases of some families.

    Args:
        families: Names out of `kernel_cases.FAMILIES`; all where empty.
        threads: Threads of the kernels and of torch.
        isa: Instruction set to compile for; the machine's own when None.
        seconds: Time for the rounds of a case.
        tell: Hears what is timed.

    Returns:
        A row for each case: `family`, `shape`, `threads`, `status` (`ok`, `wrong`, `failed`), `reason`, `max_error`,
        `ours_ms`, `interval_ms`, `eager_ms`, `ratio`, `gflops`, `fma_peak_gflops`, `peak_fraction`, `gbs`, `copy_gbs`,
        `copy_fraction`. Figures are None where there are none.
    """
    target = targets.get("cpu", threads=threads, isa=isa)
    rows: list[dict[str, Any]] = []
    environment = LIMITS[isa] if isa else {}
    worker = pinned_worker(threads, preload=("codegen.kernel_bench",), without=(), environment=environment)
    with device_lock("cpu"), worker:
        for index, case in enumerate(cases_of(list(families))):
            tell(f"{case.family} {case.name}, {threads} thread{'s' if threads > 1 else ''}")
            row = _empty_row(case, threads)
            try:
                row |= worker.call(_time_case, list(families), index, target, seconds, timeout_s=_LIMIT_S)
            except VerificationError as error:
                row |= {"status": "wrong", "reason": f"{error.message}: {error.found}"}
            except (KernelCrash, KernelTimeout, NasError) as error:
                row |= {"status": "failed", "reason": f"{error.message}: {(error.found or '')[-300:]}"}
            rows.append(row)
    return rows


def _empty_row(case: KernelCase, threads: int) -> dict[str, Any]:
    names = ("max_error", "ours_ms", "interval_ms", "eager_ms", "ratio", "gflops", "fma_peak_gflops", "peak_fraction")
    figures_of = dict.fromkeys((*names, "gbs", "copy_gbs", "copy_fraction", "reason"))
    return {"family": case.family, "shape": case.name, "threads": threads, "status": "ok", **figures_of}


_probes: dict[Target, Probe] = {}


def _time_case(families: list[str], index: int, target: Target, seconds: float) -> dict[str, Any]:
    """Check and time one case; runs in the worker process. Cases travel by number: not all of their parts pickle."""
    case = cases_of(families)[index]
    kernel, operands = case.kernel, case.operands()
    expected = kernel.reference(*operands)
    run, outputs = _build(case, target)
    run()
    precision = _precision(case)
    error = _check([output.numpy() for output in outputs], expected, TOLERANCES[precision])
    if target not in _probes:
        _probes[target] = make_probe(target)
    probe = _probes[target]
    calls: dict[str, Callable[[], object]] = {_OURS: run, _PEAK: probe.fma}
    if case.eager is not None:
        calls[_EAGER] = _eager_call(case, expected[0], target.threads)
    copied = probe.measure().copy_gbs
    times = run_rounds(calls, seconds, rounds=20)
    own = figures(times[_OURS], times[_OURS])
    eager_ms = figures(times[_EAGER], times[_OURS])["median_ms"] if _EAGER in times else None
    gflops, gbs = kernel.flops / own["median_ms"] / 1e6, kernel.bytes_moved / own["median_ms"] / 1e6
    peak = probe.fma_flops / float(np.median(times[_PEAK])) / 1e9
    return {
        "max_error": error,
        "ours_ms": own["median_ms"],
        "interval_ms": own["interval_ms"],
        "eager_ms": eager_ms,
        "ratio": eager_ms / own["median_ms"] if eager_ms else None,
        "gflops": gflops,
        "fma_peak_gflops": peak,
        "peak_fraction": gflops / peak,
        "gbs": gbs,
        "copy_gbs": copied,
        "copy_fraction": gbs / copied,
    }


def _build(case: KernelCase, target: Target) -> tuple[Callable[[], object], list[Any]]:
    """Compile a kernel by its rule; returns its bare call and the tensors that it writes."""
    kernel, knobs = case.kernel, case.kernel.knobs(target.isa)
    library = _tvm.compile_functions({"kernel": kernel.build(target.isa, knobs)}, _tvm.Target(target.to_tvm()))
    packed = [
        array if (made := kernel.pack(index, array, target.isa, knobs)) is None else made
        for index, array in enumerate(case.operands())
    ]
    tensors = [_tvm.device_array(array) for array in packed]
    outputs = [_tvm.device_array(np.full(operand.shape, np.nan, operand.dtype)) for operand in kernel.outputs]
    function = library["kernel"]
    return lambda: function(*tensors, *outputs), outputs


def _eager_call(case: KernelCase, expected: np.ndarray, threads: int) -> Callable[[], object]:
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    tensors = [torch.from_numpy(array) for array in case.operands()]
    eager = case.eager
    assert eager is not None

    def call() -> Any:
        with torch.no_grad():
            return eager(torch, *tensors)

    found = call().numpy()
    tolerance = peers.TOLERANCES[_precision(case)]
    if found.shape != expected.shape or not relative_error(found, expected) <= tolerance:
        raise InputError("the torch call is not this kernel's function", where=f"{case.family} {case.name}")
    return call


def _precision(case: KernelCase) -> str:
    return str(getattr(case.kernel, "precision", "float32"))


def _check(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float) -> float:
    worst = max(relative_error(array, right) for array, right in zip(found, expected, strict=True))
    if not worst <= tolerance:
        limit = f"an error of at most {tolerance:g} of the output's scale"
        raise VerificationError("the kernel disagrees with its reference", expected=limit, found=f"{worst:.2g}")
    return worst
