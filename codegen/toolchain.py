"""C compilers and emulators of this machine, for the processors that code is made for."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from codegen.targets.base import Target
from ir.errors import CompileError, KernelCrash, KernelTimeout

COMPILE_TIMEOUT_S: Final = 120.0
RUN_TIMEOUT_S: Final = 600.0  # an emulator takes some hundred times as long as a processor

CROSS_COMPILER: Final = "aarch64-linux-gnu-gcc"
_EMULATORS: Final = ("qemu-aarch64-static", "qemu-aarch64")
PACKAGES: Final = "g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static"


@dataclass(frozen=True)
class Toolchain:
    """How to compile C for a target, and how to run the result here.

    Attributes:
        compiler: Command of the compiler with its options.
        runner: Command that a program is an argument of; empty where it runs by itself.
        size: Command that tells the bytes of an object's sections.
    """

    compiler: tuple[str, ...]
    runner: tuple[str, ...]
    size: str

    def compile(self, arguments: Sequence[str], folder: Path) -> None:
        """Run the compiler in a folder.

        Raises:
            CompileError: It refuses.
        """
        command = [*self.compiler, *arguments]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
        if done.returncode:
            raise CompileError("the C compiler refuses", where=" ".join(command), found=done.stderr[-2000:])

    def run(self, arguments: Sequence[str], folder: Path) -> str:
        """Run a program that was compiled here, and return what it prints.

        Raises:
            KernelCrash: It ended otherwise than with 0.
            KernelTimeout: It took longer than `RUN_TIMEOUT_S`.
        """
        command = [*self.runner, *arguments]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise KernelTimeout(
                "the compiled model ran out of time", where=" ".join(command), expected=f"at most {RUN_TIMEOUT_S:g} s"
            ) from None
        if done.returncode:
            found = f"exit status {done.returncode}: {done.stderr[-2000:]}"
            raise KernelCrash("the compiled model ended its process", where=" ".join(command), found=found)
        return done.stdout

    def code_bytes(self, objects: Sequence[str], folder: Path) -> int | None:
        """Return the bytes of code and constants of object files, None where no tool can tell."""
        if shutil.which(self.size) is None:
            return None
        done = subprocess.run([self.size, *objects], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            return None
        rows = [line.split() for line in done.stdout.splitlines()[1:]]
        return sum(int(row[0]) + int(row[1]) for row in rows)


def find(target: Target) -> Toolchain | str:
    """Return the toolchain of a target, or a sentence that says what is missing."""
    if not target.is_foreign or target.architecture == platform.machine():
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
        return Toolchain(tuple(compiler.split()), (), "size") if compiler else "there is no C compiler on this machine"
    if target.architecture != "aarch64":
        return f"there is no emulator of {target.architecture} here"
    if shutil.which(CROSS_COMPILER) is None:
        return _missing(CROSS_COMPILER)
    emulator = find_emulator()
    if isinstance(emulator, str):
        return emulator
    return Toolchain((CROSS_COMPILER, "-static"), emulator, "aarch64-linux-gnu-size")


def find_emulator() -> tuple[str, ...] | str:
    """Return the command that runs programs for aarch64 here, or a sentence that says what is missing."""
    emulator = next(filter(shutil.which, _EMULATORS), None)
    return _missing(_EMULATORS[0]) if emulator is None else (emulator,)


def _missing(command: str) -> str:
    return f"{command} is not installed here; on Debian: apt install {PACKAGES}"
