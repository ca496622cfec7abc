"""What tuning a model would add to what the tuning database knows."""

from __future__ import annotations

import pytest

import nas
from codegen import lower, targets
from codegen.tuning import Record, TuningDatabase
from nas.objectives.base import Context
from nas.objectives.tuning_cost import TuningCost


@pytest.fixture
def context(monkeypatch, tmp_path):
    """Give the smallest model of a space, with an empty tuning database of its own."""
    monkeypatch.setenv("NAS_TUNING_DIR", str(tmp_path))
    space = nas.load_space("tiny_lm")
    return Context(space.smallest(), nas.get_task("char_lm", seq_len=32), threads=1)


def test_tuning_cost_counts_kernels_without_a_record(context):
    """Each kernel with alternatives counts once; a record takes it away."""
    first = TuningCost().evaluate(context)
    target = targets.get("cpu", threads=1)
    kernels = {call.kernel.key: call.kernel for call in lower.lower(context.graph("test"), target).calls}
    open_ones = [kernel for kernel in kernels.values() if len(kernel.knob_space(target.isa)) > 1]
    assert first.value == len(open_ones) > 1
    assert first.details["kernels"] == len(kernels)
    assert first.details["choices"] == sum(len(kernel.knob_space(target.isa)) for kernel in open_ones)
    known = open_ones[0]
    knobs = known.knobs(target.isa)
    TuningDatabase.for_target(target).add(Record(known.key, target.fingerprint, "ok", knobs, 1.0, 1.0))
    assert TuningCost().evaluate(context).value == first.value - 1


def test_tuning_cost_is_no_matter_of_proposals():
    """What is asked before a trial must not depend on a database that grows."""
    objective = TuningCost(max=4, batch=2)
    assert not objective.cheap
    assert objective.bounds == (None, 4)
    assert objective.settings == {"batch": 2}
