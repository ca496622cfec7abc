"""`nas bench --suite` and `--kernels`: checked before timed, kept row by row, shown as table, JSON and Markdown.

No claim about any time.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from codegen import kernel_bench
from ir.builder import Builder
from ir.errors import InputError, VerificationError
from ir.graph import Graph
from ir.types import Axis
from nas import api, suites
from nas.bench import markdown, record
from nas.bench.suite import SuiteBench, lacks_cpus
from nas.cli.app import app
from nas.documents import write_into
from nas.suites import SuiteModel

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def nas(*arguments: object) -> Any:
    """Run the program in this process."""
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(argument) for argument in arguments])


def product(width: int) -> Graph:
    """One small product, moved by a position."""
    b = Builder()
    x, place = b.input("x", (3, 8)), b.input("place", (), "int32")
    w = b.parameter("w", ((Axis("i", 8),), (Axis("o", width),)))
    return b.build(y=b.matmul(x, w) + b.cast(place, "float32"))


TINY = (
    SuiteModel("tiny-8", partial(product, 8), inputs={"place": 7}),
    SuiteModel("tiny-24", partial(product, 24), kind="recurrent", step=True),
)


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every suite be two products."""
    monkeypatch.setattr(suites, "load", lambda name: TINY)


@pytest.fixture
def tiny_24_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler fail the check of the second product."""
    compile_right = api.compile

    def compile_model(graph: Graph, **options: Any) -> Any:
        if graph.outputs[0][1] and graph.type_of(graph.outputs[0][1]).shape == (3, 24):
            raise VerificationError("the compiled model disagrees with torch", found="0.1")
        return compile_right(graph, **options)

    monkeypatch.setattr(api, "compile", compile_model)


def row(model: str = "m", threads: int = 1, **changes: Any) -> record.Row:
    """A row as a bench makes it."""
    found = {
        "suite": "cpu",
        "isa": None,
        "model": model,
        "kind": "dense",
        "step": False,
        "dtype": "float32",
        "threads": threads,
        "status": "ok",
        "ours_ms": 2.0,
        "peers": {"eager": 8.0, "openvino": 4.0},
        "best_peer": "openvino",
        "ratio": 2.0,
        "round_ratio": 2.01,
        "gflops": 100.0,
        "peak_fraction": 0.5,
        "gbs": 1.0,
        "copy_fraction": 0.1,
        "max_error": 1e-6,
        "intervals_ms": {"nas": (1.9, 2.1)},
        "missing": {},
        "fma_peak_gflops": 200.0 * threads,
        "copy_gbs": 10.0 * threads,
        "measured": "2030-01-02T03:04:05+00:00",
        "code": "c0de",
        "machine": {"cpu": "Some CPU", "logical_cpus": 2, "versions": {"torch": "2.0"}, "peer_versions": {}},
    }
    return found | changes


def failed_row(model: str) -> record.Row:
    """A row without figures."""
    nothing = dict.fromkeys(("ours_ms", "best_peer", "ratio", "gflops", "max_error"))
    left_out = ("intervals_ms", "missing", "fma_peak_gflops", "copy_gbs", "peak_fraction", "gbs", "copy_fraction")
    kept = {key: value for key, value in row(model).items() if key not in left_out}
    peers = {"eager": None, "openvino": None}
    return kept | nothing | {"status": "wrong", "reason": "disagrees\nexpected", "peers": peers}


def test_suite_bench_prints_the_promised_json_and_keeps_rows(tiny_suite: None, tmp_path: Path):
    """Everything that the format promises is there, and the file has the same rows."""
    out = tmp_path / "rows.jsonl"
    arguments = ("bench", "--suite", "tiny", "--against", "eager", "--threads", 1, "--seconds", 0.1, "--out", out)
    result = nas(*arguments, "--models", "tiny-8", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {"machine", "fma_peak_gflops", "copy_gbs", "rows"} <= set(found)
    [made] = found["rows"]
    promised = ("model", "dtype", "threads", "ours_ms", "peers", "best_peer", "ratio", "gflops", "max_error")
    assert set(promised) <= set(made)
    assert made["peers"]["eager"] == pytest.approx(made["ratio"] * made["ours_ms"])
    assert (made["best_peer"], made["dtype"], made["threads"]) == ("eager", "float32", 1)
    assert 0 <= made["max_error"] <= 1e-4
    assert found["fma_peak_gflops"] == made["fma_peak_gflops"] > 0
    [kept] = record.read(out)
    assert kept["ours_ms"] == made["ours_ms"]
    again = nas(*arguments, "--models", "tiny-8", "--resume", "--json")
    assert json.loads(again.stdout)["rows"][0]["measured"] == made["measured"]
    assert len(out.read_text().splitlines()) == 1


def test_suite_bench_goes_on_after_a_wrong_model(tiny_suite: None, tiny_24_wrong: None, tmp_path: Path):
    """A red check has no number and says so, the other model has its row, and the exit status is 1."""
    arguments = ("bench", "--suite", "tiny", "--against", "eager", "--threads", 1, "--seconds", 0.1, "--json")
    result = nas(*arguments)
    assert result.exit_code == 1
    first, second = json.loads(result.stdout)["rows"]
    assert (first["status"], second["status"]) == ("ok", "wrong")
    assert first["ours_ms"] > 0
    assert "disagrees with torch" in second["reason"]
    assert second["ours_ms"] is second["ratio"] is second["gflops"] is None
    assert second["peers"] == {"eager": None}
    assert "tiny-24, 1 thread(s): wrong" in result.stderr


def test_suite_bench_takes_models_by_pattern(tiny_suite: None):
    """Patterns choose in the suite's order; one that names nothing is bad input."""
    assert [model.name for model in SuiteBench("tiny", ("*-24", "tiny-8")).chosen()] == ["tiny-8", "tiny-24"]
    assert len(SuiteBench("tiny").chosen()) == 2
    with pytest.raises(InputError, match="did you mean 'tiny-24'"):
        SuiteBench("tiny", ("tiny-42",)).chosen()


def test_cpu_suite_has_distinct_names_and_graphs_of_known_cost():
    """Every model of the shipped suite builds, and its fixed inputs exist."""
    models = suites.load("cpu")
    assert len({model.name for model in models}) == len(models)
    for model in models:
        assert set(model.inputs) <= set(model.build().inputs)


def test_record_reads_the_last_row_of_each_thing(tmp_path: Path):
    """A row measured again takes the place of the old one; a line that was cut short is skipped."""
    path = tmp_path / "deep" / "rows.jsonl"
    for made in (row(), row("n"), row(ours_ms=1.5), row(isa="avx2")):
        record.append(path, made)
    with path.open("a") as file:
        file.write('{"model": "cut')
    assert [(made["model"], made["isa"], made["ours_ms"]) for made in record.read(path)] == [
        ("m", None, 1.5),
        ("n", None, 2.0),
        ("m", "avx2", 2.0),
    ]


def test_record_reads_its_own_document(tmp_path: Path):
    """What `--json` printed is as good as the file of rows."""
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(record.document([row(), row(threads=2)])))
    assert record.read(path)[1]["machine"]["cpu"] == "Some CPU"
    assert record.document(record.read(path)) == json.loads(path.read_text())


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"rows": []}'])
def test_record_refuses_a_file_without_rows(text: str, tmp_path: Path):
    """A file of something else is named."""
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(InputError, match="holds no results"):
        record.read(path)


def test_record_document_takes_the_best_limits_by_threads():
    """The top has the machine's best, each number of threads its own."""
    made = record.document([row(), row(threads=2), failed_row("n")])
    assert (made["fma_peak_gflops"], made["copy_gbs"]) == (400.0, 20.0)
    assert made["rooflines"]["1"] == {"fma_peak_gflops": 200.0, "copy_gbs": 10.0}


def test_record_summary_is_the_geometric_mean_and_the_least():
    """Rows without a ratio do not count."""
    made = record.summary([row(ratio=2.0), row("n", ratio=8.0), failed_row("o")])
    assert made["geometric_mean"] == pytest.approx(4.0)
    assert (made["compared"], made["least"], made["least_row"]) == (2, 2.0, "m, float32, 1 thread(s)")


def test_record_code_digest_is_the_same_for_the_same_code():
    """It is what `--resume` compares."""
    assert record.code_digest() == record.code_digest()


def test_markdown_has_machine_date_best_peer_and_gaps():
    """The table says where and when, marks the best peer, and explains each missing time once."""
    gaps = {"eager": "failed: took longer than 9 s"}
    slow = row("n", peers={"eager": None, "openvino": 4.0}, missing=gaps)
    text = markdown.to_markdown([row(), slow, row(threads=2, peers={"eager": None, "openvino": 4.0}, missing=gaps)])
    assert text.startswith("2030-01-02, Some CPU, 2 CPUs; multiply-add peak 400 GFLOP/s, copy 20 GB/s; torch 2.0.")
    assert "| m | float32 | 1 | 2 | 8 | **4** | 2.00 | 100.0 | 50 % | 1e-06 |" in text
    assert "| n | float32 | 1 | 2 | - | **4** | 2.00 |" in text
    assert text.count("took longer than 9 s") == 1
    assert "- torch, n, m: failed: took longer than 9 s" in text


def test_markdown_of_a_wrong_model_has_no_number():
    """Its row says so, with as many cells as the others."""
    text = markdown.to_markdown([row(), failed_row("bad")])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "| bad | float32 | 1 | wrong | - | - |" in text
    assert "- nas, bad: disagrees" in text


def test_bench_markdown_goes_between_the_marks_of_a_document(tmp_path: Path):
    """What was between them is gone, everything else stays; the command needs no measurement."""
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    record.append(rows, row())
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    result = nas("bench", "--suite", "cpu", "--from", rows, "--markdown", "--into", page)
    assert result.exit_code == 0, result.output
    head, _, rest = page.read_text().partition(BEGIN)
    assert (head, rest.partition(END)[2]) == ("before\n", "\nafter\n")
    assert "stale" not in rest
    assert rest.partition(END)[0].strip() == result.stdout.strip()


@pytest.mark.parametrize("text", ["nothing", BEGIN, f"{END} {BEGIN}", 2 * BEGIN])
def test_markdown_refuses_a_document_without_a_place(text: str, tmp_path: Path):
    """A document without both marks, in order, is left alone."""
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(InputError, match="no place for the table"):
        write_into(page, "bench", "table")
    assert page.read_text() == text


def test_bench_of_kernels_prints_rows(monkeypatch: pytest.MonkeyPatch):
    """A family's cases have error, speed and shares of the machine's limits."""
    result = nas("bench", "--kernels", "--families", "rope", "--threads", 1, "--seconds", 0.1, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    [made] = found["rows"]
    assert (made["family"], made["status"], made["threads"]) == ("rope", "ok", 1)
    assert 0 < made["max_error"] <= kernel_bench.TOLERANCES["float32"]
    assert made["peak_fraction"] == pytest.approx(made["gflops"] / made["fma_peak_gflops"])
    assert made["ratio"] == pytest.approx(made["eager_ms"] / made["ours_ms"])
    assert found["fma_peak_gflops"] == made["fma_peak_gflops"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a model, or --suite, or --kernels"),
        (("--suite", "cpu", "--kernels"), "--suite cpu and --kernels"),
        (("--suite", "cpo"), "did you mean 'cpu'"),
        (("--suite", "cpu", "--models", "vit-tny"), "did you mean 'vit-tiny'"),
        (("--suite", "cpu", "--isa", "avx3"), "did you mean 'avx2'"),
        (("--suite", "cpu", "--resume"), "nothing to resume"),
        (("--suite", "cpu", "--from", "missing.jsonl"), "cannot read the results"),
        (("--suite", "cpu", "--against", "openvno"), "did you mean 'openvino'"),
        (("--kernels", "--families", "gem"), "did you mean 'gemm'"),
    ],
)
def test_bench_bad_input_is_named(arguments: tuple[str, ...], message: str):
    """Nothing is measured before the options are right."""
    result = nas("bench", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


@pytest.mark.parametrize(
    ("threads", "peak", "single", "lacking"),
    [(2, 200.0, 118.0, False), (2, 118.0, 118.0, True), (1, 60.0, 118.0, False), (2, 118.0, None, False)],
)
def test_row_without_a_cpu_for_each_thread_is_known(threads: int, peak: float, single: float | None, lacking: bool):
    """Two threads that do the multiply-adds of one had one CPU; a slow machine alone is no such case."""
    assert lacks_cpus(row(threads=threads, fma_peak_gflops=peak), single) is lacking
