"""Loaded by every Python process that has this folder on its path: breaks the tool where `NAS_SABOTAGE` says.

The plan is JSON. `kill` is for the main process alone: once the journal tells of `done` ended trials, rungs and
artifacts, the `events`-th event from there is cut short by SIGKILL, or followed by it after `delay_s`; `only_writes`
counts no other events than writes to the journal. `break` says what happens to models by their d_model: `segfault`,
`hang` or `nan` when generated code runs, `segfault_when_timed` when it is measured.
"""

import ctypes
import importlib.machinery
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

HANG_LIMIT_S = 1.5
PLAN = json.loads(os.environ.get("NAS_SABOTAGE", "{}"))
ENDS = (b'{"event":"finished"', b'{"event":"rung"', b'{"event":"artifact"')
"""How the journal begins to tell of an end; a trial that is stopped came to a rung before."""


class Killer:
    """Counts events and ends this process in the middle of one of them."""

    def __init__(self, journal: str, done: int, events: int, delay_s: float, only_writes: bool) -> None:
        self._journal = journal
        self._done = done
        self._left = events
        self._delay_s = delay_s
        self._only_writes = only_writes

    def event(self, prepare: Callable[[], object] = lambda: None, *, is_record: bool = False) -> None:
        """Count one, and kill when it is the one; `prepare` does half of what the event would have done."""
        if (self._only_writes and not is_record) or not self._is_armed():
            return
        self._left -= 1
        if self._left != 0:
            return
        if self._delay_s:
            timer = threading.Timer(self._delay_s, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        else:
            prepare()
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_armed(self) -> bool:
        if self._done > 0:
            try:
                with open(self._journal, "rb") as file:
                    lines = file.read().splitlines()
            except FileNotFoundError:
                lines = []
            done = sum(line.startswith(ENDS) for line in lines)
            self._done = 0 if done >= self._done else self._done
        return self._done == 0

    def around(self, owner: Any, name: str) -> None:
        """Make the call of a function two events, its begin and its end."""
        function = getattr(owner, name)

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self.event()
            result = function(*arguments, **options)
            self.event()
            return result

        setattr(owner, name, call)

    def watch_files(self) -> None:
        """Make each write, flush and renaming an event; a write is cut in the middle."""
        write = os.write

        def write_half(descriptor: int, data: Any) -> int:
            is_record = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")) == "journal.jsonl"
            self.event(lambda: write(descriptor, data[: len(data) // 2]), is_record=is_record)
            return write(descriptor, data)

        os.write = write_half
        for name in ("fsync", "replace"):
            self.around(os, name)

    def patches(self) -> dict[str, Callable[[ModuleType], object]]:
        """Return what to do with each module after its import."""
        return {
            "nas.proposals": lambda module: self.around(module.Proposer, "propose"),
            "nas.run": lambda module: [self.around(module.Run, name) for name in ("next_job", "end_job", "report")],
            "nas.ship": lambda module: self.around(module, "compile_trial"),
            "codegen.compile": lambda module: self.around(module, "compile_graph"),
            "codegen.measure": lambda module: self.around(module, "measure_latency"),
        }


class Breaker:
    """Breaks the generated code of chosen models."""

    def __init__(self, modes: dict[str, str]) -> None:
        self._modes = modes

    def patches(self) -> dict[str, Callable[[ModuleType], object]]:
        """Return what to do with each module after its import."""
        return {
            "codegen.compile": self._limit_hangs,
            "codegen.build": self._break_run,
            "codegen.measure": self._break_measurement,
        }

    def _limit_hangs(self, module: ModuleType) -> None:
        compile_graph, usual_s = module.compile_graph, module.TIMEOUT_S

        @wraps(compile_graph)
        def compile_with_limit(graph: Any, *arguments: Any, **options: Any) -> Any:
            vars(module)["TIMEOUT_S"] = HANG_LIMIT_S if self._mode(graph) == "hang" else usual_s
            return compile_graph(graph, *arguments, **options)

        vars(module)["compile_graph"] = compile_with_limit

    def _break_run(self, module: ModuleType) -> None:
        build_and_run = module.build_and_run

        @wraps(build_and_run)
        def run(graphs: Any, *arguments: Any) -> Any:
            mode = next(filter(None, map(self._mode, graphs.values())), None)
            if mode == "segfault":
                end_by_segfault()
            if mode == "hang":
                time.sleep(3600)
            built, found = build_and_run(graphs, *arguments)
            if mode == "nan":
                for outputs in found.values():
                    outputs.update({name: array * float("nan") for name, array in outputs.items()})
            return built, found

        vars(module)["build_and_run"] = run

    def _break_measurement(self, module: ModuleType) -> None:
        measure = module._measure

        @wraps(measure)
        def run(paths: list[str], *arguments: Any) -> Any:
            from codegen.artifact import read
            from ir.serialize import graph_from_json

            modes = {self._mode(graph_from_json(read(path).graph_json)) for path in paths}
            if "segfault_when_timed" in modes:
                end_by_segfault()
            return measure(paths, *arguments)

        vars(module)["_measure"] = run

    def _mode(self, graph: Any) -> str | None:
        widths = {graph.type_of(node.results[0]).shape[-1] for node in graph.parameters.values() if "norm" in node.path}
        found = [self._modes[str(width)] for width in sorted(widths) if str(width) in self._modes]
        return found[0] if found else None


def end_by_segfault() -> None:
    """Read from an address that nothing is mapped to."""
    ctypes.string_at(0)


class Patching:
    """Import hook that changes modules once they are executed."""

    def __init__(self, patches: dict[str, Callable[[ModuleType], object]]) -> None:
        self._patches = patches

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find a module that is to be changed, as Python would."""
        patch = self._patches.pop(name, None)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if patch is not None else None
        if patch is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = execute_and_patch
        return spec


if "kill" in PLAN:
    del os.environ["NAS_SABOTAGE"]
    killer = Killer(**PLAN["kill"])
    killer.watch_files()
    sys.meta_path.insert(0, Patching(killer.patches()))  # pyright: ignore[reportArgumentType]  # a finder by shape
if "break" in PLAN:
    breaker = Breaker(PLAN["break"])
    sys.meta_path.insert(0, Patching(breaker.patches()))  # pyright: ignore[reportArgumentType]  # as above
