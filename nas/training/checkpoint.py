"""A training that stopped on its way: everything it needs to go on as if it had not, as bytes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from ir.errors import StorageError

_ADAM = ("exp_avg", "exp_avg_sq", "step")
_WEIGHT = "weight:"


@dataclass(frozen=True)
class Done:
    """How far a training is.

    Attributes:
        steps: Updates done.
        seconds: Time spent in them.
        points: Step, loss and learning rate of each point of the history.
    """

    steps: int = 0
    seconds: float = 0.0
    points: tuple[tuple[int, float, float], ...] = ()


def write(module: nn.Module, optimizer: torch.optim.Optimizer, rng: np.random.Generator, progress: Done) -> bytes:
    """Return the state of a training.

    Args:
        module: The weights; no two share memory.
        optimizer: AdamW over the module's parameters.
        rng: Generator of the batches.
        progress: How far it is.
    """
    tensors = {f"{_WEIGHT}{name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{moment}:{name}": state[moment] for moment in _ADAM if moment in state}
    metadata = {"progress": json.dumps(asdict(progress)), "rng": json.dumps(rng.bit_generator.state)}
    return save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata)


def read(data: bytes, module: nn.Module, optimizer: torch.optim.Optimizer, rng: np.random.Generator) -> Done:
    """Put the state of a training in place, and return how far it is.

    Args:
        data: What `write` returned.
        module: Whose weights are overwritten.
        optimizer: Whose state is.
        rng: Whose state is.

    Raises:
        StorageError: The bytes are damaged, or of another model.
    """
    try:
        tensors = load(data)
        metadata = _metadata(data)
        weights = {name.removeprefix(_WEIGHT): value for name, value in tensors.items() if name.startswith(_WEIGHT)}
        module.load_state_dict(weights)
        for name, parameter in module.named_parameters():
            state = {moment: tensors[f"{moment}:{name}"] for moment in _ADAM if f"{moment}:{name}" in tensors}
            if state:
                optimizer.state[parameter] = state
        rng.bit_generator.state = json.loads(metadata["rng"])
        found = json.loads(metadata["progress"])
        return Done(found["steps"], found["seconds"], tuple(tuple(point) for point in found["points"]))
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise StorageError(
            "the state of a training that was to go on cannot be read",
            expected="the checkpoint of this trial",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            hint="remove the checkpoint from the trial's folder to train the trial from its start",
        ) from error


def _metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file, whose header is JSON behind its length in eight bytes."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]
