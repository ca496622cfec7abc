"""Time on an NVIDIA GPU: device events around calls, the second-level cache flushed or not, calls replayed as graphs.

What an artifact's call does is start kernels and return; how long they take, the device's own clock says. All goes
through the CUDA runtime's library, so that the TVM runtime is all that is needed besides.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ir.errors import MeasurementError

_NON_BLOCKING: Final = 1  # cudaStreamNonBlocking
_THREAD_LOCAL: Final = 1  # cudaStreamCaptureModeThreadLocal
_FLUSH_FACTOR: Final = 2  # writing twice the cache leaves nothing of before in it


@dataclass(frozen=True)
class GpuTiming:
    """How a model is timed on a GPU.

    Attributes:
        flush_cache: Whether the second-level cache is overwritten before each call.
        graph: Whether the kernels of a call are started all at once, as a graph.
    """

    flush_cache: bool = False
    graph: bool = True


class Runtime:
    """The CUDA runtime's functions, with errors as exceptions.

    Args:
        library: The loaded library; anything with its functions serves.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            MeasurementError: It reports an error.
        """
        code = getattr(self._library, name)(*arguments)
        if code:
            raise MeasurementError("the GPU reports an error", where=name, found=f"CUDA error {code}")

    def make(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Call a function that writes a handle into its first argument, and return the handle."""
        handle = ctypes.c_void_p()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle


class CudaClock:
    """Times calls that start work on a stream.

    Args:
        runtime: The CUDA runtime.
        l2_bytes: Bytes of the second-level cache, which is overwritten before each timed call; 0 leaves it as it is.
        stream: The stream; the usual one where None.
    """

    def __init__(self, runtime: Runtime, *, l2_bytes: int = 0, stream: ctypes.c_void_p | None = None) -> None:
        self._runtime, self._stream = runtime, stream or ctypes.c_void_p()
        self._start, self._end = runtime.make("cudaEventCreate"), runtime.make("cudaEventCreate")
        self._flush_bytes = ctypes.c_size_t(_FLUSH_FACTOR * l2_bytes)
        self._buffer = runtime.make("cudaMalloc", self._flush_bytes) if l2_bytes else None

    def seconds(self, call: Callable[[], object], group: int = 1) -> float:
        """Return the seconds of a call on the device, averaged over a group of calls.

        With flushing each call is timed by itself, so the flush is in no call's time.
        """
        if self._buffer is None:
            return self._between(call, group) / group
        return sum(self._flushed(call) for _ in range(group)) / group

    def finished(self, call: Callable[[], object]) -> Callable[[], None]:
        """Return a call that waits for what it started."""

        def run() -> None:
            call()
            self._runtime.call("cudaStreamSynchronize", self._stream)

        return run

    def _flushed(self, call: Callable[[], object]) -> float:
        self._runtime.call("cudaMemsetAsync", self._buffer, 0, self._flush_bytes, self._stream)
        return self._between(call, 1)

    def _between(self, call: Callable[[], object], group: int) -> float:
        self._runtime.call("cudaEventRecord", self._start, self._stream)
        for _ in range(group):
            call()
        self._runtime.call("cudaEventRecord", self._end, self._stream)
        self._runtime.call("cudaEventSynchronize", self._end)
        milliseconds = ctypes.c_float()
        self._runtime.call("cudaEventElapsedTime", ctypes.byref(milliseconds), self._start, self._end)
        return milliseconds.value * 1e-3


class CudaGraph:
    """A call's kernels, started again all at once: for models whose kernels are shorter than their starts.

    The call is made twice: once so that all memory is there, once to record. Its result stays alive with the graph and
    holds what the last replay computed.

    Args:
        runtime: The CUDA runtime.
        call: A bound call of a loaded artifact.
        stream: The stream that replays run on; not the usual one, which cannot be recorded.
        set_stream: Makes the calls of this thread start their work on a stream.

    Attributes:
        result: Result of the call.
    """

    def __init__(
        self,
        runtime: Runtime,
        call: Callable[[], Any],
        stream: ctypes.c_void_p,
        set_stream: Callable[[ctypes.c_void_p], object],
    ) -> None:
        self._runtime, self._stream = runtime, stream
        runtime.call("cudaDeviceSynchronize")  # inputs and weights came on the usual stream, which this one passes by
        set_stream(stream)
        try:
            call()
            runtime.call("cudaStreamSynchronize", stream)
            runtime.call("cudaStreamBeginCapture", stream, _THREAD_LOCAL)
            self.result = call()
            graph = ctypes.c_void_p()
            runtime.call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        finally:
            set_stream(ctypes.c_void_p())
        self._graph = runtime.make("cudaGraphInstantiate", graph, ctypes.c_ulonglong())
        runtime.call("cudaGraphDestroy", graph)

    def __call__(self) -> Any:
        """Start the recorded kernels; the result is there once the stream is done."""
        self._runtime.call("cudaGraphLaunch", self._graph, self._stream)
        return self.result


class GpuStopwatch:
    """What `codegen.measure` times models on a GPU with.

    Args:
        timing: How.
        runtime: The CUDA runtime.
        l2_bytes: Bytes of the GPU's second-level cache.
        set_stream: Makes the calls of this thread start their work on a stream.
    """

    def __init__(
        self,
        timing: GpuTiming,
        runtime: Runtime,
        l2_bytes: int,
        set_stream: Callable[[ctypes.c_void_p], object],
    ) -> None:
        self._runtime, self._set_stream = runtime, set_stream
        self._stream = runtime.make("cudaStreamCreateWithFlags", _NON_BLOCKING) if timing.graph else None
        clock = CudaClock(runtime, l2_bytes=l2_bytes if timing.flush_cache else 0, stream=self._stream)
        self.seconds, self.finished = clock.seconds, clock.finished

    def prepare(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return what is timed for the bare call of a model."""
        if self._stream is None:
            return call
        return CudaGraph(self._runtime, call, self._stream, self._set_stream)
