"""The report: one page that needs nothing else, shows everything a study knows, and trusts no text in it."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from ir.errors import InputError, StorageError
from nas.bench_results import keep_result, read_results
from nas.report.write import write_report
from nas.search import load_study, search
from nas.summary import Yardstick, format_quantity, front_lines, noise_lines
from nas.testing.spaces import Grid
from nas.trial import Quantity
from tests.nas.synthetic_run import write_run

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Give a run folder with made-up results and a comparison with torch for one trial of its front."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    first = load_study(folder).pareto_front()[0]
    latency_ms = first.values["latency"]
    entry = {"status": "ok", "interval_ms": [1, 2], "max_error": 0.0}
    results = {"nas": entry | {"median_ms": latency_ms, "ratio": 1.0}}
    results["eager"] = entry | {"median_ms": 3 * latency_ms, "ratio": 3.0}
    keep_result(folder, {"trial": first.number, "artifact": "x", "threads": 2, "results": results})
    return folder


@pytest.fixture(scope="module")
def page(run):
    """Give the text of the run's report."""
    return write_report(load_study(run)).page.read_text(encoding="utf-8")


def test_report_writes_a_page_and_png_figures(run):
    """The page lies in the run folder with its figures beside it."""
    written = write_report(load_study(run))
    assert written.page == run / "report" / "report.html"
    assert [path.name for path in written.figures] == ["front_quality_latency.png", "history.png"]
    assert all(path.read_bytes().startswith(PNG) for path in written.figures)


def test_report_needs_no_other_file(page):
    """No script, no address to load from; XML namespaces are names, not addresses."""
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in without_namespaces.replace("http-equiv", "")
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "url(#" in page
    assert not re.search(r"url\((?!#)", page)


def test_report_figures_are_well_formed_and_take_their_colours_from_the_page(page):
    """Each drawing parses as XML with ids of its own; the style sheet sets its colours for light and dark."""
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 2
    ids = [element.get("id") for svg in drawings for element in ElementTree.fromstring(svg).iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for variable in set(re.findall(r"var\(--(\w+)\)", page)):
        assert page.count(f"--{variable}:") == 2, variable


def test_report_shows_the_whole_front(run, page):
    """Every model of the front has a row and a section with its layers."""
    study = load_study(run)
    for trial in study.pareto_front():
        assert f'href="#trial-{trial.number}"' in page
        assert f'id="trial-{trial.number}"' in page
        assert trial.hash[:16] in page
    assert page.count("<summary>layers</summary>") == len(study.pareto_front())


def test_report_names_sources_intervals_and_the_yardstick(page):
    """A number never stands without where it comes from and what to hold it against."""
    assert "trained" in page
    assert "measured" in page
    assert re.search(r"<small>\[[\d.]+, [\d.]+\]", page)
    assert "chance" in page
    assert "logistic_regression" in page


@pytest.mark.parametrize(("direction", "better"), [("min", ["linear"]), ("max", ["mean"])])
def test_yardstick_names_the_trivial_models_that_are_better(direction, better):
    """Better is less of an error and more of an accuracy; equal is not better."""
    found = Yardstick("m", "", direction, 1.0, {"mean": 0.9, "linear": 0.7, "same": 0.8})
    assert found.better_baselines(0.8) == better


def test_report_shows_torch_eager_where_it_was_timed(page):
    """The reference comes from `nas bench`."""
    assert "the same models in torch eager" in page
    assert "3.0 times the compiled model" in page


def test_report_tells_failures_with_their_reasons(page):
    """Trials without a result are listed with reason and traceback."""
    assert "NonFiniteLoss" in page
    assert "line 1\nline 2" in page


def test_report_escapes_what_it_did_not_write(page):
    """Reasons and machine names are text, never markup."""
    assert "A &lt;fast&gt; CPU &amp; more" in page
    assert "the &lt;loss&gt; became nan" in page
    assert "<loss>" not in page
    assert "<fast>" not in page


def test_report_of_a_study_over_functions_has_no_task(tmp_path):
    """A study with one objective and no models has a history and no front to plot."""

    def cost(point):
        return float(point.choices[0])

    search(Grid((3, 2)), objectives=[cost], budget=4, storage=tmp_path)
    written = write_report(load_study(tmp_path))
    assert [path.name for path in written.figures] == ["history.png"]
    assert "choices=" in written.page.read_text()


def test_report_of_a_study_without_results_says_so(tmp_path):
    """Nothing finished is no reason to fail."""

    def broken(point):
        raise ValueError("never works")

    search(Grid((2,)), objectives=[broken], budget=2, storage=tmp_path)
    text = write_report(load_study(tmp_path), tmp_path / "elsewhere").page.read_text()
    assert "No trial finished" in text
    assert "never works" in text


def test_report_says_why_a_model_was_not_shipped(tmp_path):
    """A model of the front that could not be compiled has the reason where its artifact would be."""

    def cost(point):
        return float(point.choices[0])

    with search(Grid((3,)), objectives=[cost], budget=3, storage=tmp_path) as study:
        study.record_unshipped(study.pareto_front()[0].number, "CompileError: no kernel")
    assert "CompileError: no kernel" in write_report(load_study(tmp_path)).page.read_text()


def test_report_needs_a_place(tmp_path):
    """A study in memory is told to name a folder; a place that cannot be written is a clear error."""

    def cost(point):
        return 1.0

    study = search(Grid((2,)), objectives=[cost], budget=1)
    with pytest.raises(InputError, match="no place for a report"):
        write_report(study)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(study, tmp_path / "file" / "report")


def test_bench_results_keep_the_latest_of_each_runtime(tmp_path):
    """A later comparison replaces what it timed again and keeps the rest."""
    keep_result(tmp_path, {"trial": 1, "threads": 2, "results": {"nas": 1, "eager": 2}})
    keep_result(tmp_path, {"trial": 1, "threads": 1, "results": {"nas": 3}})
    keep_result(tmp_path, {"trial": 1, "threads": 2, "results": {"nas": 4, "compile": 5}})
    assert read_results(tmp_path) == [
        {"trial": 1, "threads": 1, "results": {"nas": 3}},
        {"trial": 1, "threads": 2, "results": {"nas": 4, "eager": 2, "compile": 5}},
    ]
    (tmp_path / "bench.json").write_text("{broken")
    assert read_results(tmp_path) == []


def test_report_tells_certain_points_from_possible_ones(tmp_path):
    """Both are drawn and named; a possible one has the reason, a value measured again says so."""
    with load_study(write_run(tmp_path), hold=True) as study:
        first, *rest = study.pareto_front()
        assert rest
        latency = replace(first.quantities["latency"], interval=None, details={})
        study.record_remeasured(first.number, {"latency": latency})
        assert study.front().status(first) == "certain"
        page = write_report(study).page.read_text(encoding="utf-8")
    assert ">on the front for certain<" in page
    assert ">may be on the front<" in page
    assert "latency was not measured again" in page
    assert "<b>1</b><span>there for certain</span>" in page
    assert page.count("measured again") == 1 + page.count("not measured again")


def test_summary_names_noise_and_what_is_in_the_way(tmp_path):
    """Whoever reads the end of a search hears how many figures are noisy and why a point is only possible."""
    study = load_study(write_run(tmp_path))
    noisy = sum(
        bool(trial.quantities["latency"].details["noisy"]) for trial in study.trials if "latency" in trial.values
    )
    assert noisy
    [line] = noise_lines(study)
    assert f"{noisy} of {study.count()['finished']} measurements are noisy" in line
    possible = ", ".join(str(trial.number) for trial in study.front().possible)
    assert front_lines(study.front()) == [f"  possible: trial {possible} (latency was not measured again)"]
    assert "noisy" in format_quantity(Quantity(1.0, "ms", "measured", details={"noisy": True}))
    assert "noisy" not in format_quantity(Quantity(1.0, "ms", "measured", details={"noisy": False}))
