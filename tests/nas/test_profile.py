"""Profiles of devices: what is measured once, what is refused, and searches that predict from them."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from typer.testing import CliRunner

from ir.cost import node_costs
from ir.errors import CompileError, InputError, KernelCrash, StorageError, TargetUnavailable
from nas.api import get_task
from nas.cli.app import app
from nas.cli.search import objective_names
from nas.goals import Goals
from nas.objectives.energy import Energy
from nas.objectives.flops import Flops
from nas.objectives.latency import Latency
from nas.objectives.params import Params
from nas.objectives.predicted_energy import PredictedEnergy
from nas.objectives.predicted_latency import PredictedLatency, predict_instead
from nas.predictors.profile import graph_features, load_profile, profile_folder, profile_path, transferred
from nas.predictors.roofline import roofline_ms
from nas.profile import profile
from nas.search import load_study, open_study, search
from nas.summary import format_quantity, quality_name, result_json
from nas.trial import Quantity
from searchspaces.space import Constraint, load_space

SPACE = "tiny_lm"


@dataclass(frozen=True)
class Limits:
    """A machine whose figures are known."""

    fma_peak_gflops: float = 100.0
    copy_gbs: float = 10.0


@dataclass
class Stopwatch:
    """Measure by a formula, note what was measured, and fail as often as told."""

    measured: list = field(default_factory=list)
    failures: int = 0
    error: Exception = field(default_factory=lambda: CompileError("no kernel"))

    def evaluate(self, context):
        if self.failures:
            self.failures -= 1
            raise self.error
        self.measured.append(context.architecture)
        value = true_ms(context.graph("latency"))
        return Quantity(value, "ms", "measured", (0.99 * value, 1.01 * value))


def true_ms(graph):
    """Return a latency that is no constant multiple of the roofline: each operation costs a microsecond besides."""
    return 3.0 * roofline_ms(graph, Limits()) + 1e-3 * len(node_costs(graph))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Keep profiles in a folder of the test's own."""
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path / "cache"))


def make(samples, out="device", watch=None, **options):
    watch = watch or Stopwatch()
    return profile(SPACE, threads=1, samples=samples, out=out, measure=watch, limits=Limits(), **options)


def graph_of(architecture):
    return architecture.graph(get_task("char_lm", seq_len=128).signature)


def test_corners_come_first_and_what_is_there_is_not_measured_again():
    """A second call with more samples measures the difference, and leaves the first samples as they are."""
    space, first, second = load_space(SPACE), Stopwatch(), Stopwatch()
    begun, path = make(4, watch=first)
    assert first.measured[:3] == [space.smallest(), space.centroid(), space.largest()]
    assert path == profile_folder() / "device.json"
    grown, _ = make(6, watch=second)
    assert (len(first.measured), len(second.measured)) == (4, 2)
    assert grown.samples[:4] == begun.samples
    assert len({sample.hash for sample in grown.samples}) == 6
    assert load_profile("device") == grown == load_profile(path)
    whole, _ = make(6, out="whole")
    assert whole.samples == grown.samples
    sample = grown.samples[1]
    assert space.architecture(sample.architecture) == space.centroid()
    assert sample.latency_ms == pytest.approx(true_ms(graph_of(space.centroid())))
    assert sample.roofline_ms == pytest.approx(roofline_ms(graph_of(space.centroid()), Limits()))


def test_a_space_of_two_models_gives_two_samples(tmp_path):
    """Where nothing new is drawn, the profile is what there is."""
    path = tmp_path / "two.yaml"
    path.write_text(
        "schema: 1\nname: two\nmodel: {task: char_lm, seq_len: 16, d_model: {choice: [32, 64]}, depth: 1}\n"
        "block: {token_mixer: linear_attention, channel_mixer: none}\n"
    )
    watch = Stopwatch()
    found, _ = profile(path, threads=1, samples=5, out="two", measure=watch, limits=Limits())
    assert len(found.samples) == len(watch.measured) == 2


def test_an_interrupted_profile_keeps_what_was_measured():
    """Every sample is on the disk before the next one is begun."""

    class Interrupted(Stopwatch):
        def evaluate(self, context):
            if len(self.measured) == 2:
                raise KeyboardInterrupt
            return super().evaluate(context)

    with pytest.raises(KeyboardInterrupt):
        make(5, watch=Interrupted())
    assert len(load_profile("device").samples) == 2
    rest = Stopwatch()
    assert len(make(5, watch=rest)[0].samples) == 5
    assert len(rest.measured) == 3


def test_a_model_that_fails_is_left_out_and_what_concerns_all_ends_the_call():
    """Failures of candidates are told; the others are measured; nothing at all is an error."""
    heard = []

    class Listener:
        def on_sample(self, profile, sample, wanted):
            heard.append((len(profile.samples), wanted))

        def on_failure(self, architecture, error):
            heard.append(error.message)

    found, _ = make(2, watch=Stopwatch(failures=1), listener=Listener())
    assert heard == ["no kernel", (1, 2), (2, 2)]
    assert load_space(SPACE).smallest().to_dict() not in [sample.architecture for sample in found.samples]
    with pytest.raises(KernelCrash):
        make(1, out="none", watch=Stopwatch(failures=10**6, error=KernelCrash("it died")))
    with pytest.raises(StorageError):
        make(2, out="none", watch=Stopwatch(failures=1, error=StorageError("full")))
    assert not profile_path("none").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "cpu-other-t1"}, "fingerprint"),
        ({"batch": 8}, "batch"),
        ({"machine": {"cpu": "another"}}, "machine"),
        ({"space": {"name": SPACE, "sha256": "0"}}, "space"),
    ],
)
def test_a_profile_of_something_else_is_not_added_to(change, named):
    """What one file holds was measured on one device, of one space."""
    found, path = make(1)
    replace(found, **change).save(path)
    with pytest.raises(InputError, match=f"another {named}"):
        make(2)


def test_missing_and_damaged_profiles_name_what_makes_one(tmp_path):
    """Each message says how to get a profile; no traceback, no half of a file."""
    _, path = make(3)
    with pytest.raises(InputError, match=r"did you mean 'device'\? `nas profile SPACE") as error:
        load_profile("devise")
    assert error.value.exit_code == 2
    whole = path.read_bytes()
    damages = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "binary": b"\xff\xfe",
        "list": b"[]",
        "negative": json.dumps(change_sample(whole, latency_ms=-1.0)).encode(),
        "nothing": json.dumps(change_sample(whole, latency_ms=None)).encode(),
        "no_sample": json.dumps({**json.loads(whole), "samples": []}).encode(),
    }
    for name, data in damages.items():
        damaged = tmp_path / f"{name}.json"
        damaged.write_bytes(data)
        with pytest.raises(InputError, match="nas profile SPACE"):
            load_profile(damaged)
    (tmp_path / "newer.json").write_text(json.dumps({**json.loads(whole), "format": 99}))
    with pytest.raises(InputError, match="found: 99"):
        load_profile(tmp_path / "newer.json")
    with pytest.raises(InputError, match="cannot be read"):
        load_profile(str(tmp_path) + "/.")


def change_sample(whole, **fields):
    data = json.loads(whole)
    data["samples"][0] |= fields
    return data


def test_shares_of_operations_add_up():
    """The features split the roofline's time by kind of operation."""
    graph = graph_of(load_space(SPACE).centroid())
    features, least_ms = graph_features(graph, Limits())
    assert least_ms == pytest.approx(roofline_ms(graph, Limits()))
    shares = [value for name, value in features.items() if name.startswith("share.")]
    assert sum(shares) == pytest.approx(1.0)
    assert len(shares) > 3
    assert features["log_roofline"] == pytest.approx(np.log(least_ms))


def test_predictions_follow_what_was_measured_and_are_marked():
    """Of models that were not measured, predictions beat the best constant factor; intervals are not empty."""
    found, _ = make(24)
    space, rng = load_space(SPACE), np.random.default_rng(99)
    graphs = [graph_of(space.sample(rng)) for _ in range(12)]
    quantities = [found.predict(graph) for graph in graphs]
    true = np.array([true_ms(graph) for graph in graphs])
    predicted = np.array([quantity.value for quantity in quantities])
    ratio = np.array([sample.latency_ms / sample.roofline_ms for sample in found.samples])
    constant = np.array([roofline_ms(graph, found) for graph in graphs]) * np.exp(np.log(ratio).mean())
    assert np.abs(np.log(predicted / true)).mean() < np.abs(np.log(constant / true)).mean()
    for quantity in quantities:
        assert (quantity.source, quantity.unit) == ("predicted", "ms")
        assert quantity.interval is not None
        assert 0 <= quantity.interval[0] < quantity.value < quantity.interval[1]
        assert "(predicted)" in format_quantity(quantity)
        assert "outside" not in quantity.details
    few = replace(found, samples=found.samples[:1])
    assert few.predict(graph_of(space.largest())).details["outside"] is True


def test_a_small_profile_is_filled_up_from_another_device():
    """A device that is twice as slow with small models: ten samples and the other device beat ten samples alone."""

    class Slower(Stopwatch):
        def evaluate(self, context):
            quantity = super().evaluate(context)
            return replace(quantity, value=2.0 * quantity.value**0.9)

    known, small = make(30)[0], make(10, out="small", watch=Slower())[0]
    filled = transferred(small, [known])
    assert [sample.hash for sample in filled.samples] == [sample.hash for sample in known.samples]
    assert [sample.latency_ms for sample in filled.samples[:10]] == [sample.latency_ms for sample in small.samples]
    expected = [2.0 * sample.latency_ms**0.9 for sample in known.samples]
    # The relation is a line between logarithms, so only the ridge's least penalty is in the way.
    np.testing.assert_allclose([sample.latency_ms for sample in filled.samples], expected, rtol=0.01)
    assert 0 < filled.spread < 0.02
    space, rng = load_space(SPACE), np.random.default_rng(99)
    graphs = [graph_of(space.sample(rng)) for _ in range(12)]
    true = np.array([2.0 * true_ms(graph) ** 0.9 for graph in graphs])
    alone, together = (
        np.abs(np.log(np.array([device.predict(graph).value for graph in graphs]) / true)).mean()
        for device in (small, filled)
    )
    assert together < alone
    assert PredictedLatency.of("small", "device").settings["profile"] == "small,device"
    with pytest.raises(InputError, match="do not go together"):
        transferred(replace(small, batch=2), [known])
    with pytest.raises(InputError, match="2 models"):
        transferred(replace(small, samples=small.samples[:2]), [known])


def test_search_with_predictions_is_deterministic_measures_nothing_and_is_marked(tmp_path, monkeypatch):
    """Two searches agree in every value; sources reach the journal; the front is possible at most."""
    monkeypatch.setattr(Latency, "evaluate", lambda *_: pytest.fail("it was measured"))
    make(10)
    found = []
    for name in ("one", "two"):
        goals = [PredictedLatency.of("device"), Params()]
        with open_study(SPACE, objectives=goals, target="arm64", storage=tmp_path / name) as study:
            study.run(6)
        found.append([(trial.hash, trial.quantities["latency"]) for trial in study.trials])
    assert found[0] == found[1]
    loaded = load_study(tmp_path / "one")
    assert {trial.sources["latency"] for trial in loaded.trials} == {"predicted"}
    assert not loaded.front().certain
    assert set(loaded.front().unsettled.values()) == {"latency is predicted"}
    assert quality_name(loaded) is None
    assert {trial["source"]["latency"] for trial in result_json(loaded)["front"]} == {"predicted"}


@dataclass
class Meter:
    """Count energy by a formula: ten watts for as long as the model runs."""

    counted: list = field(default_factory=list)

    def evaluate(self, context):
        self.counted.append(context.architecture)
        return Quantity(0.01 * true_ms(context.graph("energy")), "J", "measured")


def test_energy_is_added_to_a_profile_and_predicted_from_it(tmp_path):
    """Samples that are there get it without being timed again; predictions are marked and near; latency's stay."""
    before, path = make(12)
    with pytest.raises(InputError, match="holds no energy"):
        PredictedEnergy.of(path)
    watch, meter = Stopwatch(), Meter()
    _, path = make(12, watch=watch, energy=meter)
    assert (len(watch.measured), len(meter.counted)) == (0, 12)
    make(12, watch=watch, energy=meter)
    assert len(meter.counted) == 12
    assert load_profile(path).sha256 == before.sha256
    middle = graph_of(load_space(SPACE).centroid())
    predicted = load_profile(path).predict_energy(middle)
    assert (predicted.source, predicted.unit) == ("predicted", "J")
    assert predicted.interval is not None
    assert predicted.interval[0] <= 0.01 * true_ms(middle) <= predicted.interval[1]
    bounded = predict_instead(PredictedLatency.of(path), [Energy(max=0.5)])
    assert [(item.name, item.source, item.bounds) for item in bounded] == [("energy", "predicted", (None, 0.5))]
    study = search(SPACE, objectives=[PredictedEnergy.of(path), Params()], strategy="random", budget=3)
    assert {trial.sources["energy"] for trial in study.trials} == {"predicted"}


def test_energy_does_not_pass_from_device_to_device():
    """A profile that was filled up from another device holds that one's latencies scaled, and no energy."""
    known, _ = make(12, "known", energy=Meter())
    new, _ = make(4, "new")
    with pytest.raises(InputError, match="holds no energy"):
        transferred(new, [known]).energy_samples()


def test_a_profile_that_grew_does_not_resume_a_search(tmp_path):
    """Its predictions would be others: the settings say so."""
    make(3)
    search(SPACE, objectives=[PredictedLatency.of("device")], budget=1, storage=tmp_path / "run")
    search(SPACE, objectives=[PredictedLatency.of("device")], budget=2, storage=tmp_path / "run")
    make(4)
    with pytest.raises(InputError, match="another objectives"):
        search(SPACE, objectives=[PredictedLatency.of("device")], budget=3, storage=tmp_path / "run")


def test_bounds_on_latency_hold_for_the_prediction():
    """A space's or a command's bound on measured latency becomes one on the predicted."""
    predicted = PredictedLatency(profile=make(3)[0])
    space = load_space(SPACE)
    bound = Constraint("latency_ms", maximum=0.5)
    study = open_study(
        replace(space, constraints=(bound,)), objectives=[predicted, Flops()], constraints=[Latency(max_ms=1)]
    )
    assert [(item.name, item.high) for item in study.goals.bounds] == [("latency", 0.5), ("latency", 1)]
    assert {type(item) for item in study.goals.metrics} == {PredictedLatency, Flops}
    assert predict_instead(predicted, [Params()]) == [Params()]
    assert Goals.of([predicted]).objectives[0].settings["profile"] == "device"


def test_latency_for_a_foreign_processor_is_refused_before_any_trial(tmp_path):
    """Every trial would fail at measuring: the message names the ways out."""
    foreign = "arm64" if platform.machine() != "aarch64" else None
    if foreign is None:
        pytest.skip("arm64 is at home here")
    with pytest.raises(TargetUnavailable, match="--latency predicted:PROFILE"):
        search(SPACE, target=foreign, objectives=[Latency(), Params()], storage=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(TargetUnavailable, match="cannot be measured"):
        profile(SPACE, target=foreign, measure=Stopwatch(), limits=Limits())
    search(SPACE, target=foreign, objectives=[Flops(), Params()], budget=1)


def test_commands_search_with_a_profile_and_say_what_is_wrong(tmp_path):
    """The table and the JSON mark what was predicted; bad profiles end with code 2."""
    make(4)
    run = ["search", SPACE, "--objective", "latency", "--objective", "params", "--trials", "3", "--no-ship", "-q"]
    run += ["--out", str(tmp_path / "run")]
    shown = CliRunner().invoke(app, [*run, "--latency", "predicted:device", "--constraint", "latency<=1e6"])
    assert shown.exit_code == 0, shown.output
    assert "(predicted)" in shown.output
    for wrong, message in (
        ("predicted:nowhere", "nas profile"),
        ("guessed", "predicted:PROFILE"),
        ("predicted:", "bad"),
    ):
        failed = CliRunner().invoke(app, [*run, "--latency", wrong])
        assert failed.exit_code == 2
        assert message in failed.output
    other_batch = CliRunner().invoke(app, [*run, "--latency", "predicted:device", "--batch", "4"])
    assert other_batch.exit_code == 2
    assert "another batch" in other_batch.output
    idle = ["search", SPACE, "--objective", "params", "--latency", "predicted:device", "--out", str(tmp_path / "idle")]
    assert "no latency to predict" in CliRunner().invoke(app, idle).output
    assert "predicted_latency" not in objective_names()


@pytest.mark.slow
def test_profile_of_this_machine():
    """The command measures for real, says where the profile is, and adds nothing on a second call."""
    arguments = ["profile", SPACE, "--threads", "1", "--samples", "2", "--out", "here", "--json"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    found = load_profile("here")
    assert len(found.samples) == 2
    assert found.samples[0].latency_ms < found.samples[1].latency_ms
    assert min(found.fma_peak_gflops, found.copy_gbs) > 0
    assert found.threads == 1
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert load_profile("here") == found
