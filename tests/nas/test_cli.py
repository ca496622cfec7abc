"""The command line: exit codes, one clear message for each error, JSON alone on stdout, progress, resuming."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ir.errors import ArtifactError, InputError, StorageError, TargetUnavailable
from nas.budget import Budget
from nas.callbacks import Callback
from nas.cli import doctor as doctor_module
from nas.cli import output as output_module
from nas.cli.app import app
from nas.cli.options import parse_threads
from nas.cli.search import make_objective, parse_constraint
from nas.objectives.custom import Custom
from nas.progress import SearchProgress, ShippingProgress
from nas.search import load_study, search
from nas.storages.journal import read_journal
from nas.summary import format_count, format_duration, format_value, mixers
from nas.testing.spaces import Grid
from tests.nas.synthetic_run import write_run

VERBS = ("search", "show", "list", "compile", "bench", "verify", "report", "doctor")
COUNTED = ("--objective", "params", "--objective", "flops", "--no-ship")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Give a run folder with made-up results."""
    return str(write_run(tmp_path_factory.mktemp("run"), trials=6))


def nas(*arguments):
    """Run the program in this process."""
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(argument) for argument in arguments])


def nas_json(*arguments):
    """Run a verb with --json; give what stdout holds, all of it parsed."""
    result = nas(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def start(*arguments, **options):
    """Start the program in a process of its own."""
    command = [sys.executable, "-m", "nas", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_help_names_every_verb_and_no_argument_shows_it():
    """`nas` alone and `nas --help` list the verbs; each verb explains itself."""
    shown = nas("--help")
    assert shown.exit_code == 0
    assert all(verb in shown.stdout for verb in VERBS)
    assert "search" in nas().output
    for verb in VERBS:
        assert nas(verb, "--help").exit_code == 0, verb


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serch",), "No such command"),
        (("search",), "Missing argument"),
        (("search", "tiny_lm", "--trials", "0"), "--trials"),
        (("search", "tiny_lm", "--trails", "3"), "No such option"),
        (("list", "nothing"), "nothing"),
        (("search", "no_such_space"), "there is no search space"),
        (("search", "tiny_lm", "--strategy", "nsga3"), "did you mean 'nsga2'"),
        (("search", "tiny_lm", "--strategy", "random", "--population", "4"), "no option 'population'"),
        (("search", "tiny_lm", "--executor", "slurm"), "one of ray, serial"),
        (("search", "tiny_lm", "--workers", "2"), "add --executor ray"),
        (("search", "tiny_lm", "--objective", "qality"), "did you mean 'quality'"),
        (("search", "tiny_lm", "--constraint", "params<20e6"), "NAME<=NUMBER"),
        (("search", "tiny_lm", "--constraint", "parms<=20e6"), "did you mean 'params'"),
        (("search", "tiny_lm", "--constraint", "params<=many"), "a number such as 20e6"),
        (("search", "tiny_lm", "--constraint", "latency>=2"), "an upper bound"),
        (("search", "tiny_lm", "--steps", "3", "--tokens", "9"), "exactly one limit"),
        (("search", "tiny_lm", "--data", "no_such_file"), "no_such_file"),
        (("search", "tiny_lm", "--hours", "-1"), "a positive number"),
        (("search", "tiny_lm", "--target", "gpu"), "unknown target"),
        (("search", "tiny_lm", "--cold-cache"), "only the cache of a GPU"),
        (("show", "tiny_lm", "--pick", "bigest", "--ir"), "did you mean 'largest'"),
        (("show", "tiny_lm", "--trial", "1"), "only a run has trials"),
        (("show", "missing.nas"), "cannot read the artifact"),
        (("show", "missing.json"), "cannot read the graph"),
        (("show", "."), "this folder holds no run"),
        (("compile", "tiny_lm", "-O2"), "-O1 or -O3"),
        (("compile", "tiny_vision", "-o", "."), "the artifact must be a file"),
        (("bench", "missing.nas", "--against", "eagre"), "did you mean 'eager'"),
        (("bench", "missing.nas", "--threads", "two"), "such as 1,2"),
        (("verify", "missing.nas"), "cannot read the artifact"),
        (("report", "missing"), "this folder holds no run"),
    ],
)
def test_bad_input_exits_2_with_one_message_and_writes_nothing(arguments, message, tmp_path, monkeypatch):
    """Whatever the user got wrong is said once, on stderr, without a traceback; no file or folder appears."""
    monkeypatch.chdir(tmp_path)
    result = nas(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_missing_target_exits_3(tmp_path):
    """A target that cannot be measured here has an exit code of its own, and the message names the ways out."""
    result = nas("search", "tiny_lm", "--target", "arm64", "--out", tmp_path / "run")
    assert result.exit_code == TargetUnavailable.exit_code == 3
    assert all(way in result.stderr for way in ("cannot be measured", "--device", "--latency predicted"))
    assert not (tmp_path / "run").exists()


def test_errors_leave_json_output_empty(tmp_path):
    """A program that reads stdout gets JSON or nothing."""
    result = nas("show", tmp_path, "--json")
    assert (result.exit_code, result.stdout) == (2, "")


def test_unwritable_place_exits_1(tmp_path):
    """What is neither input nor target is 1."""
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    result = nas("search", "tiny_vision", *COUNTED, "--out", blocker / "run")
    assert result.exit_code == StorageError.exit_code == 1, result.output


def test_debugging_shows_the_traceback(monkeypatch):
    """NAS_DEBUG=1 lets the error through."""
    monkeypatch.setenv("NAS_DEBUG", "1")
    assert isinstance(nas("verify", "missing.nas").exception, ArtifactError)


def test_search_prints_its_front_as_json_and_in_words(tmp_path):
    """JSON has the agreed shape and is alone on stdout; the table and what to type next are on stderr."""
    out = tmp_path / "run"
    arguments = ("search", "tiny_vision", *COUNTED, "--trials", 3, "--strategy", "random", "--out", out)
    result = nas(*arguments, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert set(data) == {"run", "front", "certain", "possible", "unsettled", "trials"}
    assert data["certain"] == [entry["trial"] for entry in data["front"]]
    assert data["possible"] == []
    assert data["run"] == str(out)
    assert data["trials"] == {"finished": 3, "failed": 0, "infeasible": 0}
    for entry in data["front"]:
        keys = {"trial", "values", "units", "source", "interval", "remeasured", "hash", "artifact", "status"}
        assert set(entry) == keys
        assert entry["source"] == {"params": "counted", "flops": "counted"}
    assert "Pareto front" in result.stderr
    assert f"report {out}" in result.stderr
    again = nas(*arguments)
    assert again.exit_code == 0
    assert "resuming" in again.stderr
    assert "Pareto front" in again.stdout
    assert len([record for record in read_journal(out) if record["event"] == "finished"]) == 3


def test_search_goes_on_with_more_trials_and_refuses_another_study(tmp_path):
    """The same folder takes more trials; other settings are bad input and say what differs."""
    base = ("search", "tiny_vision", *COUNTED, "--out", tmp_path / "run", "--quiet")
    assert nas_json(*base, "--trials", 2)["trials"]["finished"] == 2
    result = nas(*base, "--trials", 4, "--json")
    assert json.loads(result.stdout)["trials"]["finished"] == 4
    assert "finished in" not in result.stderr
    other = nas(*base, "--trials", 4, "--seed", 1)
    assert other.exit_code == 2
    assert "another seed" in other.stderr


def test_search_passes_its_options_on(tmp_path):
    """What the journal records is what the command said."""
    arguments = ("--objective", "params", "--constraint", "params<=90e3", "--strategy", "nsga2", "--population", 4)
    nas_json("search", "tiny_vision", *arguments, "--no-ship", "--trials", 2, "--seed", 7, "--out", tmp_path)
    settings = read_journal(tmp_path)[0]["settings"]
    assert settings["seed"] == 7
    assert settings["strategy"]["population"] == 4
    assert [(item["name"], item["max"]) for item in settings["constraints"]] == [("params", 300000), ("params", 90000)]
    assert all(trial.values["params"] <= 90e3 for trial in load_study(tmp_path).trials)


def test_search_with_an_empty_front_says_why(tmp_path):
    """When every trial fails, the reasons are shown instead of a table."""
    arguments = ("--objective", "quality", "--no-ship", "--steps", 1, "--trials", 1, "--out", tmp_path)
    result = nas("search", "tiny_vision", *arguments, "--constraint", "quality>=0.999", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["front"] == []
    assert "The front is empty: 1 infeasible" in result.stderr
    assert "is below" in result.stderr


@pytest.mark.parametrize("text", ["params<=20e6", " params <= 2e7 "])
def test_constraint_reads_name_sign_and_number(text):
    """Blanks do not matter, and exponents are numbers."""
    bound = parse_constraint(text)
    assert (bound.name, bound.bounds) == ("params", (None, 20e6))


def test_constraint_on_latency_is_in_milliseconds():
    """Both spellings bound the median."""
    assert parse_constraint("latency<=5").bounds == (None, 5.0)
    assert parse_constraint("latency_ms<=5") == parse_constraint("latency<=5")
    assert parse_constraint("quality>=0.5").bounds == (0.5, None)
    assert parse_constraint("latency<=5", batch=8).settings == {"batch": 8}


def test_objectives_take_the_options_that_concern_them():
    """Training goes to quality, the batch to latency."""
    assert make_objective("quality", {"steps": 3, "tokens": None, "seconds": None}).settings == {"steps": 3}
    assert make_objective("latency", {}, batch=4).settings == {"batch": 4}
    assert make_objective("params", {"steps": 3}).settings == {}


def test_threads_are_a_list():
    """`1,2` is two comparisons, nothing is one on all CPUs."""
    assert parse_threads("1,2") == [1, 2]
    assert parse_threads(None) == [None]
    with pytest.raises(InputError, match="--threads"):
        parse_threads("0")


@pytest.mark.parametrize("kind", ["components", "zoo", "targets", "tasks", "strategies", "objectives", "executors"])
def test_list_gives_a_table_and_json(kind):
    """Every entry has a name, in both forms."""
    entries = nas_json("list", kind)
    assert entries
    shown = nas("list", kind).stdout
    assert all(entry["name"] in shown for entry in entries)


def test_list_components_knows_options_and_aliases():
    """A component's entry says what a space may set."""
    entries = {(entry["kind"], entry["name"]): entry for entry in nas_json("list", "components")}
    mamba = entries["token_mixer", "mamba"]
    assert mamba["aliases"] == {"s6": {}}
    assert mamba["options"]["state_dim"]["default"] == 16
    assert "swiglu" in entries["channel_mixer", "glu"]["aliases"]


def test_show_space_gives_axes_size_and_profile():
    """What a space costs is known before anything is trained."""
    data = nas_json("show", "tiny_lm")
    assert data["architectures"] > 1_000_000
    assert {"model.d_model", "model.depth"} <= {axis["path"] for axis in data["axes"]}
    assert list(data["profile"]) == ["min", "centroid", "max"]
    assert data["profile"]["min"]["params"] < data["profile"]["max"]["params"]
    assert all(corner["state_bytes"] > 0 for corner in data["profile"].values())
    text = nas("show", "tiny_lm").stdout
    assert "architectures" in text
    assert "state bytes" in text


def test_show_ir_prints_a_graph_that_parses():
    """The text form of a sample reads back."""
    from ir.text import parse_graph

    [entry] = nas_json("show", "tiny_vision", "--ir", "--pick", "3")["graphs"]
    assert parse_graph(entry["text"]).inputs.keys() == {"image"}


def test_show_after_each_pass_prints_the_graph_on_its_way():
    """From components to what kernels are chosen for, one graph after each pass."""
    graphs = nas_json("show", "tiny_vision", "--after-each-pass", "--pick", "smallest")["graphs"]
    assert [entry["after"] for entry in graphs][:2] == ["components", "expand_components"]
    assert "component" in graphs[0]["text"]
    assert "component" not in graphs[-1]["text"]


def test_show_kernels_names_a_kernel_for_every_call():
    """Each row says what serves which nodes."""
    kernels = nas_json("show", "tiny_vision", "--kernels", "--pick", "smallest", "--threads", 1)["kernels"]
    assert kernels
    assert all(kernel["kernel"] and kernel["nodes"] for kernel in kernels)


def test_show_run_gives_the_front_and_one_trial(run):
    """A run folder shows what a search printed, and any of its trials."""
    assert nas_json("show", run)["trials"] == {"finished": 5, "failed": 1, "infeasible": 0}
    assert nas_json("show", run, "--trial", 1)["architecture"]["stages"]
    failed = nas("show", run, "--trial", 4)
    assert failed.exit_code == 2
    assert "NonFiniteLoss" in failed.stderr
    assert nas("show", run, "--trial", 99).exit_code == 2


def test_report_prints_where_it_is(run, tmp_path):
    """The paths are the output."""
    data = nas_json("report", run, "-o", tmp_path)
    assert data["report"] == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()


def test_bench_of_a_run_without_artifacts_is_bad_input(run):
    """There is nothing to time; the hint says how to get it."""
    result = nas("bench", run)
    assert result.exit_code == 2
    assert "no artifact" in result.stderr


def test_compile_verify_show_and_bench_one_model(tmp_path):
    """From a space to an artifact, and everything that takes one."""
    path = tmp_path / "model.nas"
    common = ("--pick", "smallest", "--threads", 1)
    compiled = nas_json("compile", "tiny_vision", *common, "-o", path, "-O1")
    assert compiled["verification_error"] <= 1e-4
    assert compiled["latency"]["median_ms"] > 0
    assert nas_json("verify", path)["ok"] is True
    assert nas_json("show", path)["latency"]["threads"] == 1
    assert nas_json("show", path, "--kernels")["kernels"]
    shown = nas("show", path)
    assert "float32[1, 8, 8, 1]" in shown.stdout
    [result] = nas_json("bench", path, "--against", "eager", "--threads", "1", "--seconds", "0.5")["results"]
    assert result["results"]["eager"]["status"] == "ok"
    assert result["threads"] == 1
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    refused = nas("verify", path)
    assert refused.exit_code == 2
    assert "damaged" in refused.stderr


def test_compile_takes_a_precision(tmp_path):
    """Products of the artifact are in bfloat16, and a precision that does not exist is refused."""
    path = tmp_path / "model.nas"
    common = ("compile", "tiny_vision", "--pick", "smallest", "--threads", 1, "--no-measure", "-o", path)
    assert nas_json(*common, "--precision", "bfloat16")["verification_error"] <= 2e-2
    kernels = [record["kernel"] for record in nas_json("show", path, "--kernels")["kernels"]]
    assert all("precision=bfloat16" in kernel for kernel in kernels if kernel.startswith("gemm"))
    refused = nas(*common, "--precision", "bf16")
    assert refused.exit_code != 0
    assert "float32 or bfloat16" in refused.stderr


def test_search_ships_verified_artifacts_of_its_front(tmp_path):
    """Each point of the front has a file with trained weights that passes its self-test."""
    arguments = ("--steps", 1, "--trials", 1, "--threads", 1, "--quiet", "--out", tmp_path)
    data = nas_json("search", "tiny_vision", "--objective", "quality", *arguments)
    [entry] = data["front"]
    assert entry["artifact"] == str(tmp_path / "artifacts" / "trial_0.nas")
    assert nas_json("verify", entry["artifact"])["ok"] is True
    assert nas_json("compile", tmp_path, "-o", tmp_path / "again.nas", "--no-measure", "--threads", 1)["hash"]


def test_doctor_tells_what_is_wrong(monkeypatch):
    """A wrong version of a pinned library is a failure with the command that mends it, and exit code 1."""
    monkeypatch.setattr(doctor_module, "_wanted", lambda: {"torch": "0.0.1"})
    result = nas("doctor", "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["ok"] is False
    [torch] = [check for check in data["checks"] if check["name"] == "torch"]
    assert (torch["status"], torch["hint"]) == ("fail", "pip install torch==0.0.1")


def test_doctor_compares_with_the_pins_of_the_project():
    """The exact versions come from the project's own metadata."""
    wanted = doctor_module._wanted()
    assert set(wanted) >= {"torch", "apache-tvm", "apache-tvm-ffi"}


def test_doctor_without_a_compiler_names_what_to_install(monkeypatch):
    """The hint fits the system's package manager, or names none."""
    found = {"apt-get": "/usr/bin/apt-get"}
    monkeypatch.setattr(doctor_module.shutil, "which", found.get)
    assert doctor_module._compiler().hint == "apt install g++"
    found.clear()
    assert "package manager" in doctor_module._compiler().hint


def test_doctor_survives_generated_code_that_dies():
    """What fails in the trial build is told by its last line."""
    dead = subprocess.CompletedProcess([], -11, stdout="", stderr="something\nIllegal instruction\n")
    check = doctor_module._builds(run=lambda *_args, **_options: dead)
    assert (check.status, check.found) == ("fail", "Illegal instruction")


def test_libraries_that_print_do_not_spoil_json(capfd):
    """With JSON wanted, the descriptor itself leads to stderr until the data is written."""
    with output_module.output(True) as out:
        os.write(1, b"noise from a library\n")
        print("noise from Python")
        out.data({"a": 1})
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"a": 1}
    assert "noise from a library" in captured.err
    assert "noise from Python" in captured.err


def test_next_command_is_one_that_works(monkeypatch, tmp_path):
    """A program that is not on the path is named by its path, `python -m nas` as such."""
    installed = tmp_path / "nas"
    installed.write_text("")
    monkeypatch.setattr(output_module.shutil, "which", lambda _name: None)
    for called, expected in (
        (str(installed), str(installed)),
        ("/x/nas/__main__.py", "python -m nas"),
        ("pytest", "nas"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        assert output_module.program() == expected
    monkeypatch.setattr(output_module.shutil, "which", lambda _name: str(installed))
    monkeypatch.setattr(sys, "argv", [str(installed)])
    assert output_module.program() == "nas"


def lowest(point):
    return float(point.choices[0])


def test_progress_as_lines_says_what_runs_what_is_best_and_what_is_left(tmp_path):
    """Without a terminal every trial has its lines."""
    stream = io.StringIO()
    ticks = iter(range(1000))
    progress = SearchProgress(Console(file=stream, width=100), Budget(trials=3), clock=lambda: float(next(ticks)))
    search(Grid((5,)), objectives=[Custom(lowest, unit="m")], budget=3, callbacks=[progress], storage=tmp_path)
    lines = stream.getvalue().splitlines()
    assert sum("of 3 finished" in line for line in lines) == 3
    assert any("best: lowest" in line and "left" in line for line in lines)
    assert "left" not in lines[-1]


def test_progress_as_lines_keeps_quiet_between_steps_of_training():
    """Each stage has one line, and a long one a line now and then."""
    stream = io.StringIO()
    now = [0.0]
    progress = SearchProgress(Console(file=stream, width=100), Budget(trials=1), clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 0.25
        progress.on_stage(0, f"training {step}/100, loss 1.0")
    assert len(stream.getvalue().splitlines()) == 3


def test_progress_on_a_terminal_redraws_and_leaves_results():
    """A terminal gets bars, and the result of each trial above them."""
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True)
    progress = SearchProgress(console, Budget(trials=2))

    class Stages(Callback):
        def on_trial(self, study, trial):
            progress.on_stage(trial.number, "training 3/10, loss 2.5")

    search(Grid((5,)), objectives=[lowest], budget=2, callbacks=[progress, Stages()])
    shipping = ShippingProgress(console)
    shipping.on_stage(1, "compiling")
    shipping.on_notice("a notice")
    shipping.close()
    text = stream.getvalue()
    assert text.count("finished in") == 2
    assert "best so far: lowest" in text
    assert "a notice" in text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.53214, "ms", "0.5321 ms"), (1_234_567.0, "", "1.23 M"), (8450, "bytes", "8.45 kB"), (12, "bytes", "12 B")],
)
def test_values_are_written_to_the_digits_that_matter(value, unit, text):
    """Four digits of a measurement, three of a count."""
    assert format_value(value, unit) == text


def test_counts_and_durations_are_short():
    """Letters for powers of a thousand, clocks for longer times."""
    assert [format_count(count) for count in (7, 32_900, 329_472, 1.5e9)] == ["7", "32.9 k", "329 k", "1.50 G"]
    assert [format_duration(seconds) for seconds in (42, 185, 7385)] == ["42 s", "3:05", "2:03:05"]


def test_mixers_count_runs_of_equal_layers():
    """A model is named by its token mixers from the input on."""
    layers = [{"token_mixer": {name: {}}} for name in ("mamba", "mamba", "pooling")]
    assert mixers({"stages": [{"layers": layers}, {"layers": layers[:1]}]}) == "2 mamba + pooling | mamba"


def test_interrupted_search_exits_130_and_goes_on(tmp_path):
    """Ctrl-C ends with 130, keeps what was finished, and the same command completes the study."""
    out = tmp_path / "run"
    arguments = ("search", "tiny_vision", *COUNTED, "--strategy", "random", "--out", out)
    process = start(*arguments, "--trials", 100_000)
    journal = out / "journal.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and '"finished"' in journal.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "the same command goes on" in stderr
    assert stdout == ""
    done = load_study(out).count()["finished"]
    assert done >= 1
    data = nas_json(*arguments, "--quiet", "--trials", done + 1)
    assert data["trials"]["finished"] == done + 1


def test_reader_that_goes_away_is_no_fault(tmp_path):
    """`nas list components | head` ends without a message."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "nas", "list", "components", "--json"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(reading)
    os.close(writing)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr == ""


def test_fault_of_the_program_is_short_unless_debugging():
    """What no one expected is one line that names the way to see more."""
    program = "import sys; sys.argv = ['nas', 'doctor']; import nas.cli.doctor as d\n"
    program += "d.run_checks = lambda: 1 / 0\nfrom nas.cli import main\nmain()"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ZeroDivisionError")
    assert "NAS_DEBUG=1" in process.stderr
    assert "Traceback" not in process.stderr
