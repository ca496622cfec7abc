"""What a target is: everything that code generation needs to know about the processor that will run the code."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from typing import Any

from codegen.kernels.base import Isa


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
    """

    name: str
    kind: str
    mcpu: str
    isa: Isa
    features: tuple[str, ...]
    threads: int
    triple: str = ""
    attributes: tuple[str, ...] = ()

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
        return config
