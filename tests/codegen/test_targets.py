"""Targets: found by listing the folder, resolved for this machine, refused with a reason."""

import os

import pytest

from codegen import machine, targets
from codegen.targets import cpu
from ir.errors import InputError, TargetUnavailable

X86_LEVEL_4 = frozenset(
    (
        *("ssse3", "sse4_1", "sse4_2", "popcnt", "avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"),
        *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    )
)
X86_LEVEL_3 = frozenset(flag for flag in X86_LEVEL_4 if not flag.startswith("avx512"))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Patches that pretend another processor; its LLVM name is `pretended`."""
    monkeypatch.setattr(cpu, "_host_mcpu", lambda: "pretended")
    return monkeypatch


def pretend(host: pytest.MonkeyPatch, features: frozenset[str]) -> None:
    """Pretend that the processor has these flags."""
    host.setattr(machine, "cpu_features", lambda: features)


def test_targets_available_lists_folder():
    """A target is a file; helpers are not targets."""
    assert "cpu" in targets.available()
    assert not {"base", "__init__"} & set(targets.available())


def test_target_cpu_uses_every_cpu_and_names_processor():
    """Without options all CPUs of the process are used and LLVM is told the processor."""
    target = targets.get("cpu")
    assert target.threads == target.isa.threads == len(os.sched_getaffinity(0))
    assert target.mcpu not in ("", "generic")
    assert set(target.features) <= machine.cpu_features()
    assert target.to_tvm() == {"kind": "llvm", "mcpu": target.mcpu, "num-cores": target.threads}


@pytest.mark.parametrize(
    ("features", "name", "lanes", "registers"),
    [
        (X86_LEVEL_4, "avx512", 16, 32),
        (X86_LEVEL_4 - {"avx512vl"}, "avx2", 8, 16),
        (X86_LEVEL_3, "avx2", 8, 16),
        (X86_LEVEL_3 - {"fma"}, "sse", 4, 16),
        (frozenset({"asimd", "fp"}), "neon", 4, 32),
    ],
)
def test_target_cpu_picks_widest_complete_instruction_set(
    host: pytest.MonkeyPatch, features: frozenset[str], name: str, lanes: int, registers: int
):
    """The widest set whose every flag is there is taken."""
    pretend(host, features)
    isa = targets.get("cpu", threads=1).isa
    assert (isa.name, isa.lanes, isa.registers, isa.threads) == (name, lanes, registers, 1)


def test_target_cpu_variant_is_portable(host: pytest.MonkeyPatch):
    """A forced level requires the flags of that level only, so the artifact runs on every processor of the level."""
    pretend(host, X86_LEVEL_4 | {"avx512_bf16"})
    native, forced = targets.get("cpu", threads=1), targets.get("cpu:avx2", threads=1)
    assert "avx512_bf16" in native.features
    assert native.mcpu == "pretended"
    assert forced.isa.name == "avx2"
    assert forced.mcpu == "x86-64-v3"
    assert set(forced.features) == X86_LEVEL_3
    assert targets.get("cpu", threads=1, isa="avx2") == forced


def test_target_cpu_variant_that_is_missing_is_unavailable(host: pytest.MonkeyPatch):
    """A level that the processor lacks is a matter of the machine, and another level is offered."""
    pretend(host, X86_LEVEL_3)
    with pytest.raises(TargetUnavailable, match="use cpu:avx2") as caught:
        targets.get("cpu:avx512")
    assert caught.value.exit_code == 3


def test_target_cpu_without_vectors_is_unavailable(host: pytest.MonkeyPatch):
    """A processor of no known kind is refused."""
    pretend(host, frozenset())
    with pytest.raises(TargetUnavailable, match="none of them"):
        targets.get("cpu")


def test_target_fingerprint_tells_targets_apart():
    """Instruction set, processor and threads each change the fingerprint, which is a legal folder name."""
    prints = [targets.get("cpu:avx2", threads=1).fingerprint, targets.get("cpu:sse", threads=1).fingerprint]
    assert len(set(prints)) == 2
    assert prints[0] == "cpu-avx2-x86-64-v3-t1"


@pytest.mark.parametrize(
    ("spec", "hint"),
    [("cqu", "did you mean 'cpu'?"), ("cdua", "did you mean 'cuda'?"), ("cpu:avx521", "'avx512'"), ("", "")],
)
def test_target_unknown_name_is_bad_input(spec: str, hint: str):
    """A misspelt name is bad input, with the nearest right one."""
    with pytest.raises(InputError) as caught:
        targets.get(spec)
    assert caught.value.exit_code == 2
    assert hint in str(caught.value)


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_target_threads_out_of_range_is_bad_input(threads: int):
    """More threads than CPUs would be measured wrongly, fewer than one make no sense."""
    with pytest.raises(InputError, match="threads"):
        targets.get("cpu", threads=threads)


def test_target_conflicting_instruction_sets_are_bad_input():
    """The name and the option may not disagree."""
    with pytest.raises(InputError, match="another"):
        targets.get("cpu:avx2", isa="sse")


def test_machine_describes_itself():
    """The record of a measurement names processor, cores, memory, clocks and versions."""
    facts = machine.describe()
    assert facts["cpu"]
    assert facts["logical_cpus"] >= facts["physical_cores"] >= 1
    assert facts["memory_bytes"] > 0
    assert {"python", "tvm", "tvm_ffi", "numpy", "torch", "nas"} <= set(facts["versions"])
