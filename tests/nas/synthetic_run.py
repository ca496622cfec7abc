"""A run folder with made-up results: everything a table or a report shows, without training or compiling."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nas.objectives.latency import Latency
from nas.objectives.params import Params
from nas.objectives.quality import Quality
from nas.search import open_study
from nas.strategies.random import Random
from nas.trial import Outcome, Quantity

MACHINE = "A <fast> CPU & more"


def write_run(folder: Path, trials: int = 12, seed: int = 0) -> Path:
    """Write a study of `tiny_vision` whose trials ended as a random generator decided; every fifth failed."""
    rng = np.random.default_rng(seed)
    objectives = [Quality(steps=10), Latency()]
    constraints = [Params(max=250_000)]
    with open_study(
        "tiny_vision", objectives=objectives, constraints=constraints, strategy=Random(), storage=folder
    ) as study:
        for _ in range(trials):
            trial = study.ask()
            assert trial is not None
            study.tell(trial.number, _fail(rng) if trial.number % 5 == 4 else _finish(rng))
    return folder


def _finish(rng: np.random.Generator) -> Outcome:
    latency_ms = float(np.exp(rng.normal()))
    quality = float(np.clip(0.8 + 0.05 * np.log(latency_ms) + 0.03 * rng.normal(), 0.0, 1.0))
    details = {"machine": MACHINE, "threads": 2, "noisy": bool(rng.random() < 0.2)}
    quantities = {
        "params": Quantity(float(rng.integers(10_000, 250_000)), "", "counted"),
        "latency": Quantity(latency_ms, "ms", "measured", (0.98 * latency_ms, 1.03 * latency_ms), details),
        "quality": Quantity(quality, "fraction", "trained"),
    }
    return Outcome("finished", quantities, seconds=10.0)


def _fail(rng: np.random.Generator) -> Outcome:
    params = Quantity(float(rng.integers(10_000, 250_000)), "", "counted")
    return Outcome(
        "failed", {"params": params}, reason="NonFiniteLoss: the <loss> became nan", traceback=("line 1", "line 2")
    )
