"""Training: the loop, its budget and its schedule, on small stand-in modules, and what `train` makes of them."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ir.errors import InputError, NonFiniteLoss, StorageError, TrialFailure
from nas import tasks
from nas.tasks.base import Array, Batch, Task, evaluate
from nas.training.budget import Budget, TrainOptions, learning_rate_factor
from nas.training.fit import FitResult, decays, fit, make_predictor, torch_threads
from searchspaces.signature import Signature


class NextByte(torch.nn.Module):
    """Logits of the next byte from the last one alone: a bigram table."""

    def __init__(self, seed: int = 0, scale: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table_VV = torch.nn.Parameter(torch.randn(256, 256, generator=generator) * scale)
        self.tokens_seen: list[Array] = []

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        self.tokens_seen.append(tokens.numpy().copy())
        return {"logits": self.table_VV[tokens]}


class LinearForecast(torch.nn.Module):
    """One matrix from the past to the future."""

    def __init__(self, seq_len: int, horizon: int) -> None:
        super().__init__()
        self.weight_TH = torch.nn.Parameter(torch.zeros(seq_len, horizon))

    def forward(self, series: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"forecast": torch.einsum("btv,th->bhv", series, self.weight_TH)}


class LinearDigits(torch.nn.Module):
    """Logistic regression on pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_PC = torch.nn.Parameter(torch.zeros(64, 10))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": image.flatten(1) @ self.weight_PC}


@dataclasses.dataclass(frozen=True)
class Poisoned(Task):
    """A forecasting task whose data goes bad at one draw."""

    bad_draw: int
    value: float
    drawn: list[int] = dataclasses.field(default_factory=list, hash=False)

    name = "poisoned"
    metric = tasks.Metric("mse", "1")
    direction = "min"
    loss_kind = "mse"

    @property
    def signature(self) -> Signature:
        return Signature(modality="series", output="forecast", seq_len=4, horizon=2, variates=1)

    @property
    def chance(self) -> float:
        return 1.0

    def train_batch(self, rng: np.random.Generator, batch_size: int) -> Batch:
        self.drawn.append(len(self.drawn) + 1)
        fill = self.value if self.drawn[-1] == self.bad_draw else 1.0
        return self.batch(np.full((batch_size, 4, 1), fill, np.float32), np.ones((batch_size, 2, 1), np.float32))

    def validation_set(self) -> tuple[Array, Array]:
        return np.ones((5, 4, 1), np.float32), np.ones((5, 2, 1), np.float32)

    def quality(self, *, loss: float, accuracy: float) -> float:
        return loss

    def measure_baselines(self) -> dict[str, float]:
        return {}

    def fingerprint_arrays(self) -> tuple[Array, Array]:
        return self.validation_set()


@pytest.fixture
def alternating(tmp_path: Path) -> Task:
    """A text of `abab...`, which a bigram table can learn entirely."""
    path = tmp_path / "ab.txt"
    path.write_bytes(b"ab" * 2000)
    return tasks.get("char_lm", path, seq_len=16)


def run(module: torch.nn.Module, task: Task, steps: int = 20, seed: int = 0, **changes: Any) -> FitResult:
    options = TrainOptions(**{"batch_size": 8, "learning_rate": 0.1, **changes})
    return fit(module, task, Budget(steps=steps), seed=seed, options=options)


def ticking_clock(tick_s: float) -> Callable[[], float]:
    """A clock that advances by itself each time it is read."""
    now = [0.0]

    def clock() -> float:
        now[0] += tick_s
        return now[0]

    return clock


# fit


def test_fit_learns_what_can_be_learnt(alternating: Task) -> None:
    """A bigram table learns an alternating text to almost no bits per byte, as scored by `evaluate`."""
    module = NextByte()
    result = run(module, alternating, steps=100, learning_rate=0.2, weight_decay=0)
    assert evaluate(alternating, make_predictor(module, alternating), 8).quality < 0.1
    assert result.history[0].loss > 4 > 0.1 > result.history[-1].loss


def test_fit_beats_chance_on_every_modality() -> None:
    """Images and series train through the same loop as tokens."""
    digits = tasks.get("digits")
    classifier = LinearDigits()
    run(classifier, digits, steps=60)
    assert evaluate(digits, make_predictor(classifier, digits), 64).quality > 0.8
    series = tasks.get("forecast", seq_len=16, horizon=4, lorenz_samples=2000)
    forecaster = LinearForecast(16, 4)
    run(forecaster, series, steps=100, learning_rate=0.02, weight_decay=0)
    assert evaluate(series, make_predictor(forecaster, series), 64).quality < 0.9 * series.chance


def test_fit_repeats_exactly(alternating: Task) -> None:
    """Equal weights, seed and steps give equal bits: weights and history."""
    modules = [NextByte(seed=5, scale=0.1) for _ in range(2)]
    results = [run(module, alternating) for module in modules]
    first, second = (module.table_VV.detach().numpy() for module in modules)
    np.testing.assert_array_equal(first, second)
    assert results[0].history == results[1].history


def test_fit_gives_all_candidates_the_same_batches(alternating: Task) -> None:
    """The order of the data follows the seed, whatever the initial weights."""
    first, second, other = NextByte(seed=1, scale=0.1), NextByte(seed=2, scale=0.1), NextByte(seed=1, scale=0.1)
    for module, seed in ((first, 7), (second, 7), (other, 8)):
        run(module, alternating, steps=5, seed=seed)
    np.testing.assert_array_equal(first.tokens_seen, second.tokens_seen)
    assert not np.array_equal(first.tokens_seen, other.tokens_seen)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fit_stops_at_a_non_finite_loss_with_its_step(value: float) -> None:
    """A bad batch ends the trial at its step, with the reason, and before it reaches the weights."""
    module = LinearForecast(4, 2)
    with pytest.raises(NonFiniteLoss, match="step 3") as caught:
        run(module, Poisoned(bad_draw=3, value=value))
    assert isinstance(caught.value, TrialFailure)
    assert caught.value.found is not None
    assert caught.value.hint is not None
    assert torch.isfinite(module.weight_TH).all()


def test_fit_stops_at_a_non_finite_gradient() -> None:
    """A finite loss with a gradient that overflows ends the trial too."""

    class Overflowing(LinearForecast):
        def forward(self, series: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"forecast": super().forward(series)["forecast"] + torch.sqrt(self.weight_TH.sum().abs())}

    with pytest.raises(NonFiniteLoss, match="gradient became"):
        run(Overflowing(4, 2), Poisoned(bad_draw=0, value=0.0))


def test_fit_reports_progress_each_step(alternating: Task) -> None:
    """The callback hears every step in order, the total, and finite losses."""
    heard: list[tuple[int, int, float]] = []
    options = TrainOptions(batch_size=4, learning_rate=0.1)
    budget = Budget(steps=7)
    fit(NextByte(), alternating, budget, seed=0, options=options, progress=lambda *call: heard.append(call))
    assert [(step, total) for step, total, _ in heard] == [(step, 7) for step in range(1, 8)]
    assert np.isfinite([loss for _, _, loss in heard]).all()


@pytest.mark.parametrize("budget", [Budget(steps=30), Budget(tokens=30 * 8 * 16)])
def test_fit_in_parts_gives_what_it_gives_in_one_go(alternating: Task, budget: Budget) -> None:
    """Weights, steps and history are equal to the bit when a training stops twice on its way."""
    options = TrainOptions(batch_size=8, learning_rate=0.1)
    whole, parts = NextByte(scale=1.0), [NextByte(scale=1.0) for _ in range(3)]
    expected = fit(whole, alternating, budget, seed=0, options=options)
    found = []
    for module, until in zip(parts, (1 / 9, 1 / 3, 1.0), strict=True):
        left = found[-1].checkpoint if found else None
        found.append(fit(module, alternating, budget, seed=0, options=options, until=until, resume=left))
    assert [part.steps for part in found] == [4, 10, 30]
    assert found[-1].checkpoint is None
    assert torch.equal(parts[-1].table_VV, whole.table_VV)
    assert found[-1].history[-1] == expected.history[-1]
    assert [point.step for point in found[-1].history] == [point.step for point in expected.history]


def test_fit_in_parts_counts_the_seconds_of_all_parts(alternating: Task) -> None:
    """A budget in seconds goes on where it stopped: the rest is trained, not all of it again."""
    options, budget = TrainOptions(batch_size=8, learning_rate=0.1), Budget(seconds=8.0)
    first = fit(NextByte(), alternating, budget, seed=0, options=options, clock=ticking_clock(1.0), until=0.5)
    assert first.steps == 4
    rest = fit(
        NextByte(), alternating, budget, seed=0, options=options, clock=ticking_clock(1.0), resume=first.checkpoint
    )
    assert rest.steps == 6  # the clock moves when it is read, and the first part reads it twice more than it has steps
    assert rest.seconds >= 8.0


def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(alternating: Task) -> None:
    """Bytes that are no checkpoint of this model are refused with the way out."""
    options = TrainOptions(batch_size=8, learning_rate=0.1)
    good = fit(NextByte(), alternating, Budget(steps=9), seed=0, options=options, until=1 / 3).checkpoint
    assert good is not None
    for bad, module in ((good[:-5], NextByte()), (b"", NextByte()), (good, LinearDigits())):
        with pytest.raises(StorageError, match="remove the checkpoint"):
            fit(module, alternating, Budget(steps=9), seed=0, options=options, resume=bad)


def test_fit_history_is_short_and_complete(alternating: Task) -> None:
    """About a hundred points tell of any length of training, the last step among them."""
    history = run(NextByte(), alternating, steps=250, batch_size=1).history
    assert 100 <= len(history) <= 130
    assert [point.step for point in history] == sorted({point.step for point in history})
    assert history[-1].step == 250


def test_fit_by_tokens_rounds_up_to_whole_steps(alternating: Task) -> None:
    """1,000 tokens at 8 x 16 a step are 8 steps."""
    options = TrainOptions(batch_size=8, learning_rate=0.1)
    assert fit(NextByte(), alternating, Budget(tokens=1000), seed=0, options=options).steps == 8


def test_fit_by_seconds_follows_the_clock(alternating: Task) -> None:
    """Time decides the number of steps, and the learning rate has come down when it is over."""
    options = TrainOptions(batch_size=2, learning_rate=0.1)
    budget = Budget(seconds=12.5)
    result = fit(NextByte(), alternating, budget, seed=0, options=options, clock=ticking_clock(0.125))
    assert result.steps == 100
    assert result.seconds >= 12.5
    rates = [point.learning_rate for point in result.history]
    assert max(rates) == pytest.approx(0.1, rel=0.02)
    assert rates[-1] == pytest.approx(0.01, rel=0.02)


def test_fit_by_seconds_takes_at_least_one_step(alternating: Task) -> None:
    """A budget shorter than a step still gives a scored model."""
    options = TrainOptions(batch_size=2, learning_rate=0.1)
    budget = Budget(seconds=0.01)
    assert fit(NextByte(), alternating, budget, seed=0, options=options, clock=ticking_clock(5.0)).steps == 1


@pytest.mark.parametrize("seed", [-1, 1.5, None])
def test_fit_refuses_bad_seeds(alternating: Task, seed: Any) -> None:
    """A seed is an integer of at least 0."""
    with pytest.raises(InputError, match="seed"):
        run(NextByte(), alternating, seed=seed)


def test_fit_decays_matrices_only() -> None:
    """With no gradient, decay shrinks a matrix and leaves a vector and an embedding alone."""

    class Idle(LinearForecast):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.mixer = torch.nn.Parameter(torch.ones(3, 3))
            self.token_embedding = torch.nn.Parameter(torch.ones(3, 3))
            self.scale = torch.nn.Parameter(torch.ones(3))

        def forward(self, series: torch.Tensor) -> dict[str, torch.Tensor]:
            idle = (self.mixer.sum() + self.token_embedding.sum() + self.scale.sum()) * 0
            return {"forecast": super().forward(series)["forecast"] + idle}

    module = Idle()
    run(module, Poisoned(bad_draw=0, value=0.0), weight_decay=0.5)
    assert (module.mixer < 0.95).all()
    assert (module.token_embedding == 1).all()
    assert (module.scale == 1).all()


@pytest.mark.parametrize(
    ("name", "dimensions", "expected"),
    [
        ("layers.0.mixer.q", 2, True),
        ("layers.0.mixer.q", 1, False),
        ("layers.0.mixer_norm.weight", 2, False),
        ("stem.token_embedding", 2, False),
        ("stem.position", 2, False),
        ("layers.0.mlp.up_bias", 2, False),
        ("layers.0.mixer.a_log", 2, False),
        ("layers.0.logits", 2, True),
    ],
)
def test_decays_spares_norms_embeddings_and_biases(name: str, dimensions: int, expected: bool) -> None:
    """Only matrices that mix features decay."""
    assert decays(name, dimensions) is expected


def test_predictor_hands_rows_through(alternating: Task) -> None:
    """The predictor maps numpy to numpy without recording gradients."""
    module = NextByte(scale=1.0)
    inputs: Mapping[str, Array] = {"tokens": np.array([[3, 4]], np.int32)}
    expected = module.table_VV.detach().numpy()[[3, 4]][None]
    np.testing.assert_array_equal(make_predictor(module, alternating)(inputs), expected)


def test_torch_threads_come_back() -> None:
    """The thread count is that of the process again afterwards, also after an error."""
    before = torch.get_num_threads()
    with torch_threads(before + 2):
        with torch_threads(before + 1):
            assert torch.get_num_threads() == before + 1
        with pytest.raises(RuntimeError), torch_threads(before + 1):
            raise RuntimeError
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before
    with pytest.raises(InputError, match="thread"), torch_threads(0):
        pass


# train


class Candidate:
    """Stands in for an architecture: its graph is what was asked for."""

    def graph(self, signature: Signature, *, batch: int) -> tuple[Signature, int]:
        return signature, batch


class Exporting(NextByte):
    """A bigram table that also hands its weights out, as modules made from graphs do."""

    def export_params(self) -> dict[str, Array]:
        return {"table": self.table_VV.detach().numpy().copy()}


@pytest.fixture
def train_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`nas.train`, whose models are bigram tables with weights drawn from the seed they are initialised with."""
    module = importlib.import_module("nas.train")
    monkeypatch.setattr(module, "initialize", lambda graph, seed: {"seed": seed})
    monkeypatch.setattr(module, "to_module", lambda graph, params: Exporting(seed=params["seed"], scale=0.1))
    return module


OPTIONS = TrainOptions(batch_size=8, learning_rate=0.1)


def test_train_returns_the_weights_it_scored(train_module: ModuleType, alternating: Task) -> None:
    """Quality and loss are those of the weights handed back, and their number is counted."""
    result = train_module.train(Candidate(), alternating, Budget(steps=5), seed=0, options=OPTIONS)
    scored = Exporting()
    scored.table_VV.data = torch.from_numpy(result.params["table"])
    again = evaluate(alternating, make_predictor(scored, alternating), 8)
    assert (result.quality, result.loss) == (again.quality, again.loss)
    assert result.parameters == 256 * 256
    assert result.steps == 5
    assert len(result.history) == 5


def test_train_repeats_exactly_and_trials_differ(train_module: ModuleType, alternating: Task) -> None:
    """Seed and trial settle the result; another trial or seed starts from other weights."""
    settings = [(0, 0), (0, 0), (0, 1), (1, 0)]
    weights = [
        train_module.train(
            Candidate(), alternating, Budget(steps=3), seed=seed, trial=trial, options=OPTIONS, threads=1
        ).params["table"]
        for seed, trial in settings
    ]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])
    assert not np.array_equal(weights[0], weights[3])


def test_train_builds_the_graph_at_its_batch_size(train_module: ModuleType, alternating: Task) -> None:
    """One graph, at the batch size of the options, serves training and validation."""
    asked: list[int] = []

    class Asking(Candidate):
        def graph(self, signature: Signature, *, batch: int) -> tuple[Signature, int]:
            asked.append(batch)
            return signature, batch

    train_module.train(Asking(), alternating, Budget(steps=1), seed=0, options=OPTIONS)
    train_module.train(Asking(), alternating, Budget(steps=1), seed=0)
    assert asked == [8, TrainOptions.for_signature(alternating.signature).batch_size]


def test_train_fails_the_trial_on_a_non_finite_validation(
    train_module: ModuleType, alternating: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that trained but cannot be scored is a failed trial with its reason."""

    class Breaking(Exporting):
        def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
            factor = 1.0 if self.training else float("nan")
            return {"logits": super().forward(tokens)["logits"] * factor}

    monkeypatch.setattr(train_module, "to_module", lambda graph, params: Breaking())
    with pytest.raises(NonFiniteLoss, match="validation loss is nan"):
        train_module.train(Candidate(), alternating, Budget(steps=2), seed=0, options=OPTIONS)


# Budget, options, schedule


@pytest.mark.parametrize(
    "limits",
    [{}, {"steps": 1, "seconds": 1.0}, {"steps": 0}, {"steps": 1.5}, {"tokens": -5}, {"seconds": float("nan")}],
)
def test_budget_needs_one_positive_limit(limits: dict[str, Any]) -> None:
    """No limit, several, or a senseless one are refused."""
    with pytest.raises(InputError) as caught:
        Budget(**limits)
    assert caught.value.expected is not None
    assert caught.value.found is not None


@pytest.mark.parametrize(
    "setting",
    [{"batch_size": 0}, {"learning_rate": 0.0}, {"warmup": 1.0}, {"weight_decay": -0.1}, {"grad_clip": float("inf")}],
)
def test_train_options_refuse_bad_settings(setting: dict[str, Any]) -> None:
    """Each setting is checked by name."""
    with pytest.raises(InputError) as caught:
        TrainOptions(**{"batch_size": 8, "learning_rate": 1e-3, **setting})
    assert caught.value.where == f"train.{next(iter(setting))}"


@pytest.mark.parametrize("name", tasks.names())
def test_train_options_have_defaults_for_every_task(name: str) -> None:
    """Whatever the modality, a batch trains quickly on a small machine: 64 pixels of a video are a token."""
    signature = tasks.get(name).signature
    options = TrainOptions.for_signature(signature)
    assert 4 <= options.batch_size <= 64
    tokens = signature.positions // (64 if signature.modality == "video" else 1)
    assert options.batch_size * tokens <= 8192


def test_schedule_rises_peaks_and_falls_to_a_tenth() -> None:
    """Linear up to the end of the warm-up, then down half a cosine."""
    factors = [learning_rate_factor(step / 100, warmup=0.1, final_fraction=0.1) for step in range(1, 101)]
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10, rtol=1e-12)
    assert max(factors) == factors[9] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[9:]))
    assert factors[54] == pytest.approx(0.55)  # half-way down in time is half-way down in rate
    assert factors[-1] == pytest.approx(0.1)
    assert learning_rate_factor(0.0, warmup=0.0, final_fraction=0.1) == 1.0
