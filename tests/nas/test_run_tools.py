"""The tools over runs: what they find is there, and what is there they find."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from ir.errors import InputError
from nas.cli.app import app
from nas.cli.models import task_of
from nas.differences import ModelDifference, RunDifference, changes, compare
from nas.lint import lint, unreachable
from nas.objectives.params import Params
from nas.replay import replay
from nas.search import load_study, search
from nas.storages.journal import read_journal
from nas.strategies.nsga2 import NSGA2
from nas.testing.spaces import Grid
from nas.trial import Outcome, Quantity
from nas.why import why
from searchspaces.space import Space
from tests.nas.synthetic_run import write_run

NSGA = NSGA2(population=6)
TRIALS = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A search over a real space: 16 trials, 10 of them bred, under a cheap constraint that refuses some."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    search_again(folder, budget=TRIALS)
    return folder


def search_again(folder, **options):
    constraints = [Params(min=20_000)]
    search(
        "tiny_recall", objectives=["params", "flops"], constraints=constraints, strategy=NSGA, storage=folder, **options
    )


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def edit_journal(folder, change):
    path = folder / "journal.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in change(records)))


def copy_of(run, folder):
    folder.mkdir()
    (folder / "journal.jsonl").write_bytes((run / "journal.jsonl").read_bytes())
    return folder


def test_replay_reproduces_every_proposal(run):
    """Seed and journal are enough, duplicates and refused candidates included."""
    assert any("excluded" in record.get("refused", ()) for record in read_journal(run))
    found = replay(run)
    assert (found.checked, found.divergences, found.notices) == (TRIALS, (), ())
    shown = invoke("replay", run, "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["reproduced"] is True


def test_replay_names_the_first_trial_that_differs(run, tmp_path):
    """A proposal that somebody swapped is found, and the exit code says so."""
    folder = copy_of(run, tmp_path / "edited")
    own = load_study(run).trials[9].encoded

    def swap(records):
        for record in records:
            if record["event"] == "trial" and record["trial"] == 4:
                record["architecture"] = dict(own)
        return records

    edit_journal(folder, swap)
    assert replay(folder).first == 4
    shown = invoke("replay", folder)
    assert shown.exit_code == 1
    assert "trial 4 is the first" in shown.stdout


def test_replay_with_another_seed_differs_from_the_start(run, tmp_path):
    """What decides the sequence is the journal's own seed."""
    folder = copy_of(run, tmp_path / "seeded")

    def reseed(records):
        records[0]["settings"]["seed"] += 1
        return records

    edit_journal(folder, reseed)
    assert replay(folder).first == 0


def test_replay_takes_a_space_made_in_python(tmp_path):
    """A journal holds no Python; without the space that is said, with it the sequence comes back."""
    grid = Grid((6, 6, 6))

    def total(point):
        return float(sum(point.choices))

    search(grid, objectives=[total], strategy="regularized_evolution", budget=40, storage=tmp_path)
    with pytest.raises(InputError, match=r"does not hold the search space(.|\n)*space="):
        replay(tmp_path)
    assert replay(tmp_path, space=grid).divergences == ()


def test_changes_go_layer_by_layer():
    """Another component is one change, another option names the option, and a layer more is one change."""
    first = {"norm": {"rms_norm": {}}, "stages": [{"layers": [{"token_mixer": {"mamba": {"state_dim": 8}}}] * 2}]}
    second = {
        "norm": {"layer_norm": {}},
        "stages": [{"layers": [{"token_mixer": {"mamba": {"state_dim": 16}}}, {"token_mixer": {"pooling": {}}}, {}]}],
    }
    found = {change.path: (change.first, change.second) for change in changes(first, second)}
    assert found == {
        "norm": ("rms_norm", "layer_norm"),
        "stages[0].layers[0].token_mixer.mamba.state_dim": ("8", "16"),
        "stages[0].layers[1].token_mixer": ("mamba(state_dim=8)", "pooling"),
        "stages[0].layers[2]": ("-", ""),
    }
    assert not list(changes(first, first))


def test_diff_of_runs_names_settings_and_fronts(run, tmp_path):
    """A run equals itself; another seed is another front."""
    same = compare(str(run), str(run))
    assert isinstance(same, RunDifference)
    assert (same.settings, same.only_first, same.only_second) == ((), (), ())
    assert [pair[0] for pair in same.both] == [trial.number for trial in load_study(run).pareto_front()]
    other = tmp_path / "other"
    search_again(other, budget=6, seed=7)
    found = compare(str(run), str(other))
    assert isinstance(found, RunDifference)
    assert [(change.path, change.first, change.second) for change in found.settings] == [("seed", "0", "7")]
    assert {change.name for change in found.best} == {"params", "flops"}
    assert "seed" in invoke("diff", run, other).stdout


def test_diff_of_models_gives_values_with_intervals(tmp_path):
    """The difference of two intervals is as wide as both together, and certain only where it leaves 0 out."""
    run = write_run(tmp_path / "run")
    found = compare(f"{run}:0", f"{run}:1")
    assert isinstance(found, ModelDifference)
    assert found.architecture
    first, second = (load_study(run).trials[number].quantities["latency"] for number in (0, 1))
    [latency] = [value for value in found.values if value.name == "latency"]
    assert latency.interval is not None
    assert first.interval is not None and second.interval is not None
    assert latency.interval == (second.interval[0] - first.interval[1], second.interval[1] - first.interval[0])
    assert latency.is_certain == (latency.interval[0] > 0 or latency.interval[1] < 0)
    assert json.loads(invoke("diff", f"{run}:0", f"{run}:1", "--json").stdout)["values"][0]["name"] == "params"


@pytest.mark.parametrize("second", ["{run}:3", "{run}:99", "nothing", "{run}:x"])
def test_diff_refuses_what_cannot_be_compared(run, second):
    """A run with a model, a trial that is not there, and names of nothing are input errors."""
    assert invoke("diff", run, second.format(run=run)).exit_code == 2


def ask_and_tell(folder, latencies):
    """Search a grid by hand; each trial's latency is given with its interval."""
    from nas.search import open_study

    def latency(point):
        return 0.0

    with open_study(Grid((3, 3)), objectives=[latency], storage=folder, strategy="random") as study:
        for value, half in latencies:
            trial = study.ask()
            assert trial is not None
            quantity = Quantity(value, "ms", "measured", (value - half, value + half))
            study.tell(trial.number, Outcome("finished", {"latency": quantity}))
    return load_study(folder)


def test_why_compares_with_the_most_similar_trial_before(tmp_path):
    """Fewest changes decide, the later one where two are as near; intervals that overlap decide nothing."""
    study = ask_and_tell(tmp_path, [(5.0, 0.1), (4.0, 0.1), (4.05, 0.1), (6.0, 0.1), (3.0, 0.1)])
    assert why(study, 0).base is None
    verdicts = set()
    for number in range(1, 5):
        found = why(study, number)
        assert found.base is not None
        counts = {
            other: len(list(changes(study.trials[other].encoded, study.trials[number].encoded)))
            for other in range(number)
        }
        nearest = [other for other, count in counts.items() if count == min(counts.values())]
        assert found.base == max(nearest)
        assert len(found.changes) == min(counts.values())
        verdicts.add(found.effects[0].verdict)
    assert [why(study, 2, base=1).effects[0].verdict, why(study, 3, base=1).effects[0].verdict] == ["undecided", "cost"]
    assert why(study, 1, base=0).effects[0].verdict == "gained"
    with pytest.raises(InputError, match="no such trial"):
        why(study, 9)


def test_why_says_more_is_better_where_it_is(tmp_path):
    """A quality that is to be maximised gains by growing."""
    run = write_run(tmp_path / "run")
    study = load_study(run)
    finished = [trial for trial in study.trials if trial.state == "finished"]
    better, worse = sorted(finished[:2], key=lambda trial: -trial.values["quality"])
    effects = {effect.value.name: effect.verdict for effect in why(study, better.number, base=worse.number).effects}
    assert effects["quality"] == "gained"
    assert "verdict" in invoke("why", run, 1, "--json").stdout
    failed = invoke("why", run, 4)
    assert failed.exit_code == 0 and "NonFiniteLoss" in failed.stdout


SPACE = {
    "schema": 1,
    "name": "linted",
    "model": {"task": "mqar", "seq_len": 32, "d_model": {"choice": [16, 24]}, "depth": 1, "position": "none"},
    "block": {"token_mixer": {"choice": [{"softmax_attention": {"num_heads": {"choice": [2, 4]}}}, "pooling"]},
              "channel_mixer": {"choice": ["none", "mlp"]}},
}  # fmt: skip


def space_with(**model):
    return Space.from_dict(SPACE | {"model": SPACE["model"] | model})


def look_at(space, **options):
    return lint(space, task_of(space).signature, **options)


def test_lint_of_a_clean_space_counts_every_model():
    """Where each choice makes a difference there are as many models as architectures."""
    found = look_at(space_with())
    assert found.is_exact and found.is_clean
    assert found.distinct == found.counted == 12
    assert (found.unreachable, found.ignored, found.infeasible.value) == ((), (), 0.0)


def test_lint_finds_a_choice_that_makes_no_difference():
    """ALiBi and none are one model to mixers that take no position; the option's choice is named."""
    space = Space.from_dict(
        SPACE
        | {
            "model": SPACE["model"] | {"position": {"choice": ["none", "alibi"]}},
            "block": {
                "token_mixer": {"choice": ["pooling", "linear_attention"]},
                "channel_mixer": {"choice": ["none", "mlp"]},
            },
        }
    )
    found = look_at(space)
    assert [choice.path for choice in found.ignored] == ["model.position"]
    assert found.distinct == found.counted / 2
    assert not found.is_clean


def test_lint_finds_values_that_no_architecture_has():
    """Five heads never divide 16 or 24."""
    heads = {"softmax_attention": {"num_heads": {"choice": [2, 5]}}}
    space = Space.from_dict(SPACE | {"block": SPACE["block"] | {"token_mixer": {"choice": [heads, "pooling"]}}})
    [choice] = unreachable(space)
    assert (choice.path, choice.values) == ("block.token_mixer.softmax_attention.num_heads", (5,))
    assert look_at(space).unreachable == (choice,)


def test_lint_measures_the_infeasible_share():
    """The share is exact where all are built, and in its interval where they are drawn."""
    space = Space.from_dict(SPACE | {"constraints": {"params": {"max": 2500}}})
    signature = task_of(space).signature
    from ir.cost import profile

    over = [profile(item.graph(signature)).params > 2500 for item in space.enumerate()]
    exact = look_at(space)
    assert 0 < exact.infeasible.value == sum(over) / len(over) < 1
    sampled = look_at(space, samples=10)
    low, high = sampled.infeasible.interval
    assert not sampled.is_exact and low <= exact.infeasible.value <= high


def test_lint_estimates_the_models_of_a_space_too_large_to_build():
    """The interval of a sample holds the exact number."""
    space = space_with(depth={"range": [1, 3, 1]}, position={"choice": ["none", "alibi", "rope"]})
    exact = look_at(space, samples=space.size())
    assert exact.is_exact and exact.distinct < exact.counted
    found = look_at(space, samples=60)
    low, high = found.distinct_interval
    assert not found.is_exact and low <= exact.distinct <= high < exact.counted


def test_lint_exit_code_says_whether_the_space_is_clean(tmp_path):
    """A space with an idle value fails, so that a build can hold it."""
    path = tmp_path / "space.yaml"
    text = json.dumps(SPACE)
    path.write_text(text)
    assert invoke("lint", path).exit_code == 0
    path.write_text(text.replace("[2, 4]", "[2, 5]"))
    shown = invoke("lint", path, "--json")
    assert shown.exit_code == 1
    assert json.loads(shown.stdout)["unreachable"][0]["values"] == [5]
