"""No operation is forgotten."""

from __future__ import annotations

from ir.ops.structure import Component, Input, Parameter
from tests.ir.completeness import missing_rows
from tests.ir.random_graphs import RECIPES


def test_random_graphs_cover_every_operation():
    """Every operation with a value of its own occurs in the random graphs."""
    assert missing_rows(RECIPES, but={Input, Parameter, Component}) == []


def test_missing_rows_are_named():
    """A table that forgets an operation is told which."""
    table = {kind: recipe for kind, recipe in RECIPES.items() if kind.name != "conv"}
    assert missing_rows(table, but={Input, Parameter, Component}) == ["conv"]
