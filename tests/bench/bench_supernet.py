"""How well and at what cost a supernet ranks: python tests/bench/bench_supernet.py --task char_lm --json

A supernet of five or six kinds of token mixers is trained, and 16 random architectures alone; Kendall's tau between the
two scores is printed with its 95 % interval. The cost is the processor time of a forward and backward pass of the
sandwich over that of a step of the largest models, each trained alone. One architecture is then compared on its slice
of the shared weights, as a plain model with copies of them, and compiled.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codegen import runtime, targets
from codegen.compile import compile_graph
from codegen.torch_backend import to_module
from nas import tasks
from nas.supernet.audit import Audit, audit_supernet, draw_anchors
from nas.supernet.module import Supernet
from nas.supernet.sandwich import Sandwich, draw_largest
from nas.supernet.train import train_supernet
from nas.tasks.base import Task
from nas.training.budget import Budget, TrainOptions
from nas.training.fit import fit, make_predictor
from searchspaces.space import Space

ANCHORS = 16
GOAL_TAU, GOAL_COST = 0.6, 1.5
LARGEST_MODELS, LARGEST_STEPS = 12, 10

TASKS: dict[str, dict[str, Any]] = {
    "char_lm": {"seq_len": 64},
    "mqar": {"seq_len": 16, "vocab_size": 16, "num_pairs": 3},
}
STEPS = {"char_lm": (500, 200), "mqar": (1000, 400)}
"""Steps of the supernet and of each model alone."""
OPTIONS = {
    "char_lm": TrainOptions(batch_size=16, learning_rate=3e-3),
    "mqar": TrainOptions(batch_size=64, learning_rate=5e-3),
}


MIXERS = {
    "char_lm": ("linear_attention", "softmax_attention", "retention", "gated_linear_attention"),
    "mqar": ("linear_attention", "softmax_attention", "retention"),
}
"""Kinds beside pooling and convolution. Recall begins after a plateau, the later the more kinds share the weights."""
DEPTHS = {"char_lm": 3, "mqar": 2}


def make_space(task: str) -> Space:
    """The space of one task: mixers from pooling to attention, two widths, up to two or three layers."""
    heads = {"num_heads": {"choice": [1, 2]}}
    return Space.from_dict(
        {
            "schema": 1,
            "name": f"supernet_{task}",
            "model": {
                "task": task,
                "seq_len": TASKS[task]["seq_len"],
                "d_model": {"choice": [32, 64]},
                "depth": {"range": [1, DEPTHS[task], 1]},
                "position": "none",
                "norm": "rms_norm",
            },
            "block": {
                "token_mixer": {
                    "per_layer": True,
                    "choice": [
                        "pooling",
                        {"depthwise_conv": {"kernel_size": {"choice": [3, 4]}}},
                        *({mixer: heads} for mixer in MIXERS[task]),
                    ],
                },
                "channel_mixer": {"choice": ["none", {"mlp": {"expansion": {"choice": [2.0, 4.0]}}}]},
            },
        }
    )


def seconds_of_largest(space: Space, task: Task, options: TrainOptions, seed: int) -> float:
    """Mean processor seconds of a step of the largest models of random kinds, each trained alone."""
    rng = np.random.default_rng(seed)
    models = [draw_largest(space, rng) for _ in range(LARGEST_MODELS)]
    modules = [to_module(model.graph(task.signature, batch=options.batch_size), seed=seed) for model in models]
    started = time.process_time()
    for module in modules:
        fit(module, task, Budget(steps=LARGEST_STEPS), seed=seed, options=options)
    return (time.process_time() - started) / (LARGEST_MODELS * LARGEST_STEPS)


def compare_forms(supernet: Supernet, space: Space, task: Task, seed: int) -> dict[str, Any]:
    """Outputs of one architecture sliced, extracted and compiled."""
    architecture = draw_anchors(space, 1, seed=seed + 1)[0]
    params = supernet.extract(architecture)
    batch = task.train_batch(np.random.default_rng(seed), supernet.batch)
    sliced = make_predictor(supernet.subnet(architecture), task)(batch.inputs)
    graph = architecture.graph(task.signature, batch=supernet.batch)
    extracted = make_predictor(to_module(graph, params), task)(batch.inputs)
    with tempfile.TemporaryDirectory(prefix="nas-bench-") as folder:
        path = Path(folder) / "subnet.nas"
        compile_graph(graph, params, targets.get("cpu")).save(path)
        compiled = runtime.load(path)(*batch.inputs.values())
    return {
        "architecture": str(architecture),
        "sliced_equals_extracted": bool(np.array_equal(sliced, extracted)),
        "compiled_largest_error": float(np.abs(np.asarray(compiled) - extracted).max()),
        "largest_output": float(np.abs(extracted).max()),
    }


def measure(name: str, steps: int, alone_steps: int, seed: int, sandwich: Sandwich) -> dict[str, Any]:
    """Train everything for one task and return the figures."""
    space, task, options = make_space(name), tasks.get(name, **TASKS[name]), OPTIONS[name]
    started = time.process_time()
    supernet = train_supernet(space, task, steps, seed=seed, options=options, sandwich=sandwich)
    pass_s = (time.process_time() - started) / (steps * sandwich.passes)
    largest_s = seconds_of_largest(space, task, options, seed)
    anchors = draw_anchors(space, ANCHORS, seed=seed)
    budget = Budget(steps=alone_steps)
    audit = audit_supernet(supernet, task, anchors, budget, seed=seed, options=options, threshold=GOAL_TAU)
    return {
        "task": name,
        "seed": seed,
        "supernet_steps": steps,
        "alone_steps": alone_steps,
        "architectures": space.size(),
        "tau": audit.tau,
        "interval": audit.interval,
        "supernet": audit.supernet,
        "alone": audit.alone,
        "pass_ms": pass_s * 1e3,
        "largest_step_ms": largest_s * 1e3,
        "cost": pass_s / largest_s,
        **compare_forms(supernet, space, task, seed),
        "audit": str(audit),
    }


def show(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    audit = Audit(result["supernet"], result["alone"], result["tau"], result["interval"], GOAL_TAU)
    equal = "equal" if result["sliced_equals_extracted"] else "DIFFERENT"
    print(f"{result['task']}: {audit}")
    print(
        f"  cost of a pass {result['cost']:.2f} of a step of the largest models "
        f"({result['pass_ms']:.1f} and {result['largest_step_ms']:.1f} ms of processor time; goal at most {GOAL_COST})"
    )
    error, scale = result["compiled_largest_error"], result["largest_output"]
    print(f"  sliced and extracted: {equal}; compiled differs by {error:.1e} of at most {scale:.2g}")


def main() -> None:
    """Measure the tasks asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=tuple(TASKS), action="append", help="one or both; by default char_lm")
    parser.add_argument("--steps", type=int, help="updates of the supernet")
    parser.add_argument("--alone-steps", type=int, help="updates of each model alone")
    parser.add_argument("--distill", type=float, default=Sandwich().distill)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.task or ["char_lm"]:
        steps, alone = options.steps or STEPS[name][0], options.alone_steps or STEPS[name][1]
        result = measure(name, steps, alone, options.seed, Sandwich(distill=options.distill))
        print(json.dumps(result), flush=True) if options.json else show(result)


if __name__ == "__main__":
    main()
