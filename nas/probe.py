"""What a mixer can do: a small model of an architecture's layers, trained on tasks that tell mixers apart.

report = probe("zoo/mamba", steps=400)
print({score.task: round(score.share, 2) for score in report.scores})
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ir.component import TokenMixer
from ir.errors import InputError, NasError
from ir.ops.structure import OptionValue
from nas import tasks
from nas.tasks.base import Task
from nas.training.budget import Budget, TrainOptions
from searchspaces.architecture import Architecture, ComponentConfig, LayerConfig, ModelConfig, StageConfig
from searchspaces.registry import default_registry
from searchspaces.space import load_space

PROBES: Final = ("mqar", "induction", "selective_copy", "listops", "in_context_regression", "pixel_digits", "digits")
"""Recall, induction, copying, hierarchy, learning in context, long order, and images."""
_HEADS: Final = (4, 2, 1)
_ORACLES: Final = ("oracle", "least_squares", "logistic_regression")
_LEAST_LAYERS: Final = 2
_MOST_LAYERS: Final = 4


@dataclass(frozen=True)
class Score:
    """How a model did on one task.

    Attributes:
        task: Key of the task.
        value: Its metric, None where the layers cannot do the task.
        chance: What knowing nothing scores.
        oracle: What the task's algorithm, or its best simple model, scores.
        share: How far from chance to the oracle, 0 to 1; negative below chance.
        note: Why there is no value.
    """

    task: str
    value: float | None
    chance: float
    oracle: float
    share: float | None
    note: str = ""


@dataclass(frozen=True)
class ProbeReport:
    """Scores of one architecture's layers.

    Attributes:
        name: Name of the space.
        model: The small model that was trained.
        steps: Updates on each task.
        scores: One a task.
    """

    name: str
    model: str
    steps: int
    scores: tuple[Score, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)


def probe(
    name: str,
    *,
    steps: int = 400,
    d_model: int = 64,
    only: Sequence[str] = PROBES,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> ProbeReport:
    """Train a small model of an architecture's layers on each probe task.

    Args:
        name: A space; its smallest architecture lends its layers.
        steps: Updates on each task.
        d_model: Width of the small model.
        only: Tasks to train on.
        seed: Seed of weights and data.
        progress: Called with the name of each task before it starts.

    Raises:
        InputError: There is no such space or task.
    """
    unknown = [task for task in only if task not in PROBES]
    if unknown:
        raise InputError("no such probe", where="--tasks", expected=", ".join(PROBES), found=", ".join(unknown))
    architecture = load_space(name).smallest()
    small = shrink(architecture, d_model)
    scores: list[Score] = []
    for task in only:
        if progress:
            progress(task)
        scores.append(_score(small, tasks.get(task), steps, seed))
    return ProbeReport(name, small.describe(), steps, tuple(scores))


def shrink(architecture: Architecture, d_model: int) -> Architecture:
    """Return a small model of an architecture's different layers, 2 to 4 of them, in order; heads fit the width.

    Raises:
        InputError: A mixer cannot be built at the width, or there are no layers.
    """
    model = architecture.model
    if not model.layers:
        raise InputError("a model without layers has nothing to probe", where="depth", expected="at least 1", found="0")
    kinds = list(dict.fromkeys(model.layers))[:_MOST_LAYERS]
    layers = (kinds * _LEAST_LAYERS)[: max(_LEAST_LAYERS, len(kinds))]
    fitted = tuple(
        LayerConfig(layer.wiring, _fitted(layer.token_mixer, d_model, model), layer.channel_mixer) for layer in layers
    )
    return Architecture(ModelConfig((StageConfig(d_model, fitted),), model.norm, model.position, model.causal))


def _fitted(config: ComponentConfig, d_model: int, model: ModelConfig) -> ComponentConfig:
    """Return a mixer whose heads fit the width: as it is, or with fewer and of the usual size."""
    component: Any = default_registry().get("token_mixer", config.key)
    usual: dict[str, OptionValue] = {name: None for name in ("head_dim", "num_kv_heads") if name in config.values}
    tries = [config.values]
    if "num_heads" in config.values:
        tries += [{**config.values, **usual, "num_heads": heads} for heads in _HEADS]
    problem: str | None = None
    for values in tries:
        mixer = component.create(values, {"causal": model.causal, "position": model.position.key})
        assert isinstance(mixer, TokenMixer)
        problem = mixer.check(d_model)
        if problem is None:
            return ComponentConfig.of(config.key, **values)
    raise InputError("the mixer does not fit the probe's width", where=config.key, found=problem)


def _score(architecture: Architecture, task: Task, steps: int, seed: int) -> Score:
    from nas.train import train

    baselines = task.baselines()
    oracle = next((baselines[name] for name in _ORACLES if name in baselines), 1.0)
    chance = task.chance
    options = dataclasses.replace(TrainOptions.for_signature(task.signature), batch_size=64)
    next_token = task.signature.output == "next_token"
    if next_token and not architecture.model.causal:
        return Score(task.name, None, chance, oracle, None, "its layers look ahead")
    try:
        result = train(architecture, task, Budget(steps=steps), seed=seed, options=options)
    except NasError as error:
        return Score(task.name, None, chance, oracle, None, error.message)
    share = (result.quality - chance) / (oracle - chance)
    return Score(task.name, result.quality, chance, oracle, share)
