"""README.md and docs/*.md hold: their blocks run, their tables equal the registries, their links lead somewhere.

Blocks of a page run in order, in a folder of their own. A comment before a block says how it is held:

- `<!-- measured -->`: console output whose figures depend on the machine; words with a digit may be any such word, rows
  of trials may be missing, and lines may go on.
- `<!-- without torch -->`: the Python block runs in a fresh process where nothing but numpy and TVM can be imported.
- `<!-- malformed -->`: a YAML file that the page shows an error of.

What each language means:

- `python`: executed, one namespace a page; one that begins with `# file: NAME` is written to that file instead.
- `yaml`: `# NAME.yaml` on the first line is a file; anything else is laid over the page's last space and must be valid.
- `console`: `$ nas ...` is run and its output compared, where `...` stands for any lines; `$` with another program
  is not run.
- `text`: what the Python block right before it prints.
- `toml`: `# pyproject.toml`; its entry points are installed as pip would, for the length of the page.
"""

import contextlib
import importlib
import io
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import tomli

import nas.cli
from codegen.measure import Latency
from nas.cli.app import app
from searchspaces import registry, schema
from searchspaces.space import Space, load_space
from searchspaces.yaml_source import read_yaml

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
LANGUAGES = ("python", "yaml", "console", "text", "toml")
MARKS = ("measured", "without torch", "malformed")
NOT_RUN = ("make", "pip", "pytest", "source")
BAD_INPUT = 2

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- ([\w ]+) -->\n\Z")

# What is needed to train and compile; `tvm` itself stays findable, because its folder holds the runtime.
_BLOCK_HEAVY = """
import sys

class Blocker:
    HEAVY = {"matplotlib", "networkx", "pydantic", "ray", "rich", "safetensors", "sklearn", "torch", "typer", "yaml"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.HEAVY:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    mark: str
    place: str

    @property
    def file(self) -> str | None:
        """Name on its first line, if it is to be a file."""
        found = re.match(r"# (?:file: )?([\w./-]+\.(?:py|yaml|toml|txt|csv))\n", self.text)
        return found[1] if found and (self.language != "python" or self.text.startswith("# file: ")) else None


def blocks_of(page: Path) -> list[Block]:
    """Give the fenced blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for fence in _FENCE.finditer(text):
        mark = _MARK.search(text, 0, fence.start())
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(fence[1], fence[2], mark[1] if mark else "", f"{page.name}:{line}"))
    return found


class Page:
    """Runs the blocks of one page."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch
        self._names: dict[str, Any] = {"__name__": "page"}
        self._space: dict[str, Any] = {}
        self._printed: str | None = None

    def run(self, block: Block) -> None:
        """Run a block, or compare with what the one before printed."""
        printed, self._printed = self._printed, None
        if block.language == "text":
            if printed is not None:
                compare(block, block.text, printed)
        elif block.language == "toml":
            self._install(tomli.loads(block.text))
        elif block.file:
            path = self._folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            if block.language == "yaml" and block.mark != "malformed":
                load_space(path)
                self._space = read_yaml(path).data
        elif block.language == "yaml":
            self._lay_over(block)
        elif block.language == "console":
            for command, expected in commands_of(block):
                self._run_command(block, command, expected)
        else:
            self._printed = self._run_python(block)

    def _run_python(self, block: Block) -> str:
        if block.mark == "without torch":
            script = _BLOCK_HEAVY + block.text
            ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=self._folder)
            assert ended.returncode == 0, f"{block.place}\n{ended.stderr}"
            return ended.stdout
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream):
            exec(compile(block.text, block.place, "exec"), self._names)
        return stream.getvalue()

    def _run_command(self, block: Block, command: str, expected: str) -> None:
        program, *arguments = shlex.split(command, comments=True)
        if program in NOT_RUN:
            return
        assert program == "nas", f"{block.place}: {command}"
        code, out, err = run_nas(arguments, self._monkeypatch)
        if expected.startswith("error:"):
            assert code == BAD_INPUT, f"{block.place}: {command} ended with {code}\n{err}"
            compare(block, expected, err)
            return
        assert code == 0, f"{block.place}: {command} ended with {code}\n{err}"
        compare(block, expected, out)

    def _lay_over(self, block: Block) -> None:
        """Check that the page's space with a fragment in place of its own keys is valid."""
        path = self._folder / "fragment.yaml"
        path.write_text(block.text, encoding="utf-8")
        space = {**self._space}
        for section, value in read_yaml(path).data.items():
            own = space.get(section)
            space[section] = {**own, **value} if isinstance(own, dict) and isinstance(value, dict) else value
        Space.from_dict(space)

    def _install(self, project: dict[str, Any]) -> None:
        """Make entry points known as an installed package does: by a folder of metadata on the path."""
        name, version = project["project"]["name"], project["project"]["version"]
        metadata = self._folder / f"{name}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines: list[str] = []
        for group, points in project["project"]["entry-points"].items():
            lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
        (metadata / "entry_points.txt").write_text("\n".join(lines))
        self._monkeypatch.syspath_prepend(str(self._folder))
        forget_installed()


def forget_installed() -> None:
    """Let the registry look for entry points anew."""
    registry.default_registry.cache_clear()
    registry._installed_entry_points.cache_clear()  # pyright: ignore[reportPrivateUsage]
    importlib.invalidate_caches()


def run_nas(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """Run the program in this process; give its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["nas", *arguments])
    out, err = io.StringIO(), io.StringIO()
    previous = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            nas.cli.main()
    finally:
        signal.signal(signal.SIGTERM, previous)
    code = ended.value.code
    return code if isinstance(code, int) else 0, out.getvalue(), err.getvalue()


def commands_of(block: Block) -> list[tuple[str, str]]:
    """Split a console block into commands and the output of each."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not parts[0].strip(), f"{block.place}: a console block begins with `$ `"
    pairs = (part.partition("\n") for part in parts[1:])
    return [(command, output) for command, _, output in pairs]


def lines_of(text: str) -> list[str]:
    """Give the lines of output that say something, runs of spaces and the rules of tables left out."""
    lines = (" ".join(line.replace("─", " ").split()) for line in text.splitlines())
    return [line for line in lines if line]


def compare(block: Block, expected: str, found: str) -> None:
    """Hold output against what the page shows: exactly, or by its words where it is measured."""
    wanted, given = lines_of(expected), lines_of(found)
    message = f"{block.place} shows\n{expected}\nbut this was printed\n{found}"
    if block.mark == "measured":
        wanted = [line for line in map(mask_figures, wanted) if not line.startswith("#")]
        given = [mask_figures(line) for line in given]
    elif "..." not in wanted:
        assert wanted == given, message
    rest = iter(given)
    for line in wanted:
        is_there = line == "..." or any(printed.startswith(line) for printed in rest)
        assert is_there, f"no line {line!r}\n{message}"


def mask_figures(line: str) -> str:
    """Put `#` in place of every word that has a digit."""
    return " ".join("#" if re.search(r"\d", word) else word for word in line.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_docs_blocks_run_and_print_what_they_show(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever types what a page says gets what it shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # worker processes start in another folder than these tests
    runner = Page(tmp_path, monkeypatch)
    try:
        for block in blocks_of(page):
            runner.run(block)
    finally:
        monkeypatch.undo()
        forget_installed()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_docs_blocks_have_a_language_and_known_marks(page: Path) -> None:
    """A block in another language, or with a misspelt mark, would never be checked."""
    for block in blocks_of(page):
        assert block.language in LANGUAGES, block.place
        assert block.mark in ("", *MARKS), block.place
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks_of(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_docs_links_lead_to_files(page: Path) -> None:
    """Links within the repository resolve, and none leads to a machine's own folders."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
    assert not re.search(r"(?<![\w.~-])/(?:home|root|tmp|usr|work)/", text)


def listed(page: Path, heading: str) -> dict[str, set[str]]:
    """Give the rows of the table whose header begins with `heading`: first cell, and the words in backticks."""
    _, _, after = page.read_text(encoding="utf-8").partition(f"| {heading} |")
    rows: dict[str, set[str]] = {}
    for line in after.splitlines()[2:]:
        if not line.startswith("|"):
            break
        first, *others = line.strip("|").split(" | ")
        rows[first.strip(" `")] = set(re.findall(r"`([^`]+)`", " ".join(others)))
    return rows


def test_readme_lists_what_the_registries_hold() -> None:
    """The tables of the README are what `nas list` would print."""
    from nas.cli import list as listing

    text = PAGES[0].read_text(encoding="utf-8")
    for kind in (listing.Kind.components, listing.Kind.zoo):
        written = text.partition(f"<!-- {kind.value}:begin -->\n")[2].partition(f"\n<!-- {kind.value}:end -->")[0]
        assert written == listing._document_table(kind, listing._LISTS[kind]()), (
            f"nas list {kind.value} --into README.md"
        )
    others = {
        "tasks": listing.list_tasks,
        "strategies": listing.list_strategies,
        "objectives": listing.list_objectives,
        "executors": listing.list_executors,
        "targets": listing.list_targets,
        "spaces": listing.list_spaces,
    }
    expected = {name: {entry["name"] for entry in entries()} for name, entries in others.items()}
    assert listed(PAGES[0], "`nas list`") == expected


def test_readme_uses_every_verb() -> None:
    """A verb that the tour leaves out would not be found."""
    text = PAGES[0].read_text(encoding="utf-8")
    verbs = {command.name for command in app.registered_commands}
    assert verbs >= {"search", "show"}
    assert [verb for verb in verbs if f"nas {verb}" not in text] == []


def test_spaces_page_lists_every_key() -> None:
    """The tables of the language are the schema's keys, section by section."""
    page = ROOT / "docs" / "spaces.md"
    text = page.read_text(encoding="utf-8")
    sections = {
        "At the top": schema.SpaceFile,
        "Under `model`": schema.ModelSection,
        "Under `block`": schema.BlockSection,
        "Under `constraints`": schema.ConstraintsSection,
        "Under `training`": schema.TrainingSection,
    }
    for heading, section in sections.items():
        _, _, after = text.partition(f"\n{heading}")
        keys = re.findall(r"^\| `(\w+)` \|", after.partition("\n\n| key")[2].partition("\n\n")[0], re.MULTILINE)
        assert keys == [field.alias or name for name, field in section.model_fields.items()], heading


def test_measurement_page_explains_every_field() -> None:
    """The table of a measurement's record is the record."""
    rows = (ROOT / "docs" / "measurement.md").read_text(encoding="utf-8").partition("| field | meaning |")[2]
    named = [name for row in rows.splitlines() if row.startswith("| `") for name in re.findall(r"`(\w+)`", row)]
    assert named == [field.name for field in fields(Latency)]


def test_readme_names_every_make_target_it_uses() -> None:
    """The commands of the README are in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    used = set(re.findall(r"`make ([\w-]+)`", PAGES[0].read_text(encoding="utf-8")))
    assert {"demo", "test"} <= used
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in used), used


def test_readme_shows_a_finished_demo() -> None:
    """What the README shows of the demo has the parts that a search prints, and more than one point."""
    shown = re.search(r"<!-- demo:begin -->\n```text\n(.*)```\n<!-- demo:end -->", PAGES[0].read_text(), re.DOTALL)
    assert shown
    count = re.match(r"Pareto front: (\d+) of (\d+) trials\n", shown[1])
    assert count
    assert len(re.findall(r"^  runs/demo/artifacts/trial_\d+\.nas$", shown[1], re.MULTILINE)) == int(count[1])
    assert re.split(r"  +", shown[1].splitlines()[2].strip()) == [
        "trial",
        "token mixers",
        "params",
        "quality",
        "latency",
        "compiled vs torch",
        "on the front",
    ]
    assert re.search(r"^  bits_per_byte in bits/byte, lower is better; .*\bbigram \d", shown[1], re.MULTILINE)
    assert re.search(r"^Next:\n  \S*nas bench runs/demo ", shown[1], re.MULTILINE)
