"""Streams of a loaded artifact: states, forks, and what is refused."""

import numpy as np
import pytest

from codegen import runtime
from codegen.streaming import State
from ir.errors import InputError
from tests.codegen.test_museum import FOLDER, load, runs_here

pytestmark = runs_here
TOKENS = np.random.default_rng(0).integers(0, 11, (1, 8), np.int32)
TOLERANCE = 1e-5  # float32: the same sums in another order


@pytest.fixture(scope="module")
def model() -> runtime.LoadedModel:
    """A recurrence over tokens, with `forward` and `step`."""
    return load("v1_step")


def test_steps_hand_on_a_state_that_stays_as_it_was(model: runtime.LoadedModel):
    """Each call gives a new state, and an old one can be taken up again."""
    first, one = model.step(TOKENS[:, :1])
    second, two = model.step(TOKENS[:, 1:2], state=one)
    again, _ = model.step(tokens=TOKENS[:, 1:2], state=one)
    assert (one.position, two.position) == (1, 2)
    assert isinstance(second, np.ndarray)
    np.testing.assert_array_equal(second, again)
    np.testing.assert_allclose(
        np.concatenate([np.asarray(first), np.asarray(second)], 1), np.asarray(model(TOKENS))[:, :2], atol=TOLERANCE
    )


def test_stream_forks_and_feeds(model: runtime.LoadedModel):
    """A fork goes its own way; feeding some tokens is stepping through them."""
    stream = model.stream()
    stream.feed(TOKENS[:, :3])
    fork = stream.fork()
    left, right = np.asarray(stream.step(TOKENS[:, 3:4])), np.asarray(fork.step(TOKENS[:, 4:5]))
    assert (stream.position, fork.position) == (4, 4)
    assert not np.array_equal(left, right)
    np.testing.assert_allclose(left, np.asarray(model(TOKENS))[:, 3:4], atol=TOLERANCE)


def test_stream_refuses_what_does_not_fit(model: runtime.LoadedModel):
    """Two tokens at once, a token out of range, another model's state, an unknown input, an artifact without a step."""
    for tokens, message in ((TOKENS[:, :2], "shape"), (TOKENS[:, :1] + 11, "range"), (TOKENS[0, :1], "shape")):
        with pytest.raises(InputError, match=message):
            model.step(tokens)
    with pytest.raises(InputError, match="state"):
        model.step(TOKENS[:, :1], state=State(1, {"other": np.zeros(3, np.float32)}))
    with pytest.raises(InputError, match="no such input"):
        model.step(token=TOKENS[:, :1])
    with pytest.raises(InputError, match="reads tokens"):
        model.stream().feed(np.zeros((1, 0), np.int32))
    with pytest.raises(InputError, match="--step"):
        load("v1_plain").stream()
    assert (FOLDER / "v1_plain.nas").exists()


def test_model_names_its_functions(model: runtime.LoadedModel):
    """What the caller gives is told apart from what is carried."""
    step = model.functions["step"]
    assert [spec.name for spec in step.given] == ["tokens"]
    assert step.carried == ("state.memory",)
    assert (step.position, model.prefill_lengths) == ("position", ())
