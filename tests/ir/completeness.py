"""Which operations a table forgets."""

from __future__ import annotations

import importlib
from collections.abc import Container, Mapping
from typing import Any

from ir.op import OPS, Op


def missing_rows(table: Mapping[type[Op], Any], but: Container[type[Op]] = ()) -> list[str]:
    """Names of the operations without a row, `but` excepted."""
    importlib.import_module("ir.ops")
    return [name for name, kind in OPS.items() if kind not in table and kind not in but]
