"""Kernels and models on an NVIDIA GPU, each beside torch's best: python tests/bench/gpu.py [--json]

    python tests/bench/gpu.py --prepare FOLDER   where this project is installed; needs the CUDA compiler, no GPU
    python FOLDER/gpu.py [--json]                on a machine with a GPU and torch, which needs nothing else

Cases: a bfloat16 product 8192^3 and torch.matmul; causal attention (B=4 H=16 D=128 T=4096) and SDPA; gated linear
attention (B=4 T=4096 H=16 D=128) and flash-linear-attention where it is installed, else the chunkwise form in compiled
torch; encoders of 12 layers with d=768 at T=128, batch 1 and 32, and torch.compile(mode="max-autotune").

Every case is checked before it is timed, and has no time where it is wrong. Contestants take turns; times are medians
of device events. The ratio is the other's time over ours: above 1 we are faster. Without a GPU all is compiled, and the
script says that nothing was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROUNDS, WARM_UP = 25, 5
BATCH, TOKENS, HEADS, HEAD = 4, 4096, 16, 128
SIZE = 8192
DEPTH, WIDTH, ENCODER_TOKENS = 12, 768, 128
# Largest difference relative to the largest expected value: results in bfloat16, of weights and states in bfloat16.
TOLERANCE = 1.5e-2


class Row(NamedTuple):
    """One case.

    Attributes:
        case: What was computed.
        ours: Our contestant.
        peer: The other.
        status: `ok`, `wrong`, or why there is no time.
        error: Largest difference from a reference in higher precision, relative to its scale.
        ours_ms: Median.
        peer_ms: Median.
        ratio: The other's time over ours.
    """

    case: str
    ours: str
    peer: str
    status: str
    error: float | None = None
    ours_ms: float | None = None
    peer_ms: float | None = None
    ratio: float | None = None


# Where the project is installed


def prepare(folder: Path) -> None:
    """Write kernels as fatbins, encoders as artifacts with their runtime, and this script."""
    (folder / "kernels").mkdir(parents=True, exist_ok=True)
    compile_kernels(folder / "kernels")
    compile_encoders(folder / "encoders")
    if Path(__file__).resolve() != (folder / "gpu.py").resolve():
        shutil.copy(__file__, folder / "gpu.py")


def compile_kernels(folder: Path) -> None:
    """Compile the kernels of all cases; `kernels.json` says how each is launched."""
    from codegen.gpu.cuda import kernels, nvcc

    described: dict[str, Any] = {}
    for name, kernel, architectures in (
        ("gemm", kernels.gemm(), ("sm_80", "sm_90")),
        ("hopper_gemm", kernels.hopper_gemm(), ("sm_90a",)),
        ("attention", kernels.attention(head=HEAD, causal=True), ("sm_80", "sm_90")),
        ("hopper_attention", kernels.hopper_attention(causal=True), ("sm_90a",)),
        ("gla_states", kernels.gla_states(key=HEAD, value=HEAD), ("sm_80", "sm_90")),
        ("gla_outputs", kernels.gla_outputs(key=HEAD, value=HEAD), ("sm_80", "sm_90")),
    ):
        code, _ = nvcc.compile_source(kernel.source, architectures)
        (folder / f"{name}.fatbin").write_bytes(code)
        described[name] = {"entry": kernel.entry, "threads": kernel.threads, "shared_bytes": kernel.shared_bytes}
        print(f"{name}: {len(code) / 1e3:.0f} KB for {', '.join(architectures)}", flush=True)
    (folder / "kernels.json").write_text(json.dumps(described, indent=1))


def compile_encoders(folder: Path) -> None:
    """Compile the encoders, and pack them with the runtime."""
    from codegen import targets
    from codegen.bundle import write_bundle
    from codegen.compile import compile_graph
    from ir.initializers import initialize

    with tempfile.TemporaryDirectory(prefix="nas-gpu-") as scratch:
        paths: list[Path] = []
        for batch in (1, 32):
            graph = encoder_graph(batch)
            artifact = compile_graph(graph, initialize(graph, 0), targets.get("cuda:sm_90"), precision="bfloat16")
            paths.append(artifact.save(Path(scratch) / f"encoder_b{batch}.nas"))
            print(f"{paths[-1].name}: {paths[-1].stat().st_size / 1e6:.0f} MB", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        write_bundle(paths, folder, largest_bytes=2**31)


def encoder_graph(batch: int) -> Any:
    """Pre-norm layers of attention and GELU networks, as `TorchEncoder`."""
    from ir.builder import Builder
    from ir.types import Axis

    b = Builder()
    model, inner = (Axis("d_model", WIDTH),), (Axis("hidden", 4 * WIDTH),)
    x = b.input("x", (batch, ENCODER_TOKENS, WIDTH))
    for layer in range(DEPTH):
        with b.scope(f"layers.{layer}"):
            h = b.layer_norm(x, b.parameter("norm_1", (model,), "constant(1)"), b.parameter("bias_1", (model,)))
            q, k, v = (b.split_heads(b.linear(h, name, model), WIDTH // 64) for name in "qkv")
            x = x + b.linear(b.merge_heads(b.attention(q, k, v)), "o", model)
            h = b.layer_norm(x, b.parameter("norm_2", (model,), "constant(1)"), b.parameter("bias_2", (model,)))
            x = x + b.linear(b.gelu(b.linear(h, "up", inner)), "down", model)
    return b.build(y=x)


# On the machine with the GPU


class Strides(ctypes.Structure):
    """Elements between neighbours along batch, token and head."""

    _fields_ = (("batch", ctypes.c_int64), ("token", ctypes.c_int64), ("head", ctypes.c_int64))


class GateStrides(ctypes.Structure):
    """The same for gates, with the features of a head."""

    _fields_ = (*Strides._fields_, ("feature", ctypes.c_int64))


class TensorMap(ctypes.Structure):
    """A tensor as bulk copies see it; made by the driver."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


class Driver:
    """Compiled kernels, started on torch's current stream.

    Args:
        folder: What `compile_kernels` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self._cuda, self._folder = ctypes.CDLL("libcuda.so.1"), folder
        self._described = json.loads((folder / "kernels.json").read_text())
        self._functions: dict[str, ctypes.c_void_p] = {}

    def launch(self, name: str, grid: Sequence[int], *arguments: Any) -> None:
        """Start a kernel; arguments are tensors, None, structures, or ctypes numbers."""
        import torch

        kernel = self._described[name]
        values = [ctypes.c_void_p(a.data_ptr()) if hasattr(a, "data_ptr") else a for a in arguments]
        values = [ctypes.c_void_p() if value is None else value for value in values]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        block = (kernel["threads"], 1, 1, kernel["shared_bytes"])
        self._check(self._cuda.cuLaunchKernel(self._function(name), *grid, *block, stream, pointers, None), name)

    def tensor_map(self, tensor: Any, box: Sequence[int]) -> TensorMap:
        """Describe a bfloat16 tensor, its last axis first, for copies of boxes swizzled by 128 bytes."""
        rank, sizes, steps = tensor.dim(), list(tensor.shape)[::-1], [2 * s for s in tensor.stride()][::-1]
        raw = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)
        start = -ctypes.addressof(raw) % 64
        made = TensorMap.from_buffer(raw, start)
        words, steps64 = (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * (rank - 1))(*steps[1:])
        boxes, ones = (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank)
        bfloat16, plain, swizzle_128, promote_256, zeros = 9, 0, 3, 3, 0
        address = ctypes.c_void_p(tensor.data_ptr())
        layout = (words, steps64, boxes, ones, plain, swizzle_128, promote_256, zeros)
        code = self._cuda.cuTensorMapEncodeTiled(ctypes.byref(made), bfloat16, rank, address, *layout)
        self._check(code, "cuTensorMapEncodeTiled")
        return made

    def _function(self, name: str) -> ctypes.c_void_p:
        if name not in self._functions:
            kernel, module, function = self._described[name], ctypes.c_void_p(), ctypes.c_void_p()
            code = (self._folder / f"{name}.fatbin").read_bytes()
            self._check(self._cuda.cuModuleLoadData(ctypes.byref(module), code), f"loading {name}")
            entry = kernel["entry"].encode()
            self._check(self._cuda.cuModuleGetFunction(ctypes.byref(function), module, entry), name)
            most_dynamic_shared = 8
            self._check(self._cuda.cuFuncSetAttribute(function, most_dynamic_shared, kernel["shared_bytes"]), name)
            self._functions[name] = function
        return self._functions[name]

    def _check(self, code: int, where: str) -> None:
        if code:
            raise RuntimeError(f"{where}: CUDA error {code}")


def time_in_turns(calls: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> list[float]:
    """Return the median milliseconds of some calls on the device, which take turns."""
    import torch

    for call in calls:
        for _ in range(WARM_UP):
            call()
    torch.cuda.synchronize()
    samples: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        for place in [(number + offset) % len(calls) for offset in range(len(calls))]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[place]()
            end.record()
            end.synchronize()
            samples[place].append(start.elapsed_time(end))
    return [statistics.median(own) for own in samples]


def compare(case: str, ours: dict[str, Callable[[], Any]], peer: tuple[str, Callable[[], Any]], expected: Any) -> Row:
    """Check our contestants, time those that are right and the peer, and return the row of our best."""
    errors: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, call in ours.items():
        try:
            errors[name] = relative_error(call(), expected)
        except RuntimeError as error:
            failures[name] = str(error).splitlines()[0]
    right = {name: error for name, error in errors.items() if error <= TOLERANCE}
    if not right:
        found = "; ".join(
            [*(f"{n}: error {e:.1e}" for n, e in errors.items()), *(f"{n}: {f}" for n, f in failures.items())]
        )
        return Row(case, "none", peer[0], f"wrong: {found}", min(errors.values(), default=None))
    *own, other = time_in_turns([*(ours[name] for name in right), peer[1]])
    best_ms, best = min(zip(own, right, strict=True))
    note = "".join(f"; {name} failed: {reason}" for name, reason in failures.items())
    return Row(case, best, peer[0], f"ok{note}", right[best], best_ms, other, other / best_ms)


def relative_error(found: Any, expected: Any) -> float:
    """Return the largest difference relative to the largest expected magnitude; infinite where one is not finite."""
    difference = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    return difference if math.isfinite(difference) else math.inf


def bench_gemm(driver: Driver) -> Row:
    """A product of square matrices."""
    import torch

    a, w = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    sizes = [ctypes.c_int(SIZE)] * 3
    blocks = torch.cuda.get_device_properties(0).multi_processor_count

    def plain() -> Any:
        driver.launch("gemm", (SIZE // 128, SIZE // 128, 1), a, w, None, None, c, *sizes)
        return c

    contestants: dict[str, Callable[[], Any]] = {"mma": plain}
    if is_hopper():
        maps = driver.tensor_map(a, (64, 128)), driver.tensor_map(w, (64, 256))

        def hopper() -> Any:
            driver.launch("hopper_gemm", (blocks, 1, 1), *maps, None, None, c, *sizes)
            return c

        contestants["wgmma"] = hopper
    expected = a.float() @ w.float().T  # without TF32, which is torch's way where nothing else is said
    return compare(f"gemm bf16 {SIZE}^3", contestants, ("torch.matmul", lambda: a @ w.T), expected)


def bench_attention(driver: Driver) -> Row:
    """Causal attention."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (torch.randn(BATCH, TOKENS, HEADS, HEAD, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    o = torch.empty_like(q)
    sizes = [*(ctypes.c_int(n) for n in (TOKENS, TOKENS, HEADS, HEADS)), ctypes.c_float(HEAD**-0.5)]
    strides, grid = Strides(*q.stride()[:3]), (TOKENS // 128, BATCH * HEADS, 1)

    def plain() -> Any:
        driver.launch("attention", grid, q, k, v, o, *sizes, *[strides] * 4)
        return o

    contestants: dict[str, Callable[[], Any]] = {"mma": plain}
    if is_hopper():
        maps = [driver.tensor_map(x, (64, 1, 128, 1)) for x in (q, k, v)]

        def hopper() -> Any:
            driver.launch("hopper_attention", grid, *maps, o, *sizes, strides)
            return o

        contestants["wgmma"] = hopper
    turned_q, turned_k, turned_v = (x.transpose(1, 2) for x in (q, k, v))
    peer = "torch SDPA", lambda: scaled_dot_product_attention(turned_q, turned_k, turned_v, is_causal=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        first_q, first_k, first_v = (x[:1].float() for x in (turned_q, turned_k, turned_v))
        expected = scaled_dot_product_attention(first_q, first_k, first_v, is_causal=True).transpose(1, 2)
    first = {name: (lambda call=call: call()[:1]) for name, call in contestants.items()}
    return compare(f"attention causal B={BATCH} H={HEADS} D={HEAD} T={TOKENS}", first, peer, expected)


def bench_gla(driver: Driver) -> Row:
    """Gated linear attention."""
    import torch

    q, k, v = (torch.randn(BATCH, TOKENS, HEADS, HEAD, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    g = torch.nn.functional.logsigmoid(torch.randn(BATCH, TOKENS, HEADS, HEAD, device="cuda")) / 16
    o, chunks, scale = torch.empty_like(q), TOKENS // 64, HEAD**-0.5
    states = torch.empty(BATCH, HEADS, chunks, HEAD, HEAD, device="cuda", dtype=torch.bfloat16)
    strides = Strides(*q.stride()[:3])
    gates = GateStrides(*g.stride())  # pyright: ignore[reportCallIssue]  # fields of both structures
    sizes = ctypes.c_int(TOKENS), ctypes.c_int(HEADS)
    first_grid, second_grid = ((HEAD // 64) ** 2, BATCH * HEADS, 1), (chunks, BATCH * HEADS, 1)

    def ours() -> Any:
        driver.launch("gla_states", first_grid, k, v, g, states, *sizes, strides, strides, gates)
        last = (*sizes, ctypes.c_float(scale), strides, strides, strides, gates, strides)
        driver.launch("gla_outputs", second_grid, q, k, v, g, states, o, *last)
        return o[:, :, :1]

    first_q, first_k, first_v, first_g = (x[:, :, :1].double() for x in (q, k, v, g))
    expected = gla_by_steps(first_q, first_k, first_v, first_g, scale)
    case = f"gated linear attention B={BATCH} T={TOKENS} H={HEADS} D={HEAD}"
    return compare(case, {"chunkwise mma": ours}, gla_peer(q, k, v, g, scale), expected)


def gla_by_steps(q: Any, k: Any, v: Any, g: Any, scale: float) -> Any:
    """The recurrence as written."""
    import torch

    state, outputs = torch.zeros(*q.shape[::2], HEAD, HEAD, device=q.device, dtype=q.dtype), []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (q[:, t, :, :, None] * state).sum(-2))
    return torch.stack(outputs, 1)


def gla_peer(q: Any, k: Any, v: Any, g: Any, scale: float) -> tuple[str, Callable[[], Any]]:
    """Return the best chunkwise form that is here."""
    import torch

    with contextlib.suppress(ImportError):
        from fla.ops.gla import chunk_gla  # pyright: ignore[reportMissingImports]  # optional

        return "flash-linear-attention", lambda: chunk_gla(q, k, v, g, scale=scale)[0]

    def chunkwise(q: Any, k: Any, v: Any, g: Any) -> Any:
        q, k, v, g = (x.unflatten(1, (-1, 64)).transpose(2, 3) for x in (q, k, v, g))  # B N H C D
        sums = g.cumsum(-2)
        left, right = q * sums.exp().to(q.dtype), k * (-sums).exp().to(q.dtype)
        within = (left @ right.transpose(-1, -2)).tril() @ v
        ends = sums[..., -1:, :]
        added = ((k * (ends - sums).exp().to(q.dtype)).transpose(-1, -2) @ v).float()
        state, outputs = torch.zeros_like(added[:, 0]), []
        for chunk in range(added.shape[1]):
            outputs.append(within[:, chunk] + left[:, chunk] @ state.to(q.dtype))
            state = ends[:, chunk].exp().transpose(-1, -2) * state + added[:, chunk]
        return scale * torch.stack(outputs, 1).transpose(2, 3).flatten(1, 2)

    compiled = torch.compile(chunkwise)
    return "torch, chunkwise and compiled", lambda: compiled(q, k, v, g)


def bench_encoder(folder: Path, batch: int) -> Row:
    """An artifact, started as a graph, and the same network in torch."""
    import torch

    case, peer = f"encoder d={WIDTH} L={DEPTH} T={ENCODER_TOKENS} batch {batch}", "torch.compile(max-autotune)"
    with project_in(folder / "encoders" / "lib"):
        from codegen import runtime
        from codegen.gpu.cuda.timing import GpuTiming
        from codegen.gpu.loading import stopwatch

        path = next((folder / "encoders").rglob(f"encoder_b{batch}.nas"))
        model = runtime.load(path, self_test=False)
        error = model.self_test()  # against torch's outputs, which are inside; raises where they differ
        watch = stopwatch(GpuTiming())
        ours = watch.prepare(model.prepare())
        network = TorchEncoder().build().cuda().to(torch.bfloat16).eval()
        x = torch.randn(batch, ENCODER_TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
        compiled = torch.compile(network, mode="max-autotune")
        with torch.inference_mode():
            for _ in range(WARM_UP):
                compiled(x)
            own, other = [], []
            for _ in range(ROUNDS):
                own.append(watch.seconds(ours) * 1e3)
                other += time_in_turns([lambda: compiled(x)], 1)
    ours_ms, peer_ms = statistics.median(own), statistics.median(other)
    return Row(case, "artifact", peer, "ok", error, ours_ms, peer_ms, peer_ms / ours_ms)


@contextlib.contextmanager
def project_in(folder: Path) -> Iterator[None]:
    """Import this project from a bundle, unless it is installed."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


class TorchEncoder:
    """The network of `encoder_graph` in torch."""

    def build(self) -> Any:
        """Return the module; torch is imported here."""
        from torch import nn

        layer = nn.TransformerEncoderLayer(
            WIDTH, WIDTH // 64, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True, bias=True
        )
        return nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)


def is_hopper() -> bool:
    """Whether the GPU has warpgroup products."""
    import torch

    return torch.cuda.get_device_capability(0) == (9, 0)


def has_gpu() -> bool:
    """Whether torch can use a GPU here."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def main() -> None:
    """Prepare, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="only compile, into a folder to be copied")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.prepare)
        print(f"nothing was measured; on a machine with a GPU and torch: python {options.prepare}/gpu.py")
        return
    with contextlib.ExitStack() as stack:
        folder = Path(__file__).resolve().parent
        if not (folder / "kernels" / "kernels.json").exists():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nas-gpu-")))
            with contextlib.redirect_stdout(sys.stderr):
                prepare(folder)
        if not has_gpu():
            print(json.dumps({"rows": [], "reason": "no GPU"}) if options.json else "nothing was measured: no GPU here")
            return
        show(measure(folder), options.json)


def measure(folder: Path) -> list[Row]:
    """Run every case; one that fails is a row that says why."""
    driver = Driver(folder / "kernels")
    cases: list[tuple[str, Callable[[], Row]]] = [
        ("gemm", lambda: bench_gemm(driver)),
        ("attention", lambda: bench_attention(driver)),
        ("gated linear attention", lambda: bench_gla(driver)),
        *((f"encoder batch {batch}", lambda batch=batch: bench_encoder(folder, batch)) for batch in (1, 32)),
    ]
    rows: list[Row] = []
    for name, case in cases:
        try:
            rows.append(case())
        except Exception as error:  # noqa: BLE001  # the other cases are worth having
            rows.append(Row(name, "-", "-", f"failed: {type(error).__name__}: {error}"))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def show(rows: Sequence[Row], as_json: bool) -> None:
    """Print the rows."""
    import torch

    gpu = torch.cuda.get_device_name(0)
    if as_json:
        print(json.dumps({"gpu": gpu, "torch": torch.__version__, "rows": [row._asdict() for row in rows]}, indent=1))
        return
    print(f"{gpu}, torch {torch.__version__}; medians of {ROUNDS} by device events")
    for row in rows:
        if row.ratio is None:
            print(f"{row.case}: {row.status}")
        else:
            times = f"{row.ours_ms:.4g} ms ({row.ours}), {row.peer} {row.peer_ms:.4g} ms"
            print(f"{row.case}: {times}: {row.ratio:.2f} times; error {row.error:.1e}; {row.status}")


if __name__ == "__main__":
    main()
