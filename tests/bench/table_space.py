"""A search space read off a table, and boosted trees that give each of its architectures a value."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nas.predictors.features import FeatureTable, flatten


@dataclass(frozen=True)
class TablePoint:
    """A row that a table could have: a value per column of choices, a tuple where each layer has its own."""

    choices: tuple[tuple[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the point as JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.choices}


@dataclass(frozen=True)
class TableSpace:
    """Every combination of the values that the columns of a table take.

    Attributes:
        plain: Values of each column with one value per row, ascending.
        per_layer: Values of each column with one value per layer.
        depth: Plain column that counts the layers, None where no column is per layer.
    """

    plain: dict[str, list[Any]]
    per_layer: dict[str, list[Any]] = field(default_factory=dict)
    depth: str | None = None

    @classmethod
    def of(cls, points: Sequence[Mapping[str, Any]]) -> TableSpace:
        """Return the space of the values in the columns of points.

        Raises:
            ValueError: The lists of some column are as long as no other column says.
        """
        plain = {name: sorted({point[name] for point in points}) for name in points[0] if not _is_list(points, name)}
        lists = [name for name in points[0] if _is_list(points, name)]
        per_layer = {name: sorted({item for point in points for item in point[name]}) for name in lists}
        depths = [
            name for name in plain if lists and all(point[name] == len(point[one]) for point in points for one in lists)
        ]
        if lists and not depths:
            raise ValueError(f"no column tells the length of {', '.join(lists)}")
        return cls(plain, per_layer, depths[0] if depths else None)

    def sample(self, rng: np.random.Generator) -> TablePoint:
        """Draw each value alone."""
        return self._complete({name: _draw(values, rng) for name, values in self.plain.items()}, {}, rng)

    def mutate(self, architecture: TablePoint, rng: np.random.Generator) -> TablePoint:
        """Change the value of one column, or of one layer in one."""
        old = architecture.to_dict()
        places = [(name, None) for name, values in self.plain.items() if len(values) > 1]
        places += [
            (name, layer)
            for name, values in self.per_layer.items()
            if len(values) > 1
            for layer in range(len(old[name]))
        ]
        name, layer = places[int(rng.integers(len(places)))]
        if layer is None:
            old[name] = _draw([value for value in self.plain[name] if value != old[name]], rng)
        else:
            old[name][layer] = _draw([value for value in self.per_layer[name] if value != old[name][layer]], rng)
        return self._complete(old, old, rng)

    def crossover(self, first: TablePoint, second: TablePoint, rng: np.random.Generator) -> TablePoint:
        """Take each value from one of two points."""
        parents = (first.to_dict(), second.to_dict())
        plain = {name: parents[int(rng.integers(2))][name] for name in self.plain}
        lists: dict[str, list[Any]] = {}
        for name in self.per_layer:
            short, long = sorted((parent[name] for parent in parents), key=len)
            mixed = [pair[int(rng.integers(2))] for pair in zip(short, long[: len(short)], strict=True)]
            lists[name] = mixed + long[len(short) :]
        return self._complete(plain, lists, rng)

    def smallest(self) -> TablePoint:
        """Return the point with the least value everywhere."""
        return self._uniform(lambda values: values[0])

    def centroid(self) -> TablePoint:
        """Return the point with the middle value everywhere."""
        return self._uniform(lambda values: values[len(values) // 2])

    def largest(self) -> TablePoint:
        """Return the point with the greatest value everywhere."""
        return self._uniform(lambda values: values[-1])

    def architecture(self, data: Mapping[str, Any]) -> TablePoint:
        """Return the point that `TablePoint.to_dict` wrote."""
        return TablePoint(
            tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in data.items())
        )

    def _complete(self, plain: Mapping[str, Any], lists: Mapping[str, Any], rng: np.random.Generator) -> TablePoint:
        """Cut lists to the depth, and draw what is missing."""
        point: dict[str, Any] = {name: plain[name] for name in self.plain}
        for name, values in self.per_layer.items():
            kept = list(lists.get(name, ()))[: plain[self.depth or ""]]
            point[name] = kept + [_draw(values, rng) for _ in range(plain[self.depth or ""] - len(kept))]
        return self.architecture(point)

    def _uniform(self, choose: Any) -> TablePoint:
        point = {name: choose(values) for name, values in self.plain.items()}
        point |= {name: [choose(values)] * point[self.depth or ""] for name, values in self.per_layer.items()}
        return self.architecture(point)


@dataclass
class Surrogate:
    """Boosted trees fitted to one column of a table, and everything they were asked."""

    table: FeatureTable
    model: Any
    answers: dict[TablePoint, float] = field(default_factory=dict)

    @classmethod
    def of(cls, points: Sequence[Mapping[str, Any]], values: Sequence[float]) -> Surrogate:
        """Fit to all rows of a table."""
        from sklearn.ensemble import HistGradientBoostingRegressor

        described = [flatten(point) for point in points]
        table = FeatureTable.of(described)
        model = HistGradientBoostingRegressor(max_iter=300, random_state=0)
        return cls(table, model.fit(table.matrix(described), np.asarray(values)))

    def __call__(self, architecture: TablePoint) -> float:
        """Return the value of any architecture of the space."""
        if architecture not in self.answers:
            features = self.table.matrix([flatten(architecture.to_dict())])
            self.answers[architecture] = float(self.model.predict(features)[0])
        return self.answers[architecture]


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a CSV file, compressed or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return list(csv.DictReader(data.decode("utf-8").splitlines()))


def read_points(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the choices of each row; a column with several values apart by spaces is a list everywhere."""
    lists = {name for name in columns if any(" " in row[name].strip() for row in rows)}
    return [
        {name: [_value(text) for text in row[name].split()] if name in lists else _value(row[name]) for name in columns}
        for row in rows
    ]


def _value(text: str) -> int | float | str:
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


def _is_list(points: Sequence[Mapping[str, Any]], name: str) -> bool:
    return isinstance(points[0][name], list)


def _draw(values: Sequence[Any], rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]
