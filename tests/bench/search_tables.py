"""Search a table of architectures by every strategy, and predict other tables: figures against goals.

`python tests/bench/search_tables.py --json` runs the public tables below `--data`, the hypervolume part with Optuna
beside it where that is installed. `--table PATH --columns a,b --objectives x,y` searches any other table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2]))
sys.path.insert(0, str(HERE.parent))

from predict_tables import predict_fbnet, predict_hat, predict_llmforge, predict_llmforge_nested  # noqa: E402
from table_space import Surrogate, TableSpace, read_points, read_table  # noqa: E402

from nas import Custom, pareto  # noqa: E402
from nas.search import search  # noqa: E402

STRATEGIES = ("random", "regularized_evolution", "nsga2", "predictor_guided")
CHECKPOINTS = (100, 200)
HW_GPT = "hw_gpt_bench/gpt_s.csv.gz"
HW_GPT_COLUMNS = "embed_dim,n_layer,n_head,mlp_ratio,bias"
HW_GPT_OBJECTIVES = "ppl,lat_ms_h100"
GOALS = {100: 0.600, 200: 0.612}
PREDICTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "llmforge": predict_llmforge,
    "llmforge_nested": predict_llmforge_nested,
    "help_fbnet": predict_fbnet,
    "hat": predict_hat,
}


def search_table(
    path: Path, columns: Sequence[str], objectives: Sequence[str], seeds: Sequence[int], strategies: Sequence[str]
) -> dict[str, Any]:
    """Run every strategy on the surrogates of a table.

    Args:
        path: CSV file; every objective is minimised.
        columns: What may be chosen.
        objectives: What is to be small.
        seeds: One study for each.
        strategies: Names, `optuna_nsga2` and `optuna_tpe` among them.

    Returns:
        Mean hypervolumes by strategy and number of evaluations, in the box that the table's values span, with the
        worst corner as reference.
    """
    rows = read_table(path)
    points = read_points(rows, columns)
    values_NM = np.array([[float(row[name]) for name in objectives] for row in rows])
    low_M, range_M = values_NM.min(axis=0), np.ptp(values_NM, axis=0)
    space = TableSpace.of(points)
    surrogates = [Surrogate.of(points, values_NM[:, column].tolist()) for column in range(len(objectives))]

    def volume(losses: Any) -> float:
        return pareto.hypervolume((np.array(losses) - low_M) / range_M, [1.0] * len(objectives))

    result: dict[str, Any] = {"table": path.name, "rows": len(rows), "whole_table": round(volume(values_NM), 4)}
    for strategy in strategies:
        run = _run_optuna if strategy.startswith("optuna_") else _run_study
        volumes: dict[int, list[float]] = {count: [] for count in CHECKPOINTS}
        for seed in seeds:
            losses = run(space, surrogates, objectives, strategy, seed)
            for count in CHECKPOINTS:
                volumes[count].append(volume(losses[:count]))
        result[strategy] = {str(count): _summary(found) for count, found in volumes.items()}
        print(
            f"{strategy:24}", *(f"{count}: {np.mean(found):.4f}" for count, found in volumes.items()), file=sys.stderr
        )
    return result


def _summary(found: Sequence[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(found)), 4), "std": round(float(np.std(found)), 4)}


def _run_study(
    space: TableSpace, surrogates: Sequence[Any], names: Sequence[str], strategy: str, seed: int
) -> list[tuple[float, ...]]:
    objectives = [Custom(function, name=name) for function, name in zip(surrogates, names, strict=True)]
    study = search(space, objectives=objectives, strategy=strategy, budget=max(CHECKPOINTS), seed=seed)
    return [trial.losses for trial in study.trials]


def _run_optuna(
    space: TableSpace, surrogates: Sequence[Any], names: Sequence[str], strategy: str, seed: int
) -> list[tuple[float, ...]]:
    optuna: Any = importlib.import_module("optuna")

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = {"optuna_nsga2": optuna.samplers.NSGAIISampler, "optuna_tpe": optuna.samplers.TPESampler}
    found: list[tuple[float, ...]] = []

    def objective(trial: Any) -> tuple[float, ...]:
        point: dict[str, Any] = {name: trial.suggest_categorical(name, values) for name, values in space.plain.items()}
        for name, values in space.per_layer.items():
            point[name] = [trial.suggest_categorical(f"{name}{i}", values) for i in range(point[space.depth or ""])]
        losses = tuple(surrogate(space.architecture(point)) for surrogate in surrogates)
        found.append(losses)
        return losses

    study = optuna.create_study(directions=["minimize"] * len(names), sampler=samplers[strategy](seed=seed))
    study.optimize(objective, n_trials=max(CHECKPOINTS))
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parents[3] / "shared" / "data", help="folder of the tables")
    parser.add_argument("--table", type=Path, help="another table to search; no predictions then")
    parser.add_argument("--columns", default=HW_GPT_COLUMNS, help="its columns of choices")
    parser.add_argument("--objectives", default=HW_GPT_OBJECTIVES, help="its columns to minimise")
    parser.add_argument("--strategies", default="", help="names; by default all, and Optuna's where installed")
    parser.add_argument("--seeds", type=int, default=10, help="studies of each strategy")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", choices=["search", *PREDICTIONS], action="append", help="parts to run; repeat it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def _strategies(given: str) -> list[str]:
    if given:
        return given.split(",")
    if importlib.util.find_spec("optuna") is None:
        print("optuna is not installed: left out", file=sys.stderr)
        return list(STRATEGIES)
    return [*STRATEGIES, "optuna_nsga2", "optuna_tpe"]


def main() -> None:
    """Run the parts and print their figures."""
    given = _parse()
    parts = ["search"] if given.table else given.only or ["search", *PREDICTIONS]
    result: dict[str, Any] = {}
    if "search" in parts:
        seeds = range(given.first_seed, given.first_seed + given.seeds)
        table = given.table or given.data / HW_GPT
        names = given.columns.split(","), given.objectives.split(",")
        result["search"] = search_table(table, *names, seeds, _strategies(given.strategies))
        guided = result["search"].get("predictor_guided")
        if guided and not given.table:
            result["search"]["goals"] = {
                str(count): {"goal": goal, "is_reached": guided[str(count)]["mean"] >= goal}
                for count, goal in GOALS.items()
            }
    for part in parts:
        if part in PREDICTIONS:
            result[part] = PREDICTIONS[part](given.data)
    print(json.dumps(result, indent=None if given.json else 2))


if __name__ == "__main__":
    main()
