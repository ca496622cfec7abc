"""Stand-ins for `nas.matrix.write`, by the name of the model; importable in a worker process."""

from __future__ import annotations

import os
import time
from typing import Any

from ir.errors import InputError, TargetUnavailable, VerificationError


def write(name: str, format: str, target: str | None, folder: str) -> dict[str, Any]:
    """Do what the model's name says."""
    match name:
        case "crash":
            os.abort()
        case "hang":
            time.sleep(1000)
        case "slow":
            time.sleep(0.5)
        case "cpus":
            return {"unverified": "", "verification_error": 2e-7, "size_bytes": len(os.sched_getaffinity(0))}
        case "stumble":
            raise KeyError("Value(node=3, index=0)")
        case "refuse":
            raise InputError("this format has no place for it", where="the model")
        case "absent":
            raise TargetUnavailable("the target is not here", where="target")
        case "differ":
            raise VerificationError("it disagrees with torch", where="output y", found="0.5")
    return {"unverified": "", "verification_error": 2e-7, "size_bytes": len(format)}
