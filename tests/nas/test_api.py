"""The Python API: every name is there, loaded when it is used, and errors say what is missing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import nas
from ir.builder import Builder
from ir.errors import InputError
from ir.types import Axis
from nas.testing.spaces import Grid


@pytest.mark.parametrize("name", nas.__all__)
def test_every_public_name_loads(name):
    """`nas.NAME` gives what `__all__` promises, under its own name."""
    value = getattr(nas, name)
    assert value is not None
    assert name in dir(nas)
    if name != "__version__":
        assert value.__name__ == name or name == "get_task"


def test_unknown_name_is_an_attribute_error():
    """A misspelt name fails as in any module."""
    with pytest.raises(AttributeError, match="has no attribute 'serch'"):
        _ = nas.serch  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("module", ["nas.search", "nas.ship"])
def test_importing_a_module_does_not_hide_the_function_of_its_name(module):
    """`nas.search` stays the function whatever was imported before."""
    program = f"import {module}, nas; assert callable(nas.search) and callable(nas.ship), nas.search"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_loading_an_artifact_imports_neither_torch_nor_the_compiler():
    """`nas.load` and its errors need numpy and the TVM runtime only."""
    program = """
import sys, nas
try:
    nas.load("missing.nas")
except nas.ArtifactError as error:
    assert "missing.nas" in str(error)
loaded = {"torch", "tvm", "ray", "pydantic", "networkx", "typer"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_search_and_load_study_agree(tmp_path):
    """The calls of the documentation work together on any space and any function."""

    def cost(point):
        return float(sum(point.choices))

    study = nas.search(
        Grid((3, 3)), objectives=[cost], strategy=nas.Random(), budget=nas.Budget(trials=4), storage=tmp_path, seed=1
    )
    again = nas.load_study(tmp_path)
    assert [trial.values for trial in again.trials] == [trial.values for trial in study.trials]
    assert again.best().values == study.best().values


def test_compile_of_a_trial_without_its_study_is_refused():
    """A trial made by hand has neither weights nor a task; the error says where trials come from."""
    study = nas.search(Grid((2,)), objectives=[lambda_cost], budget=1)
    with pytest.raises(InputError, match="load_study"):
        nas.compile(replace(study.best(), study=None))


def lambda_cost(point):
    return float(point.choices[0])


def test_compile_of_an_architecture_asks_for_a_task():
    """An architecture has inputs and outputs only for a task."""
    with pytest.raises(InputError, match="task"):
        nas.compile(nas.load_space("tiny_vision").smallest())


def test_compile_refuses_what_is_no_model():
    """Anything else is named in the error."""
    with pytest.raises(InputError, match="a trial, an architecture, a graph or an artifact"):
        nas.compile("tiny_vision")  # pyright: ignore[reportArgumentType]


def test_compile_refuses_weights_of_another_shape():
    """Weights are checked by name and shape before anything is compiled."""
    b = Builder()
    x = b.input("x", (2, 4))
    w = b.parameter("w", axes=((Axis("d", 4),), (Axis("e", 3),)))
    graph = b.build(y=b.matmul(x, w))
    with pytest.raises(InputError, match=r"no such weight"):
        nas.compile(graph, weights={})
    with pytest.raises(InputError, match=r"\[4, 3\]"):
        nas.compile(graph, weights={"w": np.zeros((3, 4), np.float32)})


def test_architecture_compiles_saves_loads_and_verifies(tmp_path):
    """From a space to a model that runs, and compiled again it computes the same."""
    space = nas.load_space("tiny_vision")
    artifact = nas.compile(space.smallest(), task=nas.get_task("digits"), threads=1)
    path = artifact.save(tmp_path / "model.nas")
    assert nas.verify(path).max_error <= 1e-5
    again = nas.compile(artifact, threads=1).save(tmp_path / "again.nas")
    image = np.random.default_rng(0).standard_normal((1, 8, 8, 1), np.float32)
    first, second = (np.asarray(nas.load(file)(image)) for file in (path, again))
    np.testing.assert_allclose(first, second, rtol=1e-6)  # the same code, so only the place in memory may differ


def test_type_checkers_see_every_name():
    """What is exported lazily is also imported for type checkers, from the same module."""
    source = importlib.util.find_spec("nas").loader.get_source("nas")  # pyright: ignore
    for name in nas.__all__:
        assert name == "__version__" or f"import {name} as {name}" in source, name
