"""What a target is: everything that code generation needs to know about the processor that will run the code."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """

    name: str
    kind: str
    mcpu: str
    isa: Isa
    features: tuple[str, ...]
    threads: int

    @property
    def fingerprint(self) -> str:
        """Return the text that names this target in databases and folders, e.g. `cpu-avx512-znver4-t2`."""
        plain = "" if self.isa.strassen else "-plain"
        return f"{self.name}-{self.isa.name}-{self.mcpu}-t{self.threads}{plain}"

    def without_strassen(self) -> Target:
        """Return this target for models whose rows or columns differ much in size.

        A product by Strassen's algorithm rounds relative to the largest of the numbers that it adds: a row of small
        numbers that shares a product with a row of large ones loses digits. It also keeps 7/4 of the weight.
        """
        return replace(self, isa=replace(self.isa, strassen=False))

    def to_tvm(self) -> dict[str, str | int]:
        """Return the configuration to construct TVM's own target object from."""
        return {"kind": self.kind, "mcpu": self.mcpu, "num-cores": self.threads}
