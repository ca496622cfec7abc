"""Text of the warpgroup products of Hopper: PTX whose operand lists are as long as the tiles."""

from __future__ import annotations

from typing import Final

_PTX_TYPES: Final = {"Bf16": "bf16", "Fp16": "f16"}


def wgmma(kind: str, columns: int, *, transposed: bool) -> str:
    """Return the specialisation of `nas::Wgmma` for one type and width.

    Args:
        kind: `Bf16` or `Fp16`.
        columns: Width of the product, a multiple of 8 up to 256.
        transposed: Whether the right side lies in shared memory as [16, columns].
    """
    functions = "\n".join(_function(kind, columns, transposed, registers) for registers in (False, True))
    head = f"template <>\nstruct Wgmma<{kind}, {columns}, {str(transposed).lower()}> {{"
    return f"#ifndef NAS_EMULATE\nnamespace nas {{\n{head}\n{functions}\n}};\n}}  // namespace nas\n#endif\n"


def _function(kind: str, columns: int, transposed: bool, registers: bool) -> str:
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    if registers:
        name, left = "registers", "const uint32_t (&a)[4]"
        operand = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        given, after, flags = ", ".join(f'"r"(a[{i}])' for i in range(4)), count + 4, f"{int(transposed)}"
    else:
        name, left, operand = "shared", "uint64_t a", f"%{count}"
        given, after, flags = '"l"(a)', count + 1, f"0, {int(transposed)}"
    ptx = _PTX_TYPES[kind]
    bound = ", ".join(f'"+f"(d[{i // 4}][{i % 4}])' for i in range(count))
    return (
        f"  static __device__ void {name}(float (&d)[{columns // 8}][4], {left}, uint64_t b, int keep) {{\n"
        f'    asm volatile("{{\\n.reg .pred keep;\\nsetp.ne.b32 keep, %{after + 1}, 0;\\n"\n'
        f'      "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{ptx}.{ptx} "\n'
        f'      "{{{sums}}}, "\n'
        f'      "{operand}, %{after}, keep, 1, 1, {flags};\\n}}\\n"\n'
        f'      : {bound}\n      : {given}, "l"(b), "r"(keep));\n  }}'
    )
