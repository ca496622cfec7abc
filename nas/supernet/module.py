"""The supernet in torch: architectures run on parts of shared weights, so that gradients reach what they share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from codegen.torch_backend import to_module
from ir.initializers import Params
from ir.ops.normalization import BatchNorm
from nas.supernet.store import ParameterStore, declared_slots, homes, slice_array
from nas.tasks.base import Evaluation, Task, evaluate
from nas.training.fit import as_tensors, make_predictor
from searchspaces.architecture import Architecture
from searchspaces.signature import Signature

RANKING_BATCHES: Final = 16
"""Batches that scores are told by: the same for all architectures, whose order they decide, not their worth."""

_KEPT_SUBNETS: Final = 64
_CALIBRATION_BATCHES: Final = 32  # a running mean of momentum 0.1 has then forgotten 97 % of where it began
_CALIBRATION_STREAM: Final = 6  # apart from those of training


class Supernet:
    """Weights for every architecture of a space.

    Attributes:
        store: Where the parameters of each architecture lie.
        signature: Inputs and outputs of the models.
        batch: Examples in one call.
        weights: What gradients change, by the store's keys.
        buffers: What they do not.
    """

    def __init__(self, store: ParameterStore, signature: Signature, *, batch: int, values: Params) -> None:
        self.store = store
        self.signature = signature
        self.batch = batch
        tensors = {key: torch.tensor(np.asarray(values[key])) for key in store.slots}
        trained = {key for key, slot in store.slots.items() if slot.trained}
        self.weights = {key: nn.Parameter(tensor) for key, tensor in tensors.items() if key in trained}
        self.buffers = {key: tensor for key, tensor in tensors.items() if key not in trained}
        self._subnets: OrderedDict[Architecture, Subnet] = OrderedDict()

    def subnet(self, architecture: Architecture) -> Subnet:
        """Return an architecture as a module on the shared weights; recent ones are kept.

        Raises:
            InputError: It is not of the space that the supernet was made for.
        """
        if architecture not in self._subnets:
            self._subnets[architecture] = Subnet(self, architecture)
        self._subnets.move_to_end(architecture)
        while len(self._subnets) > _KEPT_SUBNETS:
            self._subnets.popitem(last=False)
        return self._subnets[architecture]

    def extract(self, architecture: Architecture) -> Params:
        """Return copies of an architecture's own weights, as a model alone has them.

        Raises:
            InputError: It is not of the space that the supernet was made for.
        """
        parts = self.subnet(architecture).parts()
        return {label: part.detach().numpy().copy() for label, part in parts.items()}

    def evaluate(self, architecture: Architecture, task: Task, *, batches: int | None = RANKING_BATCHES) -> Evaluation:
        """Score an architecture with the shared weights on the validation split of a task.

        The statistics of batch norms are measured anew for it, on training examples.

        Args:
            architecture: One of the space that the supernet was made for.
            task: The task it learned.
            batches: How many to score at most, the same for every architecture; None scores the whole split.
        """
        subnet = self.subnet(architecture)
        if subnet.has_batch_norm:
            subnet.calibrate(task)
        try:
            return evaluate(task, make_predictor(subnet, task), self.batch, batches=batches)
        finally:
            subnet.own = {}

    def export(self) -> Params:
        """Return copies of all arrays by the store's keys."""
        return {key: tensor.detach().numpy().copy() for key, tensor in (self.weights | self.buffers).items()}


class Subnet(nn.Module):
    """One architecture; `forward` takes and returns what its graph does.

    Attributes:
        has_batch_norm: Whether it has statistics that depend on who else uses the weights.
        own: Buffers that stand in for the shared ones, by their names in the graph.
    """

    def __init__(self, supernet: Supernet, architecture: Architecture) -> None:
        super().__init__()
        graph = architecture.graph(supernet.signature, batch=supernet.batch)
        declared = declared_slots(graph, homes(architecture, supernet.signature))
        self._plan = [(label, supernet.store.find(slot), slot.axes) for label, slot in declared.items()]
        self._supernet = supernet
        self._skeleton = to_module(
            graph, {label: np.zeros(node.types[0].shape) for label, node in graph.parameters.items()}
        )
        self.has_batch_norm = any(isinstance(node.op, BatchNorm) for node in graph.nodes)
        self.own: dict[str, Tensor] = {}

    def parts(self) -> dict[str, Tensor]:
        """The architecture's parameters by their names in the graph; gradients go on to the shared weights.

        Each is contiguous, so that it is computed with exactly as a model of its own would.
        """
        shared: Mapping[str, Tensor] = {**self._supernet.weights, **self._supernet.buffers}
        parts = {label: slice_array(shared[slot.key], slot.axes, axes) for label, slot, axes in self._plan}
        return {label: part.contiguous() for label, part in parts.items()} | self.own

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Evaluate the architecture's graph; inputs and outputs by name."""
        return functional_call(self._skeleton, self.parts(), kwargs=inputs)

    def calibrate(self, task: Task) -> None:
        """Measure the statistics of batch norms on training examples, to be used until `own` is emptied."""
        parts = self.parts()
        self.own = {label: parts[label].clone() for label, slot, _ in self._plan if not slot.trained}
        self.train()
        rng = np.random.default_rng([0, _CALIBRATION_STREAM])
        with torch.no_grad():
            for _ in range(_CALIBRATION_BATCHES):
                self(**as_tensors(task.train_batch(rng, self._supernet.batch).inputs))
