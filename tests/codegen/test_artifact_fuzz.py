"""Damaged artifacts: whatever was done to a file, it is refused clearly, or it still computes the right outputs."""

from __future__ import annotations

import collections
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from codegen import runtime
from codegen.container import relative_error
from ir.errors import ArtifactError, InputError
from tests.codegen.artifact_mutations import MUTATIONS, pack, unpack
from tests.codegen.test_museum import FOLDER, NAMES, runs_here

DEFAULT_CASES, ALL_CASES = 500, 10_000
KNOWN = {"refused", "right", "other signature"}
TOLERANCE = 2e-5  # twice what the self-test allows: its expected outputs may be off by that, too

pytestmark = runs_here


class Victim:
    """A file of the museum with what it computes."""

    def __init__(self, name: str) -> None:
        path = FOLDER / f"{name}.nas"
        self.data = path.read_bytes()
        self.key = FOLDER / "v1.pub" if name == "v1_signed" else None
        model = runtime.load(path)
        self.inputs = {function: one.example_inputs() for function, one in model.functions.items()}
        self.inputs = {name: {key: array.copy() for key, array in own.items()} for name, own in self.inputs.items()}
        self.outputs = self._compute(model)

    def check(self, path: Path) -> str:
        """Load a damaged copy, and say what became of it; anything but a refusal or the right outputs fails."""
        outcome = self._outcome(path, None)
        if self.key is not None and path.read_bytes() != self.data:
            assert self._outcome(path, self.key) == "refused", "a signature vouched for something else"
        return outcome

    def _outcome(self, path: Path, key: Path | None) -> str:
        try:
            model = runtime.load(path, key=key)
        except ArtifactError as error:
            return "refused" if str(path) in str(error) and error.message else f"unclear: {error}"
        try:
            found = self._compute(model)
        except InputError:  # it says that it takes something else; nothing wrong came out
            return "other signature"
        for name, array in self.outputs.items():
            assert relative_error(found[name], array) <= TOLERANCE, f"wrong output {name}"
        return "right"

    def _compute(self, model: runtime.LoadedModel) -> dict[str, np.ndarray]:
        given = self.inputs["forward"]
        outcome = model(**given)
        found = dict(outcome) if isinstance(outcome, dict) else {"forward": outcome}
        if "step" in self.inputs:
            tokens = np.arange(6, dtype=np.int32)[None]
            fed = model.stream().feed(tokens)
            assert isinstance(fed, np.ndarray)
            found["stream"] = fed
        return found


@pytest.fixture(scope="module")
def victims() -> list[Victim]:
    """The museum's files."""
    return [Victim(name) for name in NAMES]


def run(victims: list[Victim], seeds: range, folder: Path) -> collections.Counter[str]:
    """Damage a file for each seed, and count what became of them."""
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        victim, damage = victims[rng.integers(len(victims))], MUTATIONS[rng.integers(len(MUTATIONS))]
        path = folder / f"{seed}_{damage.__name__}.nas"
        path.write_bytes(damage(victim.data, rng))
        outcomes[victim.check(path)] += 1
        path.unlink()
    return outcomes


def test_damaged_artifacts_are_refused_or_right(victims: list[Victim], tmp_path: Path):
    """Some hundred damaged files; most are refused, and those with a word changed that means nothing are not."""
    outcomes = run(victims, range(DEFAULT_CASES), tmp_path)
    assert set(outcomes) <= KNOWN
    assert outcomes["refused"] > 0.7 * DEFAULT_CASES
    assert outcomes["right"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_damaged_artifacts_are_refused_or_right(victims: list[Victim], tmp_path: Path):
    """Many more of them."""
    outcomes = run(victims, range(DEFAULT_CASES, DEFAULT_CASES + ALL_CASES), tmp_path)
    assert set(outcomes) <= KNOWN
    assert outcomes.total() == ALL_CASES


@pytest.mark.parametrize("byte", [0, 700, -1])
def test_changed_library_is_never_loaded(victims: list[Victim], byte: int, tmp_path: Path, monkeypatch):
    """Not even where the file's own digest fits: the library is held against the manifest before it is loaded."""
    monkeypatch.setattr(runtime, "VirtualMachine", lambda *_: pytest.fail("the library was loaded"))
    members = dict(unpack(victims[0].data))
    library = bytearray(members["library.so"])
    library[byte] ^= 1
    manifest = json.loads(members["manifest.json"])
    manifest["members"]["library.so"]["crc32"] = zlib.crc32(library)  # what a zip checks fits, too
    path = tmp_path / "x.nas"
    changed = {"library.so": bytes(library), "manifest.json": json.dumps(manifest).encode()}
    path.write_bytes(pack(list((members | changed).items())))
    with pytest.raises(ArtifactError, match=r"checksum of library\.so"):
        runtime.load(path)
