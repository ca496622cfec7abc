"""Rounds of turns: who takes part in how many, and what follows from their times. No claim about any time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from codegen import rounds


def test_rounds_give_everyone_turns_in_rotating_order(monkeypatch: pytest.MonkeyPatch):
    """Each round begins with another function, so nobody always runs behind the same one."""
    monkeypatch.setattr(rounds, "rest", lambda: order.append("|"))
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = rounds.run_rounds(calls, 60.0, rounds=3)
    turns = "".join(order).split("|")[1:]
    assert [turn[0] for turn in turns] == list("abcbcacab")
    assert all(set(turn) == {turn[0]} for turn in turns)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_rounds_a_slow_function_sits_out_once_its_share_is_used(monkeypatch: pytest.MonkeyPatch):
    """It gets the fewest rounds, and what is quick gets those that its own share is enough for."""
    now = 0.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    def timed(call: Callable[[], object], calls: int = 1) -> float:
        start = now
        for _ in range(calls):
            call()
        return (now - start) / calls

    monkeypatch.setattr(rounds, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(rounds, "time_call", timed)
    monkeypatch.setattr(rounds, "rest", lambda: None)
    times = rounds.run_rounds({"slow": lambda: work(0.125), "quick": lambda: work(0.0078125)}, 0.25, rounds=9, fewest=2)
    assert times["slow"] == [0.125] * 2
    assert times["quick"] == [0.0078125] * 4  # 2 calls to warm up and 3 that count are 0.039 s of its 0.125 s


def test_rounds_figures_pair_rounds():
    """The ratio is taken within rounds, so a machine that slows down for all changes no ratio."""
    own = np.linspace(1.0, 3.0, 20)
    figures = rounds.figures(list(2 * own), list(own))
    assert figures["ratio"] == 2.0
    assert figures["ratio_interval"] == (2.0, 2.0)
    assert figures["median_ms"] == pytest.approx(4000.0)


def test_rounds_figures_of_fewer_rounds_take_the_shared_ones():
    """Who sat out is compared over the rounds in which both had a turn."""
    figures = rounds.figures([4.0, 4.0, 4.0], [1.0, 1.0, 1.0, 100.0, 100.0])
    assert figures["ratio"] == 4.0
    assert figures["rounds"] == 3
