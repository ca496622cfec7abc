"""Where the tensors of a loaded model are: in the memory that numpy sees, or in a device's own.

Needs no more of TVM than its runtime offers to functions of numbers and tensors.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np

from codegen import tvm_runtime

KDL_CPU: Final = 1
"""DLPack's number of the processor's own memory."""


class Memory(Protocol):
    """Where tensors are.

    Attributes:
        devices: DLPack's numbers of the kinds of devices that a virtual machine uses, the processor last.
    """

    devices: tuple[int, ...]

    def place(self, array: np.ndarray) -> Any:
        """Return a tensor with the content of an array, which has to begin at a multiple of 64 bytes."""
        ...

    def update(self, tensor: Any, array: np.ndarray) -> None:
        """Bring a tensor that was placed to what its array holds now."""
        ...

    def fetch(self, tensor: Any) -> np.ndarray:
        """Return the content of a tensor once all that was started is done."""
        ...


class HostMemory:
    """Tensors share the memory of their arrays."""

    devices: tuple[int, ...] = (KDL_CPU,)

    def place(self, array: np.ndarray) -> Any:
        """Return a tensor on an array's memory."""
        return tvm_runtime.load().from_dlpack(array)

    def update(self, tensor: Any, array: np.ndarray) -> None:
        """Do nothing: it is the same memory."""

    def fetch(self, tensor: Any) -> np.ndarray:
        """Return an array on a tensor's memory."""
        return np.from_dlpack(tensor)


class DeviceMemory:
    """Tensors are copies in the memory of the first device of a kind.

    Args:
        kind: DLPack's number of the kind, such as 2 for CUDA.
    """

    def __init__(self, kind: int) -> None:
        self.devices: tuple[int, ...] = (kind, KDL_CPU)
        runtime = tvm_runtime.load()
        self._share = runtime.from_dlpack
        self._move = runtime.get_global_func("vm.builtin.to_device")
        self._copy = runtime.get_global_func("runtime.TVMTensorCopyFromTo")

    def place(self, array: np.ndarray) -> Any:
        """Return a copy on the device."""
        return self._move(self._share(np.array(array, order="C")), self.devices[0], 0)

    def update(self, tensor: Any, array: np.ndarray) -> None:
        """Copy an array over a tensor; what the device is doing is not waited for, what it does next sees it."""
        self._copy(self._share(array), tensor)

    def fetch(self, tensor: Any) -> np.ndarray:
        """Return a copy, which waits for the device."""
        return np.from_dlpack(self._move(tensor, KDL_CPU, 0))
