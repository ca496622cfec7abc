"""Writes the museum: files of the artifact format's version 1, which later versions have to read.

Run once for each version of the format, `python -m tests.codegen.make_museum`; what is there is never written again.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from codegen import signing, targets
from codegen.artifact import Artifact
from codegen.compile import Source, compile_functions
from ir.builder import Builder
from ir.graph import Graph
from ir.initializers import initialize
from ir.types import Axis

FOLDER = Path(__file__).parents[1] / "golden" / "artifacts"
WIDTH, VOCABULARY = 8, 11
TARGET = targets.get("cpu:sse", threads=1)


def dense() -> Graph:
    """`sum = x @ w`, `positive = relu(sum)`."""
    b = Builder()
    x = b.input("x", (2, WIDTH))
    y = b.matmul(x, b.parameter("w", ((Axis("in", WIDTH),), (Axis("out", WIDTH),)), "normal(1)"))
    return b.build(sum=y, positive=b.relu(y))


def recurrent(tokens: int, *, step: bool = False) -> Graph:
    """A gated recurrence over embedded tokens x: s = a s + (1 - a) x, a = sigmoid(gate x)."""
    b = Builder()
    width, vocabulary = Axis("width", WIDTH), Axis("vocabulary", VOCABULARY)
    given = b.input("tokens", (1, tokens), "int32")
    position = b.input("position", (), "int32") if step else None
    x = b.take(b.parameter("embedding", ((vocabulary,), (width,)), "normal(1)"), given)
    a = b.sigmoid(x * b.parameter("gate", ((width,),), "normal(1)"))
    u = (1.0 - a) * x
    if position is None:
        return b.build(y=b.linear_scan(a, u))
    after = a * b.input("state.memory", (1, 1, WIDTH)) + u
    return b.build(**{"y": after * 1.0, "state.memory": after})


def plain() -> Artifact:
    """One function, two outputs."""
    return compile_functions({"forward": Source(dense())}, initialize(dense(), 0), TARGET)


def streaming() -> Artifact:
    """`forward` and `step`."""
    sources = {"forward": Source(recurrent(8)), "step": Source(recurrent(1, step=True), "step")}
    return compile_functions(sources, initialize(recurrent(8), 1), TARGET)


def bucketed() -> Artifact:
    """`forward` for two lengths, and a member that no version of the reader knows."""
    axes = {"tokens": (None, "seq_len"), "y": (None, "seq_len", None)}
    sources = {
        "forward": Source(recurrent(4), axes=axes, padded=["seq_len"]),
        "forward_t9": Source(recurrent(9), axes=axes, padded=["seq_len"]),
    }
    made = compile_functions(sources, initialize(recurrent(4), 2), TARGET)
    return replace(made, extras={"notes/for-people.txt": b"Nothing reads this.\n"})


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    plain().save(FOLDER / "v1_plain.nas")
    streaming().save(FOLDER / "v1_step.nas")
    signed = bucketed().save(FOLDER / "v1_signed.nas")
    with tempfile.TemporaryDirectory() as folder:  # the private key is gone after this
        signing.make_keys(Path(folder) / "key", FOLDER / "v1.pub")
        signing.sign(signed, Path(folder) / "key")


def reference(parameters: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """What the recurrence gives for tokens `[1, T]`, in float64."""
    embedding, gate = (parameters[name].astype(np.float64) for name in ("embedding", "gate"))
    states = [np.zeros(WIDTH)]
    for token in tokens[0]:
        x = embedding[token]
        a = 1 / (1 + np.exp(-gate * x))
        states.append(a * states[-1] + (1 - a) * x)
    return np.array(states[1:])[None]


if __name__ == "__main__":
    main()
