"""Attention to near pixels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import reference

_HIDDEN = -1e9  # added to the scores of keys that are no neighbours


class NeighborhoodAttention(TokenMixer):
    """Each pixel attends the K x K pixels around it, in steps of a dilation (Hassani et al. 2023; DiNAT).

    o_t = sum_s softmax_s(q_t . k_s / sqrt(K) + table[h, rows apart, columns apart]) v_s, y = concat_h(o) W_out. Along
    an axis the neighbours of i are the K nearest coordinates that leave the same rest as i when divided by the
    dilation, which never exceeds the size over K; near a border they shift inward, so that there are always K. An axis
    shorter than K is attended whole.
    4 D^2 parameters besides the table `[(2 K - 1)^2, H]`. Linear in the number of tokens: K^2 keys each.
    """

    paper = (
        "Hassani et al. 2023, Neighborhood Attention Transformer, arXiv 2204.07143; "
        "Hassani and Shi 2022, Dilated Neighborhood Attention Transformer, arXiv 2209.15001"
    )
    spatial = True
    causality = "bidirectional"
    cases = (
        Case({"num_heads": 3, "window": 3}, grid=(5, 6)),
        Case({"num_heads": 2, "window": 3, "dilation": 2, "tile": 1}, grid=(7, 8), d_model=6, batch=1),
        Case({"num_heads": 1, "window": 5, "tile": 3}, grid=(8, 4), d_model=5),
        Case({"num_heads": 1, "window": 3, "dilation": 3, "relative_position": False}, grid=(7, 9), d_model=4),
    )
    limits = (
        Limit(
            "neighbours that are the whole image, the table zero, are full attention",
            Case({"num_heads": 3, "window": 5}, grid=(5, 4)),
            "softmax_attention",
            {"num_heads": 3, "bias": True, "causal": False},
            values={"relative_position": 0.0},
        ),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Heads.")
    window: int = option(7, minimum=3, maximum=255, doc="Neighbours along an axis, an odd number.")
    dilation: int = option(1, minimum=1, maximum=255, doc="Pixels from one neighbour to the next.")
    relative_position: bool = option(True, doc="Learn a score for each distance of neighbours.")
    bias: bool = option(True, doc="Add learned biases to queries, keys, values and output.")
    tile: int = option(
        2, minimum=1, maximum=64, doc="Queries along an axis that read keys together; the result is the same."
    )

    def check(self, d_model: int) -> str | None:
        if d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        return None if self.window % 2 else f"a window of {self.window} has no centre"

    def build(self, b: Builder, x: Tensor) -> Tensor:
        batch, height, width, d_model = x.shape
        heads = (Axis("heads", self.num_heads), Axis("head_dim", d_model // self.num_heads))
        tokens = b.reshape(x, batch, height * width, d_model)
        q, k, v = (b.linear(tokens, name, heads, bias=self.bias) for name in "qkv")
        rows, columns = self._axis(height), self._axis(width)
        asked, read = (_product(rows[name], columns[name], width) for name in ("asked", "read"))
        q = self._placed(b, q, asked)
        k, v = self._placed(b, k, read), self._placed(b, v, read)
        o = b.attention(q, k, v, bias=self._scores(b, rows["steps"], columns["steps"], batch))
        o = b.reshape(o, batch, asked.size, d_model)
        back = np.zeros(height * width, np.int64)
        back[asked[asked >= 0]] = np.flatnonzero(asked.ravel() >= 0)
        o = b.gather(o, b.constant(np.reshape(back, (1, -1, 1))), 1)
        y = b.matmul(o, b.parameter("out", (heads, (Axis("d_model", d_model),))))
        y = y + b.parameter("out_bias", ((Axis("d_model", d_model),),), "constant(0)") if self.bias else y
        return b.reshape(y, batch, height, width, d_model)

    def _placed(self, b: Builder, x: Tensor, places: Array) -> Tensor:
        """Tokens `[B, T, D]` in groups, `[B * groups, size, H, K]`; any token where there is none."""
        chosen = b.gather(x, b.constant(np.reshape(np.maximum(places, 0), (1, -1, 1))), 1)
        return b.reshape(chosen, x.shape[0] * places.shape[0], places.shape[1], self.num_heads, -1)

    def _dilation(self, count: int) -> int:
        """The dilation, or what leaves K neighbours along an axis."""
        return min(self.dilation, max(1, count // self.window))

    def _axis(self, count: int) -> dict[str, Array]:
        """Along an axis, groups of queries, the keys that each reads, and the steps between them.

        Returns:
            `asked` `[groups, queries]` and `read` `[groups, keys]`, coordinates or -1 for none, and `steps` `[groups,
            queries, keys]` from query to key, at most `window` - 1 either way, `window` where they are no neighbours.
        """
        groups: list[tuple[list[int], list[int], list[list[int]]]] = []
        dilation = self._dilation(count)
        for rest in range(dilation):
            line = list(range(rest, count, dilation))
            window = min(self.window, len(line))
            starts = [min(max(place - window // 2, 0), len(line) - window) for place in range(len(line))]
            tile = len(line) if window == len(line) else self.tile
            for first in range(0, len(line), tile):
                own = range(first, min(first + tile, len(line)))
                keys = range(starts[own[0]], starts[own[-1]] + window)
                steps = [
                    [key - place if 0 <= key - starts[place] < window else self.window for key in keys] for place in own
                ]
                groups.append(([line[place] for place in own], [line[key] for key in keys], steps))
        most_asked, most_read = (max(len(group[part]) for group in groups) for part in (0, 1))
        asked, read = np.full((len(groups), most_asked), -1), np.full((len(groups), most_read), -1)
        table = np.full((len(groups), most_asked, most_read), self.window)
        for index, (queries, keys, steps) in enumerate(groups):
            asked[index, : len(queries)], read[index, : len(keys)] = queries, keys
            table[index, : len(queries), : len(keys)] = steps
        return {"asked": asked, "read": read, "steps": table}

    def _scores(self, b: Builder, down: Array, right: Array, batch: int) -> Tensor | None:
        """What is added to the scores, `[batch * groups, 1 or H, queries, keys]`."""
        side = 2 * self.window - 1
        shape = (
            down.shape[0] * right.shape[0],
            1,
            down.shape[1] * right.shape[1],
            down.shape[2] * right.shape[2],
        )
        far = (down == self.window)[:, None, :, None, :, None] | (right == self.window)[None, :, None, :, None, :]
        bias = b.constant(np.reshape(np.where(far, _HIDDEN, 0.0), shape)) if far.any() else None
        if self.relative_position:
            axes = ((Axis("distance", side * side),), (Axis("heads", self.num_heads),))
            table = b.parameter("relative_position", axes, "normal(0.02)")
            entry = (down + self.window - 1)[:, None, :, None, :, None] * side
            entry = entry + (right + self.window - 1)[None, :, None, :, None, :]
            chosen = b.take(table, b.constant(np.where(far, 0, entry).ravel()))
            chosen = b.reshape(chosen, shape[0], shape[2], shape[3], self.num_heads)
            learned = b.transpose(chosen, 0, 3, 1, 2)
            bias = learned if bias is None else learned + bias
        if bias is None or batch == 1:
            return bias
        groups, heads, queries, keys = bias.shape
        every = b.broadcast(b.reshape(bias, 1, *bias.shape), batch, *bias.shape)
        return b.reshape(every, batch * groups, heads, queries, keys)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        batch, height, width, _ = x.shape
        q, k, v = (
            np.reshape(x @ params[name] + params.get(f"{name}_bias", 0.0), (batch, height, width, self.num_heads, -1))
            for name in "qkv"
        )
        side = 2 * self.window - 1
        table = np.reshape(params.get("relative_position", np.zeros(side * side * self.num_heads)), (side, side, -1))
        o = np.zeros_like(q)
        for i in range(height):
            for j in range(width):
                seen = [(u, w) for u in self._neighbours(i, height) for w in self._neighbours(j, width)]
                scores = np.stack([(q[:, i, j] * k[:, u, w]).sum(axis=-1) for u, w in seen], axis=-1)
                apart = [((u - i) // self._dilation(height), (w - j) // self._dilation(width)) for u, w in seen]
                learned = [table[down + self.window - 1, right + self.window - 1] for down, right in apart]
                weights = reference.softmax(scores / q.shape[-1] ** 0.5 + np.stack(learned, axis=-1))
                o[:, i, j] = sum(weights[:, :, n, None] * v[:, u, w] for n, (u, w) in enumerate(seen))
        return np.reshape(o, x.shape) @ params["out"] + params.get("out_bias", 0.0)

    def _neighbours(self, place: int, count: int) -> list[int]:
        """The nearest coordinates in steps of the dilation, shifted inward at the borders."""
        if count < self.window:
            return list(range(count))
        dilation = self._dilation(count)
        first = place - self.window // 2 * dilation
        while first < 0:
            first += dilation
        while first + (self.window - 1) * dilation >= count:
            first -= dilation
        return [first + step * dilation for step in range(self.window)]


def _product(rows: Array, columns: Array, width: int) -> Array:
    """Numbers of the pixels of all pairs of groups, `[groups, size]`, -1 where a coordinate is -1."""
    down, right = rows[:, None, :, None], columns[None, :, None, :]
    places = np.where((down < 0) | (right < 0), -1, down * width + right)
    return np.reshape(places, (rows.shape[0] * columns.shape[0], -1))
