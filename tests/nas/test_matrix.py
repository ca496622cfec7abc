"""The matrix of models, targets and formats: which cells there are, what each says, and what the program returns."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

import nas
from codegen import machine, targets
from codegen.formats import Exported
from ir.builder import Builder
from ir.errors import InputError, TargetUnavailable
from nas import matrix
from nas.checks.zoo import zoo_names
from nas.cli.app import app
from nas.matrix import Column
from tests.codegen.onnx_cases import needs_runtime
from tests.nas import faulty_cells

ONNX = Column("onnx", "onnx", None)
LIMIT = 1e-4  # of the output's scale: what every target and format has to keep


def run(*arguments: object):
    """Run `nas compile` in this process."""
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["compile", *map(str, arguments)])


def test_columns_are_targets_and_other_formats():
    """A target is a column, as an artifact; one that is not here says why; other formats are a column each."""
    found = {column.name: column for column in matrix.columns()}
    assert set(matrix.TARGETS) <= set(found)
    assert found["cpu"] == Column("cpu", "nas", "cpu")
    assert found["onnx"] == ONNX
    assert matrix.columns(["cpu"], ["nas", "onnx"]) == [Column("cpu", "nas", "cpu"), ONNX]
    assert matrix.columns(formats=["onnx"]) == [ONNX]


def test_unavailable_target_is_a_column_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    """It is said, not left out, and no cell is filled for it."""

    def absent(name: str) -> None:
        raise TargetUnavailable("not in this version", where="target", found=name)

    monkeypatch.setattr(targets, "get", absent)
    (column,) = matrix.columns(["metal"], ["nas"])
    assert column == Column("metal", "nas", "metal", "TargetUnavailable: not in this version: target: metal")
    assert dict(matrix.fill(["zoo/swin"], [column])) == {"zoo/swin": []}


def test_unknown_names_are_refused():
    """Models, targets and formats that nobody knows are answered with the nearest."""
    assert matrix.models() == list(zoo_names())
    assert matrix.models("zoo/swin, zoo/mamba") == ["zoo/swin", "zoo/mamba"]
    with pytest.raises(InputError, match="did you mean 'zoo/swin'"):
        matrix.models("zoo/swim")
    with pytest.raises(InputError, match="did you mean 'onnx'"):
        matrix.columns(formats=["onxx"])
    with pytest.raises(InputError, match="unknown target"):
        matrix.columns(["gpu9000"])


def test_each_cell_says_what_happened(monkeypatch: pytest.MonkeyPatch):
    """A crash, a hang and an error cost one cell; what is refused with a reason is no failure."""
    monkeypatch.setattr(matrix, "write", faulty_cells.write)
    names = ["fine", "crash", "hang", "stumble", "refuse", "absent", "differ", "fine again"]
    rows = dict(matrix.fill(names, [ONNX, Column("off", "nas", "off", "not here")], limit_s=3.0))
    assert list(rows) == names
    cells = {name: cell for name, (cell,) in rows.items()}
    assert [cell.status for cell in cells.values()] == [
        *("pass", "fail", "fail", "fail", "refused", "refused", "fail", "pass")
    ]
    assert (cells["fine"].error, cells["fine"].size_bytes) == (2e-7, 4)
    assert "SIGABRT" in cells["crash"].reason
    assert "ran out of time" in cells["hang"].reason
    assert cells["stumble"].reason == "KeyError: 'Value(node=3, index=0)'"
    assert cells["refuse"].reason == "InputError: this format has no place for it: the model"
    assert cells["differ"].reason == "VerificationError: it disagrees with torch: output y: 0.5"
    assert str(cells["differ"]).startswith("fail: ")


def test_rows_side_by_side_keep_their_order_and_their_cpus(monkeypatch: pytest.MonkeyPatch):
    """A slow row holds up no other, is printed in its place, and each job has CPUs of its own."""
    monkeypatch.setattr(matrix, "write", faulty_cells.write)
    jobs, names = min(2, len(machine.available_cpus())), ["slow", "cpus", "fine", "cpus"]
    rows = list(matrix.fill(names, [ONNX], jobs=jobs))
    assert [name for name, _ in rows] == names
    assert {cell.status for _, cells in rows for cell in cells} == {"pass"}
    counted = {cell.size_bytes for name, (cell,) in rows if name == "cpus"}
    assert counted <= {len(machine.available_cpus()[job::jobs]) for job in range(jobs)}
    with pytest.raises(InputError, match="a CPU of its own"):
        next(matrix.fill(names, [ONNX], jobs=len(machine.available_cpus()) + 1))


def test_rows_end_with_their_reader(monkeypatch: pytest.MonkeyPatch):
    """Whoever stops reading, be it by an interrupt, does not wait for cells that hang."""
    monkeypatch.setattr(matrix, "write", faulty_cells.write)
    rows = matrix.fill(["fine", "hang", "hang"], [ONNX, ONNX])
    assert next(rows)[0] == "fine"
    rows.close()  # would take half an hour


def test_program_prints_rows_and_fails_with_a_cell(monkeypatch: pytest.MonkeyPatch):
    """A line for each row and each column's sum; the exit code tells whether a cell failed."""
    monkeypatch.setattr(matrix, "write", faulty_cells.write)
    monkeypatch.setattr(matrix, "models", lambda text: ["fine", *text.split(",")])
    passed = run("refuse", "--matrix", "--formats", "onnx")
    assert passed.exit_code == 0, passed.output
    assert passed.stdout.splitlines() == [
        "fine    onnx pass 2e-07",
        "refuse  onnx refused: InputError: this format has no place for it: the model",
        "onnx: 1 of 2 pass, at most 2.0e-07 from torch",
    ]
    failed = run("differ", "--matrix", "--formats", "onnx", "--json")
    assert failed.exit_code == 1
    report = json.loads(failed.stdout)
    assert (report["passed"], report["of"]) == (1, 2)
    assert [cell["status"] for cell in report["cells"]] == ["pass", "fail"]
    assert report["columns"] == [{"name": "onnx", "format": "onnx", "target": None, "unavailable": ""}]


@pytest.mark.parametrize("column", ["onnx", pytest.param("cpu", marks=pytest.mark.slow)])
def test_small_model_passes_in_a_real_cell(column: str):
    """The smallest published architecture, as ONNX and as an artifact."""
    options = ("--formats", "onnx") if column == "onnx" else ("--formats", "nas", "--targets", column)
    done = run("zoo/ltsf-linear", "--matrix", *options, "--json")
    assert done.exit_code == 0, done.output
    cells = json.loads(done.stdout)["cells"]
    assert [(cell["column"], cell["status"]) for cell in cells] == [(column, "pass")]
    assert all(cell["error"] is None or cell["error"] <= LIMIT for cell in cells)


def test_program_writes_onnx(tmp_path: Path):
    """`--format onnx` writes a checked file and says how far it is from torch, or that it was not run."""
    path = tmp_path / "model.onnx"
    done = run("tiny_vision", "--pick", "smallest", "--format", "onnx", "-o", path, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["format"], facts["files"]) == ("onnx", [str(path)])
    assert facts["unverified"] or facts["verification_error"] <= LIMIT
    onnx.checker.check_model(str(path))
    assert [value.name for value in onnx.load(str(path)).graph.input] == ["image"]


@needs_runtime
def test_program_writes_the_step_beside(tmp_path: Path):
    """A language model streams; one of images does not, and says so."""
    path = tmp_path / "model.onnx"
    done = run("tiny_lm", "--pick", "smallest", "--seq-len", 16, "--format", "onnx", "--step", "-o", path)
    assert done.exit_code == 0, done.output
    assert "of the output's scale" in done.stdout
    names = [value.name for value in onnx.load(str(tmp_path / "model.step.onnx")).graph.input]
    assert names[:2] == ["tokens", "position"]
    refused = run("tiny_vision", "--format", "onnx", "--step", "-o", tmp_path / "other.onnx")
    assert refused.exit_code == 2
    assert "stream" in refused.output
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which model?"),
        (("tiny_vision", "--format", "onxx"), "did you mean 'onnx'"),
        (("tiny_vision", "--format", "onnx", "-O3"), "only artifacts are tuned"),
        (("tiny_vision", "--format", "onnx", "-o", "."), "a folder"),
        (("tiny_vision", "--step"), "can stream"),
        (("tiny_vision", "--formats", "onnx"), "--matrix"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, ...], message: str):
    """Exit code 2 and a message, before any work."""
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert message in refused.output


def test_api_writes_a_graph(tmp_path: Path):
    """`nas.export` takes what `nas.compile` takes; a graph has no step of its own."""
    b = Builder()
    graph = b.build(y=b.exp(b.input("x", (2, 3))))
    exported = nas.export(graph, tmp_path / "graph.onnx")
    assert isinstance(exported, Exported)
    assert exported.path.is_file()
    with pytest.raises(InputError, match="only one function of this model"):
        nas.export(graph, tmp_path / "step.onnx", step=True)


@needs_runtime
@pytest.mark.slow
@pytest.mark.parametrize("name", zoo_names())
def test_published_architecture_is_onnx(name: str, tmp_path: Path):
    """Whole and, where it streams, step by step, as torch to 1e-4."""
    facts = matrix.write(name, "onnx", None, str(tmp_path))
    assert facts["verification_error"] <= LIMIT
