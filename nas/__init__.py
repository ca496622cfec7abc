"""Search transformer-like models for the Pareto front of quality against measured latency of the compiled model.

    import nas

    study = nas.search("tiny_lm", target="cpu", budget=nas.Budget(trials=32), storage="runs/tiny_lm")
    for trial in study.pareto_front():
        print(trial.number, trial.values, trial.architecture)

    artifact = nas.compile(study.best(), target="cpu")
    artifact.save("best.nas")
    model = nas.load("best.nas")

Names are loaded on first use: `import nas` itself costs milliseconds, and loading an artifact needs neither torch nor
the compiler.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from codegen.artifact import Artifact as Artifact
    from codegen.devices.client import Device as Device
    from codegen.runtime import LoadedModel as LoadedModel
    from codegen.targets.base import Target as Target
    from ir.errors import ArtifactError as ArtifactError
    from ir.errors import CompileError as CompileError
    from ir.errors import DataError as DataError
    from ir.errors import GraphError as GraphError
    from ir.errors import InputError as InputError
    from ir.errors import KernelCrash as KernelCrash
    from ir.errors import KernelTimeout as KernelTimeout
    from ir.errors import MeasurementError as MeasurementError
    from ir.errors import NasError as NasError
    from ir.errors import NonFiniteLoss as NonFiniteLoss
    from ir.errors import ParseError as ParseError
    from ir.errors import SpaceError as SpaceError
    from ir.errors import StorageError as StorageError
    from ir.errors import TargetUnavailable as TargetUnavailable
    from ir.errors import TrialFailure as TrialFailure
    from ir.errors import VerificationError as VerificationError
    from nas.api import compile as compile
    from nas.api import export as export
    from nas.api import get_task as get_task
    from nas.api import load as load
    from nas.api import verify as verify
    from nas.budget import Budget as Budget
    from nas.callbacks import Callback as Callback
    from nas.executors.ray import Ray as Ray
    from nas.executors.serial import Serial as Serial
    from nas.front import Front as Front
    from nas.objectives.custom import Custom as Custom
    from nas.objectives.energy import Energy as Energy
    from nas.objectives.flops import Flops as Flops
    from nas.objectives.latency import Latency as Latency
    from nas.objectives.memory_bytes import MemoryBytes as MemoryBytes
    from nas.objectives.params import Params as Params
    from nas.objectives.predicted_energy import PredictedEnergy as PredictedEnergy
    from nas.objectives.predicted_latency import PredictedLatency as PredictedLatency
    from nas.objectives.quality import Quality as Quality
    from nas.objectives.state_bytes import StateBytes as StateBytes
    from nas.objectives.tuning_cost import TuningCost as TuningCost
    from nas.profile import profile as profile
    from nas.remeasure import remeasure as remeasure
    from nas.report.write import write_report as write_report
    from nas.search import load_study as load_study
    from nas.search import open_study as open_study
    from nas.search import search as search
    from nas.ship import ship as ship
    from nas.strategies.asha import ASHA as ASHA
    from nas.strategies.exact import Exact as Exact
    from nas.strategies.hyperband import Hyperband as Hyperband
    from nas.strategies.local_search import LocalSearch as LocalSearch
    from nas.strategies.nsga2 import NSGA2 as NSGA2
    from nas.strategies.predictor_guided import PredictorGuided as PredictorGuided
    from nas.strategies.random import Random as Random
    from nas.strategies.regularized_evolution import RegularizedEvolution as RegularizedEvolution
    from nas.study import Study as Study
    from nas.tasks.base import Task as Task
    from nas.trial import Trial as Trial
    from searchspaces.architecture import Architecture as Architecture
    from searchspaces.space import Space as Space
    from searchspaces.space import load_space as load_space

    __version__: str

_ERRORS: Final = (
    *("ArtifactError", "CompileError", "DataError", "GraphError", "InputError", "KernelCrash", "KernelTimeout"),
    *("MeasurementError", "NasError", "NonFiniteLoss", "ParseError", "SpaceError", "StorageError"),
    *("TargetUnavailable", "TrialFailure", "VerificationError"),
)

_EXPORTS: Final[dict[str, str]] = {
    **dict.fromkeys(_ERRORS, "ir.errors"),
    "ASHA": "nas.strategies.asha",
    "Architecture": "searchspaces.architecture",
    "Artifact": "codegen.artifact",
    "Budget": "nas.budget",
    "Callback": "nas.callbacks",
    "Custom": "nas.objectives.custom",
    "Device": "codegen.devices.client",
    "Energy": "nas.objectives.energy",
    "Exact": "nas.strategies.exact",
    "Flops": "nas.objectives.flops",
    "Front": "nas.front",
    "Hyperband": "nas.strategies.hyperband",
    "Latency": "nas.objectives.latency",
    "LoadedModel": "codegen.runtime",
    "LocalSearch": "nas.strategies.local_search",
    "MemoryBytes": "nas.objectives.memory_bytes",
    "NSGA2": "nas.strategies.nsga2",
    "Params": "nas.objectives.params",
    "PredictedEnergy": "nas.objectives.predicted_energy",
    "PredictedLatency": "nas.objectives.predicted_latency",
    "PredictorGuided": "nas.strategies.predictor_guided",
    "Quality": "nas.objectives.quality",
    "Random": "nas.strategies.random",
    "Ray": "nas.executors.ray",
    "RegularizedEvolution": "nas.strategies.regularized_evolution",
    "Serial": "nas.executors.serial",
    "Space": "searchspaces.space",
    "StateBytes": "nas.objectives.state_bytes",
    "Study": "nas.study",
    "Target": "codegen.targets.base",
    "Task": "nas.tasks.base",
    "Trial": "nas.trial",
    "TuningCost": "nas.objectives.tuning_cost",
    "compile": "nas.api",
    "export": "nas.api",
    "get_task": "nas.api",
    "load": "nas.api",
    "load_space": "searchspaces.space",
    "load_study": "nas.search",
    "open_study": "nas.search",
    "profile": "nas.profile",
    "remeasure": "nas.remeasure",
    "search": "nas.search",
    "ship": "nas.ship",
    "verify": "nas.api",
    "write_report": "nas.report.write",
}
"""Module of each public name."""

__all__ = ["__version__", *_EXPORTS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name == "__version__":
        value: Any = _version()
    elif name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
    else:
        raise AttributeError(f"module 'nas' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    try:
        return version("nas")
    except PackageNotFoundError:  # a source folder that is on the path but not installed
        return "0+unknown"


class _Package(ModuleType):
    """This package; importing a module of it leaves a public name of the same spelling alone (`search`, `ship`)."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _EXPORTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
