"""`nas keygen`, `nas sign` and `nas verify` on files of the museum, whole and damaged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from nas.cli.app import app
from tests.codegen.artifact_mutations import MUTATIONS
from tests.codegen.test_museum import FOLDER, runs_here

pytestmark = runs_here


def nas(*arguments: object) -> Result:
    """Run the program."""
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(argument) for argument in arguments])


def test_signed_file_is_verified_with_its_key(tmp_path: Path):
    """A pair of keys is made, a file signed, and demanded to be."""
    path = tmp_path / "model.nas"
    shutil.copy(FOLDER / "v1_step.nas", path)
    assert nas("keygen", tmp_path / "alice").exit_code == 0
    assert "not signed" in nas("verify", path, "--key", tmp_path / "alice.pub").stderr
    signed = json.loads(nas("sign", path, "--key", tmp_path / "alice.key", "--json").stdout)
    assert len(signed["public_key"]) == 64
    verified = nas("verify", path, "--key", tmp_path / "alice.pub")
    assert verified.exit_code == 0
    assert "signature: made with the private key" in verified.stdout
    shown = nas("show", path).stdout
    assert "forward" in shown and "step" in shown and "1 array(s), from call to call" in shown


@pytest.mark.parametrize("seed", range(20))
def test_damaged_file_ends_with_the_usual_error(seed: int, tmp_path: Path):
    """Whatever was done to it, verification passes or the error is one of ours and names the file."""
    rng = np.random.default_rng(seed)
    path = tmp_path / "damaged.nas"
    path.write_bytes(MUTATIONS[seed % len(MUTATIONS)]((FOLDER / "v1_plain.nas").read_bytes(), rng))
    done = nas("verify", path)
    assert done.exit_code == 0 or (done.exit_code == 2 and f"error: {path}: " in done.stderr), done.output
