"""What every test gets: bounded threads, fixed seeds, a private cache folder and golden files."""

import gc
import os

gc.disable()  # until all tests are imported, see pytest_collection_finish
# Read once, when numpy, torch and tvm are imported. Tests run side by side, so libraries get a thread each; kernels get
# two, between which they may race.
for _variable, _threads in {"OMP": 1, "MKL": 1, "OPENBLAS": 1, "TVM": 2}.items():
    os.environ[f"{_variable}_NUM_THREADS"] = str(_threads)
os.environ["GOMP_SPINCOUNT"] = "5000"  # threads that spin while they wait starve the tests beside them
os.environ["MPLBACKEND"] = "Agg"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # ray warns about a coming default otherwise

import difflib
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
SEED = 0
CACHE = pytest.StashKey[tempfile.TemporaryDirectory[str]]()

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--update-golden` and `--kills`."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the code gives now")
    parser.addoption("--kills", type=int, default=3, help="how often a search with Ray workers is killed (slow tests)")


def pytest_configure(config: pytest.Config) -> None:
    """Point the tool's cache at a folder of this session, so that tests neither see nor change the user's."""
    cache = tempfile.TemporaryDirectory(prefix="nas-test-cache-", ignore_cleanup_errors=True)
    config.stash[CACHE] = cache
    os.environ["NAS_CACHE_DIR"] = cache.name


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the session's cache folder."""
    config.stash[CACHE].cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the few files that take longest; skip tests marked `cuda`, with the reason, without a device."""
    items.sort(key=lambda item: item.path.parent.name != "acceptance" and item.path.name != "test_docs.py")
    if Path("/dev/nvidiactl").exists():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def pytest_collection_finish() -> None:
    """Spare collections of garbage the modules that the tests import: they took half a minute of the whole run."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def seed_everything() -> None:
    """Start every test from the same seeds."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 (libraries under test may draw from the global generator)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Give `golden(name, text)`: compare `text` with `tests/golden/<name>`, or rewrite it under `--update-golden`."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if not text.endswith("\n"):
            text += "\n"
        if request.config.getoption("update_golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"no golden file {name}; write it with: pytest --update-golden", pytrace=False)
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            lines = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), f"golden/{name}", "this run", lineterm=""
            )
            difference = "\n".join(lines)
            pytest.fail(f"{difference}\nIf the change is meant: pytest --update-golden", pytrace=False)

    return check
