"""Importing the tool stays cheap: heavy libraries are loaded when they are first needed."""

import subprocess
import sys

import pytest

HEAVY = ("matplotlib", "pydantic", "ray", "sklearn", "torch", "tvm")


def loaded_after(statement: str) -> set[str]:
    """Run `statement` in a fresh interpreter; give the heavy packages that it loaded."""
    program = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return set(process.stdout.splitlines()[-1].split())


def test_import_nas_loads_nothing_heavy() -> None:
    """`import nas` must not pay for libraries that the caller may never use."""
    assert loaded_after("import nas") == set()


def test_import_ir_loads_nothing_heavy() -> None:
    """The graph package stands on numpy and networkx alone."""
    assert loaded_after("import ir.graph") == set()


def test_import_code_workers_loads_nothing_heavy() -> None:
    """A worker is started before torch and TVM are imported, so starting it must import neither."""
    assert loaded_after("import codegen.code_workers") == set()


@pytest.mark.parametrize("statement", ["import nas.cli", "from nas.cli import main"])
def test_import_cli_loads_no_trainer_compiler_or_scheduler(statement: str) -> None:
    """`nas --help` answers at once only if the command line does not load what the commands use."""
    assert not loaded_after(statement) & {"torch", "tvm", "ray"}


def test_help_loads_no_trainer_compiler_or_scheduler() -> None:
    """Printing the help of `nas` and of its main command touches no heavy library."""
    statement = """
import nas.cli
for arguments in (["nas", "--help"], ["nas", "search", "--help"]):
    sys.argv = arguments
    try:
        nas.cli.main()
    except SystemExit as exit:
        assert exit.code in (None, 0), exit.code
"""
    assert not loaded_after(statement) & {"torch", "tvm", "ray"}
