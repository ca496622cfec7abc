"""What a device says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from codegen.devices.wire import WireError


@dataclass(frozen=True)
class Report:
    """A device as it was when it was asked.

    Attributes:
        name: What it is called.
        machine: `codegen.machine.describe()` of it.
        lease: Holder, since when, how many wait; None while nobody has it.
        uploads: Files, bytes and bound of the artifacts that it keeps.
        artifact_bytes: Largest artifact that it takes.
    """

    name: str
    machine: Mapping[str, Any]
    lease: Mapping[str, Any] | None
    uploads: Mapping[str, int]
    artifact_bytes: int

    @classmethod
    def of(cls, fields: Any) -> Report:
        """Read what a device sent.

        Raises:
            WireError: It is nothing of the kind.
        """
        try:
            found = cls(*(fields[name] for name in ("name", "machine", "lease", "uploads", "artifact_bytes")))
            if not (found.architecture and found.threads > 0 and isinstance(found.features, frozenset)):
                raise ValueError(fields)
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"a report that is none: {type(error).__name__}") from error
        return found

    @property
    def architecture(self) -> str:
        """The processor architecture as `platform.machine` names it."""
        return str(self.machine["architecture"])

    @property
    def features(self) -> frozenset[str]:
        """Instruction-set flags."""
        return frozenset(self.machine["features"])

    @property
    def cpu(self) -> str:
        """Name of the processor."""
        return str(self.machine.get("cpu"))

    @property
    def threads(self) -> int:
        """CPUs that its processes may use."""
        return int(self.machine["logical_cpus"])
