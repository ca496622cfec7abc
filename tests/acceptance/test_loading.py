"""A shipped model needs numpy and the TVM runtime, nothing of what searched, trained and compiled it."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.acceptance.driving import exit_code, search_arguments, write_space

# What the tool depends on, less numpy and TVM; `tvm_ffi` itself asks for torch and goes on without it.
ABSENT = (
    *("torch", "networkx", "pydantic", "yaml", "ray", "sklearn", "scipy", "matplotlib", "typer", "rich", "click"),
    *("psutil", "safetensors", "cloudpickle", "pandas"),
)
LOAD = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ABSENT = set(json.loads(sys.argv[2]))
sys.meta_path.insert(0, Absent())
import numpy as np
import nas

model = nas.load(sys.argv[1])
tokens = np.arange(16, dtype=np.int32).reshape(1, 16)
logits = model(tokens)
assert not ABSENT & {name.partition(".")[0] for name in sys.modules}
np.save(sys.argv[3], logits)
"""


def test_shipped_model_loads_and_runs_without_the_libraries_that_made_it(tmp_path):
    """`nas.load` of a real search's artifact works with numpy and TVM alone, and computes what torch does."""
    import numpy as np
    import torch

    from codegen.torch_backend import to_module
    from nas.search import load_study
    from nas.ship import load_weights

    folder = tmp_path / "run"
    assert exit_code(search_arguments(write_space(tmp_path), folder, "--objective", "quality", trials=1)) == 0
    study = load_study(folder)
    [trial] = study.pareto_front()
    assert trial.artifact is not None
    saved = tmp_path / "logits.npy"
    command = [sys.executable, "-c", LOAD, str(folder / trial.artifact), json.dumps(ABSENT), str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits = np.load(saved)
    graph = study.evaluator.context(trial.architecture).graph("test")
    module = to_module(graph, load_weights(study, trial, graph)).eval()
    with torch.inference_mode():
        expected = module(tokens=torch.arange(16, dtype=torch.int32).reshape(1, 16))["logits"].numpy()
    # Float32 sums in another order, relative to the scale of the output: the bound that artifacts are verified with.
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
