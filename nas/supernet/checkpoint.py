"""A supernet on disk: one safetensors file, written whole or not at all, that a later process goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ir.errors import InputError, StorageError
from ir.files import replace_file
from ir.types import Axis, axes_shape
from nas.supernet.module import Supernet
from nas.supernet.store import ParameterStore, Slot

FORMAT_VERSION = 1
_ADAM = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Checkpoint:
    """A file's content.

    Attributes:
        step: Updates done.
        settings: What decides the training.
        store: Where the parameters of architectures lie.
        tensors: Arrays by the store's keys; the optimiser's as `exp_avg:KEY` and so on.
    """

    step: int
    settings: Mapping[str, Any]
    store: ParameterStore
    tensors: Mapping[str, Tensor]


def write_checkpoint(
    path: Path, supernet: Supernet, optimizer: torch.optim.Optimizer, step: int, settings: Mapping[str, Any]
) -> None:
    """Write weights and the optimiser's state, in place of an older file.

    Args:
        path: The file; its folder is made.
        supernet: The weights.
        optimizer: Its optimiser.
        step: Updates done.
        settings: What decides the training, as JSON.

    Raises:
        StorageError: It cannot be written.
    """
    tensors = {key: tensor.detach() for key, tensor in (*supernet.weights.items(), *supernet.buffers.items())}
    for key, weight in supernet.weights.items():
        state = optimizer.state.get(weight, {})
        tensors |= {f"{name}:{key}": state[name] for name in _ADAM if name in state}
    slots = [asdict(slot) for slot in supernet.store.slots.values()]
    metadata = {"format": str(FORMAT_VERSION), "step": str(step), "slots": json.dumps(slots)}
    metadata["settings"] = json.dumps(settings, sort_keys=True)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    try:
        replace_file(path, data)
    except OSError as error:
        raise StorageError("the supernet cannot be written", where=str(path), found=str(error.strerror)) from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what `write_checkpoint` wrote.

    Raises:
        StorageError: It is no such file, or one of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if metadata["format"] != str(FORMAT_VERSION):
            raise KeyError(f"format {metadata['format']}")
        store = ParameterStore(_read_slot(slot) for slot in json.loads(metadata["slots"]))
        if any(tuple(tensors[key].shape) != axes_shape(slot.axes) for key, slot in store.slots.items()):
            raise ValueError("an array of another shape than its axes say")
        return Checkpoint(int(metadata["step"]), json.loads(metadata["settings"]), store, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StorageError(
            "not a supernet that this version reads",
            where=str(path),
            expected=f"a file that training a supernet wrote, format {FORMAT_VERSION}",
            found=f"{type(error).__name__}: {error}",
            hint="remove the file to train the supernet anew",
        ) from error


def check_settings(recorded: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """Refuse the supernet of another space, task or training.

    Args:
        recorded: Settings of the file.
        given: Settings that are asked for.
        where: The file, for the message.

    Raises:
        InputError: They differ; the message names in what.
    """
    names = [name for name in {**recorded, **given} if recorded.get(name) != given.get(name)]
    if names:
        raise InputError(
            f"this file holds a supernet with another {' and another '.join(names)}",
            where=where,
            expected="; ".join(f"{name} {recorded.get(name)}" for name in names),
            found="; ".join(f"{name} {given.get(name)}" for name in names),
            hint="give the recorded settings, or remove the file to train the supernet anew",
        )


def restore(checkpoint: Checkpoint, supernet: Supernet, optimizer: torch.optim.Optimizer, where: str) -> None:
    """Put a checkpoint's arrays in place of a supernet's and its optimiser's.

    Args:
        checkpoint: What was read.
        supernet: Whose weights are overwritten.
        optimizer: Whose state is.
        where: The file, for the message.

    Raises:
        StorageError: The components have changed since it was written.
    """
    if checkpoint.store.slots != supernet.store.slots:
        raise StorageError(
            "this supernet was made by a version with other components",
            where=where,
            hint="remove the file to train the supernet anew",
        )
    with torch.no_grad():
        for key, tensor in (*supernet.weights.items(), *supernet.buffers.items()):
            tensor.copy_(checkpoint.tensors[key])
    for key, weight in supernet.weights.items():
        state = {name: checkpoint.tensors[f"{name}:{key}"] for name in _ADAM if f"{name}:{key}" in checkpoint.tensors}
        if state:
            optimizer.state[weight] = state


def _read_slot(data: Mapping[str, Any]) -> Slot:
    axes = tuple(tuple(Axis(axis["name"], axis["size"]) for axis in factors) for factors in data["axes"])
    return Slot(data["key"], data["label"], axes, data["init"], data["trained"])
