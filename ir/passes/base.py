"""What a pass is: a frozen dataclass whose fields are its options, verified on exit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from ir.errors import GraphError
from ir.graph import Graph
from ir.op import snake_case
from ir.verify import verify

Dump = Callable[[str, Graph], None]
"""Called with the name of a pass and the graph after it."""


@dataclass(frozen=True)
class Pass(ABC):
    """A transformation of graphs that keeps their meaning.

    Class attributes:
        allow_components: Whether component nodes may be left when the pass is done.
    """

    allow_components: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Snake_case of the class name."""
        return snake_case(type(self).__name__)

    @abstractmethod
    def run(self, graph: Graph) -> Graph:
        """The transformed graph; the argument stays as it is."""

    def __call__(self, graph: Graph) -> Graph:
        """Run and verify.

        Raises:
            GraphError: The pass failed or made a malformed graph; the message names the pass.
        """
        try:
            return verify(self.run(graph), allow_components=self.allow_components)
        except GraphError as error:
            message = f"{self.name}: {error.message}"
            raise GraphError(
                message, where=error.where, expected=error.expected, found=error.found, hint=error.hint
            ) from error


@dataclass(frozen=True)
class Pipeline:
    """Passes one after the other.

    Attributes:
        passes: What to run, first to last.
        dump: Called after each pass, to print the graph for example.
    """

    passes: tuple[Pass, ...]
    dump: Dump | None = None

    def __call__(self, graph: Graph) -> Graph:
        """Run every pass.

        Raises:
            GraphError: A pass failed; the message names it.
        """
        for step in self.passes:
            graph = step(graph)
            if self.dump is not None:
                self.dump(step.name, graph)
        return graph
