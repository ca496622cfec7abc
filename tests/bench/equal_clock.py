"""Searches of equal wall-clock time: python tests/bench/equal_clock.py --json

For each seed a supernet is trained and audited, predictor-guided evolution searches by its scores, and the winners are
trained alone; where the audit fails as many trials are trained instead. Random search and regularized evolution, which
train every candidate, then get exactly as long. What counts of each search are the models that it trained alone, all
for the same number of steps, by validation loss and FLOPs; the hypervolumes lie in the box that all of them span for a
seed. For a quiet machine: a busy one trains less.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_supernet import OPTIONS, TASKS, make_space

from ir.cost import profile
from nas import pareto, tasks
from nas.budget import Budget
from nas.objectives.flops import Flops
from nas.objectives.quality import Quality
from nas.search import open_study, search
from nas.supernet.search import prepare_quality, train_winners
from nas.tasks.base import Task
from searchspaces.architecture import Architecture
from searchspaces.space import Space

TASK = "char_lm"
SUPERNET_STEPS, ALONE_STEPS = 1000, 400
RIVALS = ("random", "regularized_evolution")
SCREENED = 192
"""Trials that the supernet scores."""
WINNERS = 40
"""Those of them that are trained alone."""
Points = list[tuple[float, float]]
"""Validation loss and FLOPs of models trained alone."""


def by_supernet(space: Space, task: Task, quality: Quality, seed: int) -> tuple[Points, float, dict[str, Any]]:
    """Search with a supernet; return what was trained alone, the seconds, and what the audit said."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nas-clock-") as name:
        folder = Path(name)
        prepared = prepare_quality(space, task, quality, folder, seed=seed, steps=SUPERNET_STEPS)
        costs = [flops(anchor, task) for anchor in prepared.anchors]
        points = list(zip(prepared.audit.alone, costs, strict=True))
        goals = [prepared.objective, Flops()]
        with open_study(space, task=task, objectives=goals, storage=folder / "run", seed=seed, threads=1) as study:
            if prepared.audit.passes:
                study.run(Budget(trials=SCREENED))
                winners = train_winners(study, quality, prepared, count=WINNERS)
                points += [(score.value, study.trials[number].values["flops"]) for number, score in winners.items()]
            else:
                study.run(Budget(trials=WINNERS))
                points += [(trial.values["quality"], trial.values["flops"]) for trial in study.trials]
        seconds = time.monotonic() - started
    return points, seconds, {"tau": prepared.audit.tau, "used": prepared.audit.passes, "trained": len(points)}


def by_training(space: Space, task: Task, quality: Quality, strategy: str, seed: int, seconds: float) -> Points:
    """Search by training every candidate until the time is over; the trial that runs then still counts."""
    budget = Budget(hours=seconds / 3600)
    study = search(
        space, task=task, objectives=[quality, Flops()], strategy=strategy, budget=budget, seed=seed, threads=1
    )
    return [(trial.values["quality"], trial.values["flops"]) for trial in study.trials if trial.state == "finished"]


def flops(architecture: Architecture, task: Task) -> float:
    """Operations of one forward pass over one sequence."""
    return float(profile(architecture.graph(task.signature)).flops)


def volumes(found: dict[str, Points]) -> dict[str, float]:
    """Hypervolume of each search in the box that all points span, 0 to 1."""
    every_NM = np.array([point for points in found.values() for point in points])
    low_M, range_M = every_NM.min(axis=0), np.ptp(every_NM, axis=0)
    return {
        name: round(pareto.hypervolume((np.array(points) - low_M) / range_M, [1.0, 1.0]), 4)
        for name, points in found.items()
    }


def compare(seed: int) -> dict[str, Any]:
    """Run every search for one seed."""
    space, task = make_space(TASK), tasks.get(TASK, **TASKS[TASK])
    quality = Quality(steps=ALONE_STEPS, options=OPTIONS[TASK])
    points, seconds, facts = by_supernet(space, task, quality, seed)
    found = {"supernet": points}
    for strategy in RIVALS:
        found[strategy] = by_training(space, task, quality, strategy, seed, seconds)
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "hypervolume": volumes(found),
        "models_trained": {name: len(points) for name, points in found.items()},
        "best_quality": {name: round(min(points)[0], 4) for name, points in found.items()},
        "supernet": facts,
    }


def main() -> None:
    """Compare over the seeds asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        results.append(compare(seed))
        if not options.json:
            print(results[-1], flush=True)
    means = {
        name: round(float(np.mean([result["hypervolume"][name] for result in results])), 4)
        for name in ("supernet", *RIVALS)
    }
    print(json.dumps({"results": results, "mean_hypervolume": means}) if options.json else f"mean: {means}")


if __name__ == "__main__":
    main()
