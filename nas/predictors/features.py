"""Numbers that describe a point of a search space, of one length however deep the point is.

A point is what `to_dict` of an architecture gives, or any mapping of numbers, words, switches, lists and mappings. What
a point does not have is no feature of it: options of components that were not chosen and layers beyond its depth are
absent, and absent features are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ir.errors import InputError

if TYPE_CHECKING:
    from searchspaces.signature import Signature

Point = Mapping[str, Any]

# Digits to which columns are compared, far fewer than rounding errors touch.
_PATTERN_DIGITS = 9


def flatten(point: Point) -> dict[str, float]:
    """Return the features of a point by name.

    A number is a feature, a word `name=word` is one where it was chosen, a mapping counts as chosen and gives those of
    its entries. A list gives those of each entry as `name[index]`, and over its entries the count, sums and means.

    Args:
        point: Mapping of JSON values.

    Raises:
        InputError: A value is of no such kind.
    """
    features: dict[str, float] = {}
    for name, value in point.items():
        _collect(str(name), value, features)
    return features


def profile_features(architecture: Any, signature: Signature) -> dict[str, float]:
    """Return what the graph of an architecture costs, as logarithms of counts.

    Args:
        architecture: `searchspaces` architecture.
        signature: Inputs and outputs of the model.

    Returns:
        Features `log_params`, `log_flops`, `log_bytes` and `depth`.

    Raises:
        InputError: The architecture does not fit the signature.
    """
    from ir.cost import profile

    cost = profile(architecture.graph(signature))
    counts = {"log_params": cost.params, "log_flops": cost.flops, "log_bytes": cost.bytes_moved}
    return {name: float(np.log1p(count)) for name, count in counts.items()} | {"depth": float(architecture.model.depth)}


def drop_inactive(point: Point, active: int | Sequence[bool]) -> dict[str, Any]:
    """Return a point whose lists hold the entries of active layers only.

    Args:
        point: Point whose lists have one entry per layer.
        active: Depth, or a claim per layer.

    Raises:
        InputError: A list is shorter than the depth, or not as long as the claims.
    """
    return {
        name: _active_entries(name, value, active) if isinstance(value, (list, tuple)) else value
        for name, value in point.items()
    }


def _active_entries(name: str, entries: Sequence[Any], active: int | Sequence[bool]) -> list[Any]:
    if isinstance(active, int):
        if len(entries) < active:
            raise _bad_length(name, f"at least {active}", len(entries))
        return list(entries[:active])
    if len(entries) != len(active):
        raise _bad_length(name, str(len(active)), len(entries))
    return [entry for entry, is_active in zip(entries, active, strict=True) if is_active]


def _bad_length(name: str, expected: str, found: int) -> InputError:
    return InputError(
        "this list does not fit the layers", where=name, expected=f"{expected} entries", found=f"{found} entries"
    )


@dataclass(frozen=True)
class FeatureTable:
    """Columns that some points have in common; other points are described by the same columns.

    Attributes:
        names: Name of each column; those of single list entries hold `[`.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, described: Sequence[Mapping[str, float]]) -> FeatureTable:
        """Return the columns that differ among some points.

        An entry of a list that differs from another column by a factor and an offset alone is left out: it says
        nothing more, and layers that share their options repeat themselves in hundreds of columns.

        Args:
            described: Features of each point by name.
        """
        names = sorted({name for features in described for name in features}, key=lambda name: ("[" in name, name))
        x_NF = cls(tuple(names)).matrix(described)
        kept: list[str] = []
        patterns: set[bytes] = set()
        for column in np.flatnonzero(np.ptp(x_NF, axis=0) > 0) if len(x_NF) else ():
            pattern = _pattern(x_NF[:, column])
            if "[" not in names[column] or pattern not in patterns:
                kept.append(names[column])
                patterns.add(pattern)
        return cls(tuple(sorted(kept)))

    @property
    def summaries(self) -> tuple[int, ...]:
        """Columns that describe a point as a whole."""
        return tuple(column for column, name in enumerate(self.names) if "[" not in name)

    def matrix(self, described: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
        """Return `[points, columns]`; features without a column are left out.

        Args:
            described: Features of each point by name.
        """
        columns = {name: column for column, name in enumerate(self.names)}
        x_NF = np.zeros((len(described), len(columns)))
        for row, features in enumerate(described):
            for name, value in features.items():
                column = columns.get(name)
                if column is not None:
                    x_NF[row, column] = value
        return x_NF


def _pattern(column_N: NDArray[np.float64]) -> bytes:
    """Return what columns have in common that differ by a factor and an offset alone."""
    share_N = np.round((column_N - column_N.min()) / np.ptp(column_N), _PATTERN_DIGITS) + 0.0
    return min(share_N.tobytes(), np.round(1.0 - share_N, _PATTERN_DIGITS).tobytes())


def _collect(name: str, value: Any, features: dict[str, float]) -> None:
    """Add the features of one value."""
    if value is None:
        return
    if isinstance(value, (bool, int, float, np.number, np.bool_)):
        features[name] = float(value)
    elif isinstance(value, str):
        features[f"{name}={value}"] = 1.0
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(item, Mapping):
                features[f"{name}.{key}"] = 1.0
            _collect(f"{name}.{key}", item, features)
    elif isinstance(value, (list, tuple)):
        _collect_list(name, value, features)
    else:
        raise InputError(
            "no feature can be made of this",
            where=name,
            expected="a number, word, switch, list or mapping",
            found=repr(value)[:80],
        )


def _collect_list(name: str, entries: Sequence[Any], features: dict[str, float]) -> None:
    """Add the features of each entry of a list, and their sums and means."""
    sums: dict[str, float] = {}
    for index, entry in enumerate(entries):
        own: dict[str, float] = {}
        _collect("", entry, own)
        for key, value in own.items():
            features[f"{name}[{index}]{key}"] = value
            if "[" not in key:
                sums[key] = sums.get(key, 0.0) + value
    features[f"{name}.count"] = float(len(entries))
    for key, value in sums.items():
        features[f"{name}.sum{key}"] = value
        features[f"{name}.mean{key}"] = value / len(entries)
