"""The machine's limits: the kernels do the work that they count. No claim about any time."""

from __future__ import annotations

import numpy as np

from codegen import _tvm, roofline, targets
from codegen.machine import available_cpus


def test_roofline_has_a_peak_and_a_bandwidth():
    """Both are positive and finite at any number of threads."""
    for threads in {1, len(available_cpus())}:
        limits = roofline.make_probe(targets.get("cpu", threads=threads)).measure()
        assert 0 < limits.fma_peak_gflops < float("inf")
        assert 0 < limits.copy_gbs < float("inf")


def test_roofline_multiplies_and_adds_in_every_chain():
    """With factor 1 and addend 1 each chain counts the operations that it did, so none was left out."""
    isa = targets.get("cpu", threads=1).isa
    target = _tvm.Target(targets.get("cpu", threads=1).to_tvm())
    library = _tvm.compile_functions({"fma": roofline._write_fma(isa)}, target)
    sums = _tvm.device_array(np.zeros((1, isa.lanes), np.float32))
    library["fma"](_tvm.device_array(np.ones(2, np.float32)), sums)
    operations = 2 * isa.lanes * (sums.numpy()[0, 0] - sum(range(roofline._CHAINS)))
    assert operations == roofline._fma_flops(isa)


def test_roofline_copies_everything():
    """The copy kernel writes all that it counts, on one thread and on two."""
    for threads in {1, min(2, len(available_cpus()))}:
        target = targets.get("cpu", threads=threads)
        library = _tvm.compile_functions({"copy": roofline._write_copy(target.isa)}, _tvm.Target(target.to_tvm()))
        source = np.arange(roofline._COPY_BYTES // 4, dtype=np.float32)
        copied = _tvm.device_array(np.zeros_like(source))
        library["copy"](_tvm.device_array(source), copied)
        np.testing.assert_array_equal(copied.numpy(), source)
