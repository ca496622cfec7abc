"""Predict columns of public tables from few samples: figures against goals."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau, norm, rankdata, spearmanr
from table_space import read_table

from nas.predictors.ensemble import Ensemble
from nas.predictors.features import drop_inactive, flatten
from nas.predictors.transfer import DeviceTransfer

SEEDS = 10
# Regressors for models whose layers differ, and those they are chosen from in the nested check.
LAYERED = (("layer_process", "layer_trees"), ("layer_process",), ("boosting", "extra_trees"))


def predict_fbnet(data: Path, samples: int = 10) -> dict[str, Any]:
    """Predict every device from the others, those of the same name at other batch sizes left out as well."""
    rows = read_table(data / "help_fbnet" / "fbnet_latency_ms.csv.gz")
    devices = [name for name in rows[0] if name != "arch"]
    latency_ND = np.array([[float(row[name]) for name in devices] for row in rows])
    found: dict[str, float] = {}
    for column, name in enumerate(devices):
        known = [other for other, label in enumerate(devices) if _model(label) != _model(name)]
        transfer = DeviceTransfer.of(latency_ND[:, known], samples)
        predicted_N = transfer.predict(latency_ND[transfer.samples, column]).mean_N
        rest = np.setdiff1d(np.arange(len(rows)), transfer.samples)
        found[name] = round(_rank(spearmanr, predicted_N[rest], latency_ND[rest, column]), 4)
    return _judged({"samples": samples, "devices": found}, "mean_spearman", float(np.mean(list(found.values()))), 0.94)


def predict_hat(data: Path, samples: int = 100) -> dict[str, Any]:
    """Predict latency of encoder and decoder on a Raspberry Pi from a hundred samples, the rest being the test."""
    rows = read_table(data / "hat" / "wmt14ende_cpu_raspberrypi_all.csv")
    described = [{name: float(text) for name, text in row.items() if not name.startswith("latency")} for row in rows]
    described = [_with_products(features) for features in described]
    latency_N = np.array([float(row["latency_mean_encoder"]) + float(row["latency_mean_decoder"]) for row in rows])
    errors: list[float] = []
    for seed in range(SEEDS):
        order = np.random.default_rng(seed).permutation(len(rows))
        known, rest = order[:samples], order[samples:]
        fitted = Ensemble(("ridge", "quadratic", "gaussian_process"), seed=seed, outliers=4.0).fit(
            [described[row] for row in known], latency_N[known]
        )
        predicted_N = fitted.predict([described[row] for row in rest]).mean_N
        errors.append(float(np.mean(np.abs(predicted_N / latency_N[rest] - 1.0))) * 100.0)
    return _judged({"samples": samples, "seeds": SEEDS}, "mape_percent", float(np.mean(errors)), 4.0)


def predict_llmforge(data: Path, choices: Sequence[tuple[str, ...]] = LAYERED[:1]) -> dict[str, Any]:
    """Rank the validation loss of trained language models in cross-validation of 5 folds.

    Args:
        data: Folder of the tables.
        choices: Kinds of regressors; where there are several sets, inner folds of the training part choose one.
    """
    rows = read_table(data / "llmforge" / "train.csv.gz")
    described = [flatten(_active_layers(row)) for row in rows]
    loss_N = np.array([float(row["val_loss"]) for row in rows])
    fold_N = np.random.default_rng(0).permutation(len(rows)) % 5
    taus: list[float] = []
    chosen: list[str] = []
    for fold in range(5):
        known, rest = np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)
        # Only ranks count, and a tail of failed trainings would outweigh the rest: normal scores stand in for losses.
        scores_N = norm.ppf((rankdata(loss_N[known]) - 0.5) / len(known))
        tried = [
            Ensemble(kinds, folds=3, is_refitted=True).fit([described[row] for row in known], scores_N)
            for kinds in choices
        ]
        fitted = max(tried, key=lambda one: one.tau)
        chosen.append("+".join(fitted.weights))
        taus.append(_rank(kendalltau, fitted.predict([described[row] for row in rest]).mean_N, loss_N[rest]))
    result = {"rows": len(rows), "kinds": chosen, "folds": [round(tau, 4) for tau in taus]}
    return _judged(result, "mean_tau", float(np.mean(taus)), 0.62)


def predict_llmforge_nested(data: Path) -> dict[str, Any]:
    """Do the same with the kinds chosen anew in each fold, so that no choice has seen what it is judged by."""
    return predict_llmforge(data, LAYERED)


def _with_products(features: dict[str, float]) -> dict[str, float]:
    """Add what encoder and decoder have in all: each option times layers, and times layers and width."""
    added: dict[str, float] = {}
    for side in ("encoder", "decoder"):
        layers, width = features[f"{side}_layer_num"], features[f"{side}_embed_dim"]
        own = {name: value for name, value in features.items() if name.startswith(side) and "layer_num" not in name}
        added |= {f"layers x {name}": layers * value for name, value in own.items()}
        added |= {f"layers x width x {name}": layers * width * value for name, value in own.items()}
    return features | added


def _active_layers(row: Mapping[str, str]) -> dict[str, Any]:
    """Return the layers that a model has, from input to output, each with the options that do something in it."""
    active = ast.literal_eval(row["global_layer_mask"])
    layers = [_layer(row, index) for index in range(len(active))]
    return drop_inactive({"layers": layers}, active)


def _layer(row: Mapping[str, str], index: int) -> dict[str, float]:
    mlp, heads, groups, key, value = (
        float(row[f"layer{index}_{name}"])
        for name in ("mlp_size", "n_head", "n_kv_group", "n_qk_head_dim", "n_v_head_dim")
    )
    if row[f"layer{index}_attention_variant"] == "identity":
        return {"mlp": np.log(mlp)}
    widths = {"key": key, "value": value, "keys": np.log1p(heads * key / 500), "values": np.log1p(heads * value / 500)}
    counts = {"heads": np.log1p(heads), "groups": np.log1p(groups)}
    return {"mlp": np.log(mlp), "attention": 1.0} | counts | widths


def _judged(result: dict[str, Any], name: str, value: float, goal: float) -> dict[str, Any]:
    is_reached = value <= goal if name == "mape_percent" else value >= goal
    return result | {name: round(value, 4), "goal": goal, "is_reached": is_reached}


def _rank(correlation: Any, predicted: Any, true: Any) -> float:
    return float(correlation(predicted, true).statistic)


def _model(device: str) -> str:
    """Name a device without the batch size it was timed at."""
    stem, _, batch = device.rpartition("_")
    return stem if batch in ("1", "32", "64") and device != "essential_ph_1" else device
