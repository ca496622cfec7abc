"""The example program of an exported model, and its README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from codegen.c_export.signature import Argument, Signature
from codegen.c_export.sources import arguments_text
from codegen.targets.base import Target

COMPILE_LINE: Final = "-std=c11 -O2 -I. main.c model.c weights.S kernels.o -lm -o example"


def main_source(prefix: str, signatures: Sequence[Signature], tolerance: float) -> str:
    """Write main.c: it runs a function on files, or checks all functions on the examples."""
    parts = [_HEAD.replace("PREFIX", prefix)]
    for signature in signatures:
        parts.append(_tables(prefix, signature))
    rows = ", ".join(
        f'{{"{s.name}", run_{s.name}, {s.name}_in, {len(s.arguments_in)}, {s.name}_out, {len(s.arguments_out)}}}'
        for s in signatures
    )
    parts.append(f"static const function functions[] = {{{rows}}};\n")
    return "\n".join([*parts, _TAIL.replace("PREFIX", prefix).replace("TOLERANCE", repr(tolerance))])


def file_name(function: str, role: str, argument: Argument) -> str:
    """Return the name of an example's file; `role` is `in` or `out`."""
    return f"{function}.{role}.{argument.name}.bin"


def readme(prefix: str, signatures: Sequence[Signature], target: Target, facts: Sequence[str]) -> str:
    """Write README.md."""
    calls = "\n".join(
        f"./example {signature.name} "
        + " ".join(f"{argument.name}.bin" for argument in (*signature.arguments_in, *signature.arguments_out))
        for signature in signatures
    )
    rows = "\n".join(
        f"| `{prefix}_{signature.name}` | {_listed(signature.arguments_in)} | {_listed(signature.arguments_out)} |"
        for signature in signatures
    )
    return _README.format(
        prefix=prefix,
        architecture=target.architecture,
        processor=f"{target.isa.name}, {target.mcpu}",
        compiler=_compiler(target),
        line=COMPILE_LINE,
        calls=calls,
        rows=rows,
        files="\n".join(f"| {name} | {what} |" for name, what in _FILES),
        facts="\n".join(f"- {fact}" for fact in facts),
    )


def _compiler(target: Target) -> str:
    """Return the command that a reader would compile with."""
    if "android" in target.triple:
        return "clang --target=aarch64-linux-android24"
    return "aarch64-linux-gnu-gcc -static" if target.is_foreign else "cc"


def _listed(arguments: Sequence[Argument]) -> str:
    return "; ".join(map(arguments_text, arguments))


_README: Final = """# {prefix}

A compiled model as C for {architecture} ({processor}): no runtime, no library but libc and libm, one thread.

```sh
{compiler} {line}
./example check data       # run every function on its example and compare
{calls}
```

CMake does the same: `cmake -B build && cmake --build build && ctest --test-dir build`.

The files are raw little-endian arrays: inputs first, then the outputs to write. Arrays for several calls may follow
each other in a file; for `step` they are one stream.

| function | reads | writes |
|---|---|---|
{rows}

| file | what it is |
|---|---|
{files}

{facts}
"""

_FILES: Final = (
    ("model.h", "the functions"),
    ("model.c", "their static memory plan and the order of the kernels"),
    ("kernels.o", "the kernels, plain C functions of pointers"),
    ("weights.bin, weights.S", "the weights, and what links them in as they lie"),
    ("main.c, data/", "a program around the functions, with inputs and the outputs that torch gives for them"),
    ("model.json", "what this folder is, checksums included"),
)


def _tables(prefix: str, signature: Signature) -> str:
    inward, outward = signature.arguments_in, signature.arguments_out
    given = [f"in[{number}]" for number in range(len(inward))]
    made = [f"out[{number}]" for number in range(len(outward))]
    lines = [_table(f"{signature.name}_in", signature.name, "in", inward)]
    lines.append(_table(f"{signature.name}_out", signature.name, "out", outward))
    state = ""
    if signature.has_state:
        state = "&state, "
        lines.append(f"static {prefix}_state state; /* all zeros, as after {prefix}_start */")
    arguments = (state + ", ".join([*given, *made])).rstrip(", ")
    lines.append(
        f"static int run_{signature.name}(void **in, void **out) {{\n    (void)in;\n"
        f"    return {prefix}_{signature.name}({arguments});\n}}\n"
    )
    return "\n".join(lines)


def _table(name: str, function: str, role: str, arguments: Sequence[Argument]) -> str:
    rows = [
        f'{{"{file_name(function, role, argument)}", {argument.elements}, sizeof({argument.c_type}), '
        f"'{_KINDS.get(argument.spec.dtype, argument.spec.dtype[0])}'}}"
        for argument in arguments
    ] or ["{0}"]
    return f"static const tensor {name}[] = {{{', '.join(rows)}}};"


_KINDS: Final = {"float16": "h", "bool": "u", "uint8": "u", "uint16": "u"}

_HEAD: Final = """/* Runs PREFIX: `example FUNCTION IN... OUT...` on files, `example check FOLDER` on the examples. */
#include "model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *file;
    size_t count, size; /* elements, bytes of each */
    char kind;          /* f floating point, i signed, u unsigned, h bits of half precision */
} tensor;

typedef struct {
    const char *name;
    int (*run)(void **in, void **out);
    const tensor *in;
    int inputs;
    const tensor *out;
    int outputs;
} function;
"""

_TAIL: Final = """static void fail(const char *what, const char *where) {
    fprintf(stderr, "%s: %s\\n", where, what);
    exit(1);
}

static unsigned char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) fail("cannot be read", path);
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    unsigned char *data = malloc(*size + 1);
    if (!data || fread(data, 1, *size, file) != *size) fail("cannot be read", path);
    fclose(file);
    return data;
}

static void write_file(const char *path, const void *data, size_t size) {
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(data, 1, size, file) != size || fclose(file)) fail("cannot be written", path);
}

static double number(const void *data, size_t at, const tensor *t) {
    if (t->kind == 'f') return t->size == 4 ? ((const float *)data)[at] : ((const double *)data)[at];
    long long value = 0;
    memcpy(&value, (const char *)data + at * t->size, t->size);
    if (t->kind == 'i' && t->size < 8 && value >> (8 * t->size - 1)) value -= 1LL << (8 * t->size);
    return (double)value;
}

/* Largest difference, relative to the largest expected number. */
static double difference(const void *found, const void *expected, size_t count, const tensor *t) {
    double worst = 0, scale = 0;
    for (size_t i = 0; i < count; i++) {
        double is = number(found, i, t), should = number(expected, i, t);
        if (!(fabs(is - should) <= worst)) worst = fabs(is - should);
        if (fabs(should) > scale) scale = fabs(should);
        if (worst != worst) return worst;
    }
    return worst / (scale > 0 ? scale : 1);
}

/* Call a function as often as its input files have arrays for it; returns the outputs, and how many calls. */
static size_t run(const function *f, char **files, unsigned char **results) {
    unsigned char *given[8] = {0};
    void *in[8] = {0}, *out[8] = {0};
    size_t calls = 1;
    for (int i = 0; i < f->inputs; i++) {
        size_t size, one = f->in[i].count * f->in[i].size;
        given[i] = read_file(files[i], &size);
        if (i == 0) calls = size / one;
        if (size == 0 || size != calls * one) fail("has the wrong size", files[i]);
    }
    for (int i = 0; i < f->outputs; i++) {
        results[i] = malloc(calls * f->out[i].count * f->out[i].size + 1);
        if (!results[i]) fail("out of memory", f->name);
    }
    for (size_t call = 0; call < calls; call++) {
        for (int i = 0; i < f->inputs; i++) in[i] = given[i] + call * f->in[i].count * f->in[i].size;
        for (int i = 0; i < f->outputs; i++) out[i] = results[i] + call * f->out[i].count * f->out[i].size;
        int status = f->run(in, out);
        if (status) fail(status == -1 ? "an index is out of range" : "the state is full", f->name);
    }
    for (int i = 0; i < f->inputs; i++) free(given[i]);
    return calls;
}

static void check(const function *f, const char *folder) {
    char paths[8][4096], *files[8];
    unsigned char *results[8];
    for (int i = 0; i < f->inputs; i++) {
        snprintf(paths[i], sizeof paths[i], "%s/%s", folder, f->in[i].file);
        files[i] = paths[i];
    }
    size_t calls = run(f, files, results), size;
    for (int i = 0; i < f->outputs; i++) {
        snprintf(paths[0], sizeof paths[0], "%s/%s", folder, f->out[i].file);
        unsigned char *expected = read_file(paths[0], &size);
        if (size != calls * f->out[i].count * f->out[i].size) fail("has the wrong size", paths[0]);
        double worst = difference(results[i], expected, calls * f->out[i].count, &f->out[i]);
        printf("%s: %zu call(s), differs by %.2g of its scale\\n", f->out[i].file, calls, worst);
        if (!(worst <= TOLERANCE)) fail("is not what it should be", f->out[i].file);
        free(expected);
        free(results[i]);
    }
}

int main(int argc, char **argv) {
    int count = (int)(sizeof functions / sizeof *functions);
    if (!PREFIX_supported()) fail("this processor lacks instructions that the kernels use", argv[0]);
    if (argc == 3 && !strcmp(argv[1], "check")) {
        for (int i = 0; i < count; i++) check(&functions[i], argv[2]);
        return 0;
    }
    for (int i = 0; i < count && argc > 1; i++) {
        const function *f = &functions[i];
        unsigned char *results[8];
        if (strcmp(argv[1], f->name) || argc != 2 + f->inputs + f->outputs) continue;
        size_t calls = run(f, argv + 2, results);
        for (int j = 0; j < f->outputs; j++)
            write_file(argv[2 + f->inputs + j], results[j], calls * f->out[j].count * f->out[j].size);
        return 0;
    }
    fprintf(stderr, "usage: %s check FOLDER\\n", argv[0]);
    for (int i = 0; i < count; i++) {
        fprintf(stderr, "       %s %s", argv[0], functions[i].name);
        for (int j = 0; j < functions[i].inputs; j++) fprintf(stderr, " %s", functions[i].in[j].file);
        for (int j = 0; j < functions[i].outputs; j++) fprintf(stderr, " %s", functions[i].out[j].file);
        fprintf(stderr, "\\n");
    }
    return 2;
}
"""
