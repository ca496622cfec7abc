"""Tasks: data, splits, metrics, chance levels and baselines."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ir.errors import DataError, InputError
from nas import tasks
from nas.tasks.base import IGNORED_TARGET, Task, evaluate
from nas.tasks.char_lm import DEFAULT_CORPUS_BYTES
from nas.tasks.forecast import LORENZ_FORCING, LORENZ_STEP, lorenz96_velocity, simulate_lorenz96
from nas.tasks.mqar import Mqar

REPOSITORY = Path(__file__).resolve().parents[2]
ETTH1 = REPOSITORY.parent / "shared" / "data" / "ett" / "ETTh1.csv"

every_task = pytest.mark.parametrize("name", tasks.names())


def score_is_better(task: Task, score: float, than: float) -> bool:
    return score < than if task.direction == "min" else score > than


def write_csv(path: Path, rows: list[str]) -> str:
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def ramp_csv(path: Path, rows: int) -> str:
    """A CSV whose one variate counts its rows, so that a value tells its time."""
    return write_csv(path, ["t", *(str(row) for row in range(rows))])


# Every task


def test_names_are_the_files_of_the_folder() -> None:
    """The registry holds the four tasks that ship, and no machinery."""
    assert {"char_lm", "digits", "forecast", "mqar"} <= set(tasks.names())
    assert "base" not in tasks.names()


def test_making_tasks_loads_no_heavy_library() -> None:
    """Listing and making every task imports neither torch nor scikit-learn."""
    script = (
        "import sys\n"
        "from nas import tasks\n"
        "made = [tasks.get(name).signature for name in tasks.names()]\n"
        "print(sorted({'torch', 'sklearn', 'scipy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@every_task
def test_task_batches_match_its_signature(name: str) -> None:
    """Inputs have the signature's name, shape and dtype; targets have the shape of what is predicted."""
    task = tasks.get(name)
    signature = task.signature
    for batch in (task.train_batch(np.random.default_rng(0), 3), next(iter(task.validation_batches(3)))):
        [(input_name, values)] = batch.inputs.items()
        assert input_name == signature.input_name
        assert values.shape == signature.input_shape(3)
        assert values.dtype == signature.input_dtype
        expected = signature.output_shape(3) if task.loss_kind == "mse" else signature.output_shape(3)[:-1]
        assert batch.targets.shape == expected
        assert batch.targets.dtype == ("float32" if task.loss_kind == "mse" else "int32")


@every_task
def test_task_inputs_stay_in_range(name: str) -> None:
    """Tokens and classes lie below the vocabulary size; other inputs are finite."""
    task = tasks.get(name)
    inputs, targets = task.validation_set()
    if task.signature.modality == "tokens":
        assert inputs.min() >= 0
        assert inputs.max() < task.signature.vocab_size
    assert np.isfinite(inputs).all()
    assert np.isfinite(targets).all()
    if task.loss_kind == "cross_entropy":
        assert targets.max() < task.signature.output_shape(1)[-1]


@every_task
def test_task_train_batches_follow_the_generator(name: str) -> None:
    """Equal generators draw equal batches, others draw others, and no call disturbs the validation split."""
    task = tasks.get(name)
    before = task.validation_set()[0].copy()
    same = [task.train_batch(np.random.default_rng(seed), 4).inputs[task.signature.input_name] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[2])
    np.testing.assert_array_equal(before, task.validation_set()[0])


@every_task
def test_task_validation_counts_each_example_once(name: str) -> None:
    """Valid rows of all batches, put together, are the validation split; every batch is full."""
    task = tasks.get(name)
    inputs, targets = task.validation_set()
    batch_size = 100
    assert len(inputs) % batch_size, "the last batch must need padding, or this shows nothing"
    batches = list(task.validation_batches(batch_size))
    assert {len(batch.targets) for batch in batches} == {batch_size}
    name_of_input = task.signature.input_name
    seen = np.concatenate([batch.inputs[name_of_input][: batch.valid] for batch in batches])
    np.testing.assert_array_equal(seen, inputs)
    np.testing.assert_array_equal(np.concatenate([batch.targets[: batch.valid] for batch in batches]), targets)


@every_task
def test_task_best_baseline_beats_chance(name: str) -> None:
    """The best trivial model scores clearly better than knowing nothing, which is what baselines are for."""
    task = tasks.get(name)
    scores = task.baselines()
    best = min(scores.values()) if task.direction == "min" else max(scores.values())
    assert score_is_better(task, best, task.chance)
    assert abs(best - task.chance) > 0.2 * min(task.chance, 1.0)


@every_task
def test_task_pickles_equal_and_keeps_its_fingerprint(name: str) -> None:
    """A task sent to a worker is the same task with the same data."""
    task = tasks.get(name)
    copy = pickle.loads(pickle.dumps(task))
    assert copy == task
    assert hash(copy) == hash(task)
    assert copy.fingerprint() == task.fingerprint()


@pytest.mark.parametrize(
    ("name", "options"),
    [("char_lm", {"seq_len": 128}), ("forecast", {"horizon": 12}), ("mqar", {"num_pairs": 4})],
)
def test_task_fingerprint_changes_with_options(name: str, options: dict[str, Any]) -> None:
    """Another option means other validation scores, so another fingerprint."""
    assert tasks.get(name).fingerprint() != tasks.get(name, **options).fingerprint()


def test_task_fingerprint_follows_the_content_not_the_path(tmp_path: Path) -> None:
    """The same text elsewhere is the same data; one changed byte is not."""
    prints: list[str] = []
    for folder, text in (
        ("a", b"some text " * 99),
        ("b", b"some text " * 99),
        ("c", b"some text " * 98 + b"some test "),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_bytes(text)
        prints.append(tasks.get("char_lm", tmp_path / folder / "text.txt", seq_len=8).fingerprint())
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("charlm", {}, "did you mean 'char_lm'?"),
        ("char_lm", {"seqlen": 3}, "did you mean 'seq_len'?"),
        ("digits", {"data": "x.csv"}, "no option 'data'"),
        ("char_lm", {"seq_len": 0}, "char_lm.seq_len"),
        ("char_lm", {"seq_len": "64"}, "an integer from 1"),
        ("forecast", {"horizon": 1.5}, "forecast.horizon"),
        ("mqar", {"seq_len": 8}, "4 * num_pairs"),
        ("mqar", {"vocab_size": 8}, "2 * num_pairs + 2 = 18"),
    ],
)
def test_get_refuses_bad_options(name: str, arguments: dict[str, Any], said: str) -> None:
    """A misspelt or impossible option is named before any data is read."""
    with pytest.raises(InputError) as caught:
        tasks.get(name, **arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["char_lm", "forecast"])
@pytest.mark.parametrize("data", ["", "no/such/file.txt", "nul\0byte"])
def test_get_refuses_unreadable_data(name: str, data: str) -> None:
    """A path that cannot be read is an error when the task is made."""
    with pytest.raises(DataError) as caught:
        tasks.get(name, data)
    assert caught.value.expected is not None
    assert caught.value.found is not None


# Scores


def test_evaluate_scores_known_predictions() -> None:
    """Uniform logits score chance; logits that know the answers score perfectly."""
    task = tasks.get("char_lm", seq_len=64, validation_bytes=64 * 20)
    uniform = evaluate(task, lambda inputs: np.zeros((*inputs["tokens"].shape, 256)), 7)
    assert uniform.quality == pytest.approx(8.0, abs=1e-9)
    assert uniform.count == 64 * 20

    recall = tasks.get("mqar", validation_sequences=50)
    answers = iter([batch.targets for batch in recall.validation_batches(7)])
    knowing = evaluate(recall, lambda inputs: np.eye(128)[np.maximum(next(answers), 0)] * 50, 7)
    assert knowing.quality == 1.0
    assert knowing.count == 50 * recall.options["num_pairs"]
    assert knowing.loss < 1e-6


def test_evaluate_does_not_depend_on_the_batch_size() -> None:
    """Padding rows count nowhere."""
    task = tasks.get("forecast", validation_windows=50)

    def repeat_last(inputs: Any) -> np.ndarray:
        return np.repeat(inputs["series"][:, -1:], 24, axis=1)

    scores = [evaluate(task, repeat_last, batch_size).quality for batch_size in (1, 16, 50, 64)]
    # Sums in another order: float64 rounding.
    np.testing.assert_allclose(scores, task.baselines()["last_value"], rtol=1e-6)


# char_lm


def test_char_lm_default_baselines_rank_as_they_must() -> None:
    """On Python sources a bigram beats a unigram beats chance, all in plausible ranges of bits per byte."""
    scores = tasks.get("char_lm").baselines()
    assert 2.0 < scores["bigram"] < scores["unigram"] - 0.5
    assert scores["unigram"] < 6.0


def test_char_lm_baselines_know_an_alternating_text(tmp_path: Path) -> None:
    """Of `abab...` a unigram knows all but one bit per byte, a bigram knows everything."""
    path = tmp_path / "ab.txt"
    path.write_bytes(b"ab" * 50_000)
    scores = tasks.get("char_lm", path, seq_len=16).baselines()
    # Smoothing leaves 1 / (count + 1) of the probability to others: below 0.01 bits at 45,000 observations.
    assert scores["unigram"] == pytest.approx(1.0, abs=0.01)
    assert scores["bigram"] == pytest.approx(0.0, abs=0.01)


def test_char_lm_targets_are_the_next_bytes() -> None:
    """Position t predicts the byte at t + 1, in both splits."""
    task = tasks.get("char_lm", seq_len=32)
    drawn = task.train_batch(np.random.default_rng(0), 8)
    np.testing.assert_array_equal(drawn.inputs["tokens"][:, 1:], drawn.targets[:, :-1])
    inputs, targets = task.validation_set()
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])


def test_char_lm_splits_a_folder_by_file(tmp_path: Path) -> None:
    """Files 20 and 40 of 40 are validation, and none of their bytes is ever trained on."""
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_bytes(bytes([65 + number]) * 100)
    task = tasks.get("char_lm", tmp_path, seq_len=10)
    train = np.unique(task.train_batch(np.random.default_rng(0), 500).inputs["tokens"])
    validation = np.unique(np.concatenate([values.ravel() for values in task.validation_set()]))
    assert set(validation) == {65 + 19, 65 + 39}
    assert not set(train) & set(validation)
    assert len(train) > 30


def test_char_lm_splits_one_file_at_ninety_percent(tmp_path: Path) -> None:
    """The last tenth of a text is validation."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"a" * 900 + b"b" * 100)
    task = tasks.get("char_lm", path, seq_len=9)
    assert set(task.train_batch(np.random.default_rng(0), 200).targets.ravel()) == {ord("a")}
    assert set(task.validation_set()[1].ravel()) == {ord("b")}


def test_char_lm_leaves_binary_and_hidden_files_out(tmp_path: Path) -> None:
    """A folder of text may hold other things."""
    (tmp_path / ".git").mkdir()
    for name, content in ((".git/x", b"h" * 500), (".hidden", b"h" * 500), ("image", b"h\0" * 500)):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "text.md").write_bytes(b"t" * 500)
    task = tasks.get("char_lm", tmp_path, seq_len=4)
    assert set(task.train_batch(np.random.default_rng(0), 50).targets.ravel()) == {ord("t")}


def test_char_lm_default_corpus_is_capped_and_free_of_tests() -> None:
    """The default corpus holds programs of the standard library, at most 4 MiB of them."""
    train, validation = tasks.get("char_lm").fingerprint_arrays()
    assert DEFAULT_CORPUS_BYTES / 4 < len(train) + len(validation) <= DEFAULT_CORPUS_BYTES
    assert b"from collections.abc import" in train.tobytes()
    assert 0.005 < len(validation) / len(train) < 0.2


@pytest.mark.parametrize("content", [b"", b"short", b"\0" * 5000])
def test_char_lm_refuses_texts_without_a_window(tmp_path: Path, content: bytes) -> None:
    """Too little text for one window in each split is an error that names the file."""
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        tasks.get("char_lm", path).validation_set()
    assert caught.value.where == str(path)


# digits


def test_digits_split_is_stratified_and_complete() -> None:
    """Validation holds a fifth of every class, and both splits together are the whole set, each image once."""
    train_images, train_labels, images, labels = tasks.get("digits").fingerprint_arrays()
    share = np.bincount(labels) / (np.bincount(labels) + np.bincount(train_labels))
    np.testing.assert_allclose(share, 0.2, atol=0.004)  # rounding of about 180 images to whole ones
    from sklearn.datasets import load_digits

    pixels, _ = load_digits(return_X_y=True)
    ours = np.concatenate([train_images, images]).reshape(-1, 64) * 16
    np.testing.assert_array_equal(np.unique(ours, axis=0, return_counts=True)[1].sum(), 1797)
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], pixels[np.lexsort(pixels.T)].astype(np.float32))


def test_digits_baselines_are_what_is_known() -> None:
    """The majority class is about chance; logistic regression reads most digits."""
    scores = tasks.get("digits").baselines()
    assert 0.09 < scores["majority_class"] < 0.115
    assert 0.92 < scores["logistic_regression"] < 0.99


# forecast


def literal_lorenz96(x: np.ndarray) -> np.ndarray:
    """The equation index by index."""
    n = len(x)
    return np.array([(x[(i + 1) % n] - x[(i - 2) % n]) * x[(i - 1) % n] - x[i] + LORENZ_FORCING for i in range(n)])


@pytest.mark.parametrize("variates", [4, 5, 8, 13])
def test_lorenz96_velocity_is_the_published_equation(variates: int) -> None:
    """The vectorised right-hand side equals the equation written out."""
    x = np.random.default_rng(0).standard_normal(variates) * 4
    np.testing.assert_allclose(lorenz96_velocity(x), literal_lorenz96(x), rtol=0, atol=1e-12)  # float64 rounding


def test_lorenz96_series_solves_the_equation() -> None:
    """Sample to sample, the series is what an adaptive solver finds from the same state."""
    from scipy.integrate import solve_ivp

    series = simulate_lorenz96(8, 40)
    for before, after in itertools.pairwise(series):
        exact = solve_ivp(lambda _, x: literal_lorenz96(x), (0, LORENZ_STEP), before, rtol=1e-10, atol=1e-10)
        # Fourth order at steps of 0.025 and speeds of some 50 per unit of time.
        np.testing.assert_allclose(after, exact.y[:, -1], rtol=0, atol=2e-3)
    assert series.std() > 3  # chaotic, not at rest


def test_forecast_standardises_by_the_training_split(tmp_path: Path) -> None:
    """Training values have mean 0 and variance 1 per variate, whatever comes later."""
    rows = [f"{t % 7},{100 + 5 * (t % 3)},{t // 700 * 1e6}" for t in range(1000)]
    task = tasks.get("forecast", write_csv(tmp_path / "x.csv", ["a,b,late", *rows]), seq_len=5, horizon=2)
    [series] = task.fingerprint_arrays()
    np.testing.assert_allclose(series[:700, :2].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(series[:700, :2].std(axis=0), 1, atol=1e-6)
    np.testing.assert_array_equal(series[:700, 2], 0)  # constant in training: centred only
    assert len(series) == 800


def test_forecast_splits_are_disjoint_in_time(tmp_path: Path) -> None:
    """Training windows end before 70 %, validation targets lie in the next 10 %, and the rest is not scored."""
    task = tasks.get("forecast", ramp_csv(tmp_path / "ramp.csv", 1000), seq_len=20, horizon=10)
    [series] = task.fingerprint_arrays()
    times = {float(value): time for time, value in enumerate(series[:, 0])}
    drawn = task.train_batch(np.random.default_rng(0), 3000)
    trained = {times[float(value)] for value in (*drawn.inputs["series"].ravel(), *drawn.targets.ravel())}
    assert trained == set(range(700))
    inputs, targets = task.validation_set()
    assert {times[float(value)] for value in targets.ravel()} == set(range(700, 800))
    assert min(times[float(value)] for value in inputs.ravel()) == 680
    assert len(inputs) == 100 - 10 + 1


def test_forecast_baselines_know_a_ramp_and_a_wave(tmp_path: Path) -> None:
    """A ramp is off by its slope when repeated; a linear model continues a wave."""
    ramp = tasks.get("forecast", ramp_csv(tmp_path / "ramp.csv", 1000), seq_len=20, horizon=3)
    step = 1 / np.arange(700).std()
    assert ramp.baselines()["last_value"] == pytest.approx(step**2 * (1 + 4 + 9) / 3, rel=1e-4)  # float32 data
    wave = [f"{np.sin(t / 5)},{np.cos(t / 7)}" for t in range(2000)]
    scores = tasks.get("forecast", write_csv(tmp_path / "w.csv", ["s,c", *wave]), seq_len=30, horizon=5).baselines()
    assert scores["linear"] < 0.01 < scores["last_value"]
    assert scores["mean"] == pytest.approx(1.0, abs=0.2)


def test_forecast_reads_dates_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    """A column of dates is no variate; spreadsheets' habits are understood."""
    rows = [f'"2020-01-01 {t:04d}","{t}",1e-3' for t in range(300)]
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["date,a,b", *rows, ""]).encode())
    task = tasks.get("forecast", path, seq_len=4, horizon=2)
    assert task.signature.variates == 2
    assert len(next(iter(task.fingerprint_arrays()))) == 240


@pytest.mark.parametrize(
    ("rows", "line", "said"),
    [
        ([], None, "empty file"),
        (["date,a,b"], None, "header alone"),
        (["1,2,3", "4,5,6"], 1, "no header"),
        (["date,a,a", "x,1,2"], 1, "one name"),
        (["date,a,", "x,1,2"], 1, "column 3"),
        (["date;a;b", "x;1;2"], 2, "semicolons"),
        (["date,a,b", "x,1,2", "x,1,2,3"], 3, "3 cells"),
        (["date,a,b", "x,1,2", "x,1,two"], 3, "'two'"),
        (["date,a,b", "x,1,2", "", "x,nan,2"], 4, "column 'a'"),
        (["date,a,b", "x,1,2", "x,1,inf"], 3, "finite"),
        (["date,a,b", "x,1,2", "x,,2"], 3, "empty cell"),
        (["date,a,b", "x,1,2", 'x,1,"2'], 3, "not CSV"),
        (["date,a,b", *(f"x,{t},{t}" for t in range(20))], None, "at least 241 rows"),
    ],
)
def test_forecast_names_what_is_wrong_in_a_csv(tmp_path: Path, rows: list[str], line: int | None, said: str) -> None:
    """Every malformed file is refused with its line, what was expected and what was found."""
    path = tmp_path / "x.csv"
    path.write_text("\n".join(rows))
    with pytest.raises(DataError) as caught:
        tasks.get("forecast", path).validation_set()
    assert caught.value.where == (f"{path}:{line}" if line else str(path))
    assert said in str(caught.value)
    assert caught.value.expected is not None
    assert caught.value.found is not None


def test_forecast_refuses_a_file_that_is_not_text(tmp_path: Path) -> None:
    """Bytes outside UTF-8 are an error, not a traceback."""
    path = tmp_path / "x.csv"
    path.write_bytes(b"date,a\n\xff\xfe\xfd,1\n")
    with pytest.raises(DataError, match="not text"):
        tasks.get("forecast", path)


@pytest.mark.skipif(not ETTH1.exists(), reason="ETTh1.csv is not in ../shared/data/ett")
def test_forecast_reads_etth1() -> None:
    """On the public transformer temperatures the linear model beats repeating, which beats nothing much."""
    task = tasks.get("forecast", ETTH1)
    assert task.signature.variates == 7
    scores = task.baselines()
    assert scores["linear"] < 0.5 * min(scores["last_value"], scores["mean"])


# mqar


@pytest.mark.parametrize(
    "task", [Mqar(), Mqar(seq_len=33, vocab_size=19, num_pairs=8), Mqar(seq_len=4, vocab_size=4, num_pairs=1)]
)
def test_mqar_answers_are_the_values_shown(task: Mqar) -> None:
    """Every key shown is asked once, later, and its target is the value that followed it; nothing else is asked."""
    tokens_BT, targets_BT = task.generate(np.random.default_rng(3), 200)
    first_value = task.vocab_size // 2
    for tokens, targets in zip(tokens_BT, targets_BT, strict=True):
        shown = tokens[: 2 * task.num_pairs]
        pairs = dict(zip(shown[::2], shown[1::2], strict=True))
        assert len(pairs) == task.num_pairs
        asked = np.flatnonzero(targets != IGNORED_TARGET)
        assert asked.min() >= 2 * task.num_pairs
        assert {int(tokens[place]): int(targets[place]) for place in asked} == pairs
        assert len(asked) == task.num_pairs
        others = np.setdiff1d(np.arange(2 * task.num_pairs, task.seq_len), asked)
        assert (tokens[others] >= first_value).all()
        assert all(0 < key < first_value <= value for key, value in pairs.items())


def test_mqar_gaps_follow_the_power_law() -> None:
    """The first slot is asked more often than the last, by about the ratio of their weights."""
    task = Mqar(seq_len=68, num_pairs=1, vocab_size=64)
    _, targets = task.generate(np.random.default_rng(0), 20_000)
    slots = np.bincount((np.nonzero(targets != IGNORED_TARGET)[1] - 2) // 2, minlength=33)
    weights = np.arange(1, 34) ** (0.01 - 1.0)
    # Four standard deviations of a count among 20,000.
    expected = 20_000 * weights / weights.sum()
    assert (np.abs(slots - expected) < 4 * np.sqrt(expected) + 1).all()


def test_mqar_baselines_are_near_their_expectation() -> None:
    """The commonest value is right as often as chance; guessing among the values shown, about once in num_pairs."""
    task = tasks.get("mqar")
    scores = task.baselines()
    assert scores["majority_value"] == pytest.approx(1 / 64, abs=0.01)  # five deviations at 4,096 questions
    assert scores["any_value_shown"] == pytest.approx(1 / 8 + 7 / 8 / 64, abs=0.01)
