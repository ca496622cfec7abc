"""The C sources of an exported model: header, glue, weights, build file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from codegen.archive import ALIGNMENT_BYTES
from codegen.c_export.program import Function, Place, Program
from codegen.c_export.signature import POSITION, Argument, Signature
from codegen.targets.base import Target

_STATE_WORD_BYTES: Final = 8

# Names of gcc and clang for what /proc/cpuinfo lists; what only old compilers lack is left out.
_X86_FEATURES: Final[Mapping[str, str]] = {
    "ssse3": "ssse3",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "popcnt": "popcnt",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "bmi1": "bmi",
    "bmi2": "bmi2",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
}
# Bits of getauxval(AT_HWCAP) on aarch64. Source: Linux, arch/arm64/include/uapi/asm/hwcap.h.
_ARM_HWCAP_BITS: Final[Mapping[str, int]] = {"asimd": 1, "asimdhp": 10, "asimddp": 20, "sve": 22}


def header(prefix: str, signatures: Sequence[Signature]) -> str:
    """Write model.h."""
    guard = f"{prefix.upper()}_H"
    lines = [
        "/* One model for one thread: its memory is static, so no two calls may run at once. */",
        f"#ifndef {guard}",
        f"#define {guard}",
        "#include <stddef.h>",
        "#include <stdint.h>",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        "/* What the functions return: an index may point outside its table, and a state may be full. */",
        f"enum {{ {prefix.upper()}_OK = 0, {prefix.upper()}_OUT_OF_RANGE = -1, {prefix.upper()}_FULL = -2 }};",
        "",
        "/* Return 1 where this processor has the instructions that the kernels use, 0 elsewhere. */",
        f"int {prefix}_supported(void);",
    ]
    for signature in signatures:
        lines += ["", *(_state_header(prefix, signature) if signature.has_state else ()), *_comment(signature)]
        lines.append(f"{_prototype(prefix, signature)};")
    return "\n".join([*lines, "", "#ifdef __cplusplus", "}", "#endif", "#endif", ""])


def glue(prefix: str, program: Program, signatures: Sequence[Signature], target: Target) -> str:
    """Write model.c: the memory plan and the calls of the kernels."""
    most = max(function.memory_bytes for function in program.functions)
    total = max(most + program.workspace_bytes, 1)
    lines = [
        '#include "model.h"',
        "",
        "#include <string.h>",
        *(["#include <sys/auxv.h>"] if target.architecture == "aarch64" else []),
        "",
        f"extern const unsigned char {prefix}_weights[];",
        "",
        f"/* What lives between kernels, and from byte {most} on what a kernel needs while it runs. */",
        f"static _Alignas({ALIGNMENT_BYTES}) unsigned char memory[{total}];",
        f"#define workspace (memory + {most})",
        "",
    ]
    for symbol, (reads, writes) in program.signatures.items():
        operands = ", ".join(["const void *"] * reads + ["void *"] * (writes + 1))
        lines += [f"/* {program.labels[symbol]} */", f"void {symbol}({operands});"]
    lines += ["", *_supported(prefix, target)]
    if any(argument.spec.below is not None for signature in signatures for argument in signature.arguments_in):
        lines += ["", *_RANGE_CHECK]
    for function, signature in zip(program.functions, signatures, strict=True):
        lines += ["", *(_start(prefix) if signature.has_state else ()), *_function(prefix, function, signature)]
    return "\n".join([*lines, ""])


def weights_source(prefix: str) -> str:
    """Write weights.S, which links weights.bin into the program."""
    return f"""    .section .rodata
    .balign {ALIGNMENT_BYTES}
    .global {prefix}_weights
    .type {prefix}_weights, %object
{prefix}_weights:
    .incbin "weights.bin"
    .byte 0
    .size {prefix}_weights, . - {prefix}_weights
    .section .note.GNU-stack, "", %progbits
"""


def cmake(prefix: str) -> str:
    """Write CMakeLists.txt."""
    here = "${CMAKE_CURRENT_SOURCE_DIR}"
    return f"""cmake_minimum_required(VERSION 3.13)
project({prefix} C ASM)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

add_library({prefix}_model STATIC model.c weights.S kernels.o)
set_source_files_properties(kernels.o PROPERTIES EXTERNAL_OBJECT TRUE)
set_source_files_properties(weights.S PROPERTIES OBJECT_DEPENDS {here}/weights.bin)
set_target_properties({prefix}_model PROPERTIES C_STANDARD 11)
target_include_directories({prefix}_model PUBLIC {here})
target_link_libraries({prefix}_model PUBLIC -lm)

add_executable(example main.c)
target_link_libraries(example {prefix}_model)

enable_testing()
add_test(NAME check COMMAND example check {here}/data)
"""


def arguments_text(argument: Argument) -> str:
    """Describe an argument for people, e.g. `tokens: int32 [1, 128], 0 to 255`."""
    spec = argument.spec
    bound = "" if spec.below is None else f", 0 to {spec.below - 1}"
    return f"{argument.name}: {spec.dtype} {list(spec.shape)}{bound}"


def memory_bytes(program: Program) -> int:
    """Return the bytes of static memory of a program."""
    return max(function.memory_bytes for function in program.functions) + program.workspace_bytes


def _comment(signature: Signature) -> list[str]:
    described = "; ".join(map(arguments_text, [*signature.arguments_in, *signature.arguments_out]))
    return [f"/* {described}. The arrays must not overlap. */"]


def _state_header(prefix: str, signature: Signature) -> list[str]:
    words = max(signature.bank_bytes // _STATE_WORD_BYTES, 1)
    kept_words = signature.kept_bytes // _STATE_WORD_BYTES
    bounded = signature.most_steps
    limit = f", which is at most {bounded}" if bounded is not None else ""
    return [
        "/* What one stream leaves to its next step. A copy of it is a fork. */",
        "typedef struct {",
        f"    int64_t bank[2][{words}]; /* what a step replaces: before and after */",
        *([f"    int64_t kept[{kept_words}]; /* what a step adds to */"] if kept_words else []),
        f"    int32_t position; /* steps so far{limit} */",
        "    int32_t current;",
        f"}} {prefix}_state;",
        "",
        "/* Begin a stream. */",
        f"void {prefix}_start({prefix}_state *state);",
        "",
    ]


def _prototype(prefix: str, signature: Signature) -> str:
    state = [f"{prefix}_state *state"] if signature.has_state else []
    given = [f"const {argument.c_type} *{argument.name}" for argument in signature.arguments_in]
    made = [f"{argument.c_type} *{argument.name}" for argument in signature.arguments_out]
    return f"int {prefix}_{signature.name}({', '.join([*state, *given, *made]) or 'void'})"


def _supported(prefix: str, target: Target) -> list[str]:
    if target.architecture == "x86_64":
        known = [_X86_FEATURES[name] for name in target.features if name in _X86_FEATURES]
        tests = [f'__builtin_cpu_supports("{name}")' for name in known]
        head = ["    __builtin_cpu_init();"]
    else:
        bits = [_ARM_HWCAP_BITS[name] for name in target.features if name in _ARM_HWCAP_BITS]
        tests = [f"(getauxval(AT_HWCAP) >> {bit} & 1)" for bit in bits]
        head = []
    return [
        f"int {prefix}_supported(void) {{",
        *head,
        "    return " + "\n        && ".join(tests or ["1"]) + ";",
        "}",
    ]


_RANGE_CHECK: Final = (
    "static int in_range(const int32_t *values, size_t count, int32_t below) {",
    "    for (size_t i = 0; i < count; i++)",
    "        if (values[i] < 0 || values[i] >= below) return 0;",
    "    return 1;",
    "}",
)


def _start(prefix: str) -> list[str]:
    return [f"void {prefix}_start({prefix}_state *state) {{", "    memset(state, 0, sizeof *state);", "}", ""]


def _function(prefix: str, function: Function, signature: Signature) -> list[str]:
    lines = [f"{_prototype(prefix, signature)} {{"]
    for argument in signature.arguments_in:
        if argument.spec.below is not None:
            check = f"in_range({argument.name}, {argument.elements}, {argument.spec.below})"
            lines.append(f"    if (!{check}) return {prefix.upper()}_OUT_OF_RANGE;")
    if signature.has_state:
        if signature.most_steps is not None:
            lines.append(f"    if (state->position >= {signature.most_steps}) return {prefix.upper()}_FULL;")
        lines.append("    const unsigned char *before = (const unsigned char *)state->bank[state->current];")
        lines.append("    unsigned char *after = (unsigned char *)state->bank[1 - state->current];")
        if signature.kept:
            lines.append("    unsigned char *kept = (unsigned char *)state->kept;")
    names = _Names(prefix, signature)
    for call in function.calls:
        lines.append(f"    {call.symbol}({', '.join([*map(names.of, call.operands), 'workspace'])});")
    for destination, source, size_bytes in function.copies:
        lines.append(f"    memcpy({names.of(destination)}, {names.of(source)}, {size_bytes});")
    if signature.has_state:
        lines += ["    (void)before;", "    (void)after;"]
        lines += ["    state->position++;", "    state->current = 1 - state->current;"]
    return [*lines, f"    return {prefix.upper()}_OK;", "}"]


class _Names:
    """C expressions of places."""

    def __init__(self, prefix: str, signature: Signature) -> None:
        self._bases = {"weights": f"{prefix}_weights", "memory": "memory"}
        self._signature = signature

    def of(self, place: Place) -> str:
        """Return the address of a place."""
        if place.kind in self._bases:
            return f"{self._bases[place.kind]} + {place.at}"
        inward = place.kind == "input"
        side = self._signature.inputs if inward else self._signature.outputs
        argument = side[place.at]
        if argument is not None:
            return argument.name
        key = (self._signature.input_names if inward else self._signature.output_names)[place.at]
        if key == POSITION:
            return "&state->position"
        if key in self._signature.kept:
            return f"kept + {self._signature.kept[key]}"
        return f"{'before' if inward else 'after'} + {self._signature.bank[key]}"
