"""Every component of the registry, compiled: the kernels give what torch gives.

By default one case of each component; all cases, forms and streaming steps are slow.
"""

from __future__ import annotations

import numpy as np
import pytest

from codegen import targets
from codegen.compile import compile_graph
from codegen.reference import TOLERANCE
from ir.component import ChannelMixer, Norm, TokenMixer
from ir.graph import Graph
from nas.checks.subjects import Subject, random_inputs, random_params, run, subjects

EVERYTHING = subjects(
    "token_mixer", "channel_mixer", "norm", "reducer", "transition", "stem", "conditioner", "head", "block"
)
MIXERS = [subject for subject in EVERYTHING if isinstance(subject.component, TokenMixer)]
CAUSAL = [subject for subject in MIXERS if subject.mixer.is_causal]
WITH_FORMS = [subject for subject in MIXERS if subject.mixer.forms]
TOKENWISE = [subject for subject in EVERYTHING if isinstance(subject.component, ChannelMixer | Norm)]
TARGET = targets.get("cpu", threads=2)
MAX_LEN = 9  # tokens that a streaming state holds


def each(subjects: list[Subject]) -> pytest.MarkDecorator:
    """Run a test on every subject."""
    return pytest.mark.parametrize("subject", subjects, ids=[subject.name for subject in subjects])


def check(graph: Graph) -> None:
    """Compile, which runs the result on random inputs and holds it against torch."""
    params = {name: array.astype(np.float32) for name, array in random_params(graph).items()}
    error = compile_graph(graph, params, TARGET).verification_error
    assert error is not None
    assert error <= TOLERANCE


@each([subject for subject in EVERYTHING if subject.name.endswith(("-0", "-0-both"))])
def test_component_compiles(subject: Subject) -> None:
    """The first case of each component agrees with torch."""
    check(subject.graph())


@pytest.mark.slow
@each(EVERYTHING)
def test_every_case_compiles(subject: Subject) -> None:
    """Every case of every component agrees with torch, at its own odd sizes."""
    check(subject.graph())


@pytest.mark.slow
@each([*MIXERS, *TOKENWISE])
def test_one_token_compiles(subject: Subject) -> None:
    """A single sequence of a single token."""
    graph = subject.resized(batch=1, time=1).graph()
    if not np.abs(run(graph, random_params(graph), random_inputs(graph))).max() > 1e-12:
        pytest.skip("the output is zero but for rounding, as of one token less the mean of itself: no scale to err by")
    check(graph)


@pytest.mark.slow
@each(CAUSAL)
def test_every_step_compiles(subject: Subject) -> None:
    """One token of a causal mixer, from a random state at a random position."""
    check(subject.step_graph(MAX_LEN))


@pytest.mark.slow
@each(WITH_FORMS)
def test_every_form_compiles(subject: Subject) -> None:
    """How training computes a recurrence does not change what is compiled."""
    for form in subject.mixer.forms:
        check(subject.with_form(form).graph())
