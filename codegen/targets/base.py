"""What a target is: everything that code generation needs to know about the processors that will run the code."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from typing import Any

from codegen.kernels.base import Isa


@dataclass(frozen=True)
class Gpu:
    """What a kernel needs to know about a graphics processor.

    Attributes:
        kind: TVM target kind: `cuda`, `metal` or `opencl`.
        model: Architecture or maker that code is written for, such as `sm_90` or `adreno`.
        max_threads: Most threads of a work-group.
        shared_bytes: Memory that the threads of a work-group share.
        warp: Threads that run in step.
    """

    kind: str
    model: str
    max_threads: int
    shared_bytes: int
    warp: int

    def to_tvm(self) -> dict[str, Any]:
        """Return the configuration of TVM's own target object, less the host."""
        config: dict[str, Any] = {
            "kind": self.kind,
            "max_num_threads": self.max_threads,
            "max_shared_memory_per_block": self.shared_bytes,
            "thread_warp_size": self.warp,
        }
        return {**config, "arch": self.model} if self.kind == "cuda" else config


@dataclass(frozen=True)
class Target:
    """A processor to compile for.

    Attributes:
        name: Registry key, e.g. `cpu`.
        kind: TVM target kind, e.g. `llvm`.
        mcpu: Processor name as LLVM knows it; never left out, a generic processor is several times slower.
        isa: Vector unit and threads, as the kernel generators see them.
        features: Instruction-set flags that compiled code may use, by their /proc/cpuinfo names.
        threads: Threads that share the parallel loops.
        triple: Architecture, vendor and system as LLVM writes them, such as `aarch64-linux-gnu`; empty for those of
            this machine.
        attributes: Extensions that LLVM may use beyond those of `mcpu`, such as `+dotprod`.
        gpu: The graphics processor that runs the kernels; the other fields then describe the processor beside it.
    """

    name: str
    kind: str
    mcpu: str
    isa: Isa
    features: tuple[str, ...]
    threads: int
    triple: str = ""
    attributes: tuple[str, ...] = ()
    gpu: Gpu | None = None

    @property
    def architecture(self) -> str:
        """Return the processor architecture as `platform.machine` names it, e.g. `aarch64`."""
        return self.triple.split("-")[0] or platform.machine()

    @property
    def is_foreign(self) -> bool:
        """Whether this machine cannot run the code by itself."""
        return bool(self.triple)

    @property
    def fingerprint(self) -> str:
        """Return the text that names this target in databases and folders, e.g. `cpu-avx512-znver4-t2`."""
        plain = "" if self.isa.strassen else "-plain"
        system = "-android" if "android" in self.triple else ""
        extensions = "".join(sorted(word for word in self.attributes if word != "+neon"))
        if self.gpu is not None:
            return f"{self.name}{system}-{self.gpu.model}-{self.architecture}"
        return f"{self.name}{system}-{self.isa.name}-{self.mcpu}{extensions}-t{self.threads}{plain}"

    def without_strassen(self) -> Target:
        """Return this target for models whose rows or columns differ much in size.

        A product by Strassen's algorithm rounds relative to the largest of the numbers that it adds: a row of small
        numbers that shares a product with a row of large ones loses digits. It also keeps 7/4 of the weight.
        """
        return replace(self, isa=replace(self.isa, strassen=False))

    def single_threaded(self) -> Target:
        """Return this target for code that runs on the calling thread alone."""
        return replace(self, threads=1, isa=replace(self.isa, threads=1))

    def to_tvm(self) -> dict[str, Any]:
        """Return the configuration to construct TVM's own target object from."""
        config: dict[str, Any] = {"kind": self.kind, "mcpu": self.mcpu, "num-cores": self.threads}
        if self.triple:
            config["mtriple"] = self.triple
        if self.attributes:
            config["mattr"] = list(self.attributes)
        return config if self.gpu is None else {**self.gpu.to_tvm(), "host": config}
