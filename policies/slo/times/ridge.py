"""Regression toward a prior, of few parts that cannot be negative, in constant memory."""

from __future__ import annotations

from collections.abc import Sequence


class NonNegativeRidge:
    """Fits `target = sum(row * part)`, row by row; what no row tells of a part is 1."""

    def __init__(self, num_parts: int, prior_rows: float, least: float) -> None:
        """Take in no row yet.

        Args:
            num_parts: of a row.
            prior_rows: so many rows, each of one part alone, say that the part is 1.
            least: that a part is at the least.
        """
        self._size = range(num_parts)
        self._prior_rows = prior_rows
        self._least = least
        self._products = [[0.0] * num_parts for _ in self._size]  # of rows, summed
        self._targets = [0.0] * num_parts  # times their rows, summed

    def add(self, row: Sequence[float], target: float, keep: float) -> None:
        """Take in one row; all before count `keep` times as much from now on."""
        for sums, own in zip(self._products, row, strict=True):
            for column, other in enumerate(row):
                sums[column] = sums[column] * keep + own * other
        self._targets = [old * keep + own * target for old, own in zip(self._targets, row, strict=True)]

    def solve(self) -> list[float]:
        """Return the parts: those that would be below the least are that, and the others are fitted around them."""
        parts, free = [self._least] * len(self._size), list(self._size)
        while free:
            found = self._solve_for(free)
            low = {i for i, part in zip(free, found, strict=True) if part < self._least}
            if not low:
                for i, part in zip(free, found, strict=True):
                    parts[i] = part
                break
            free = [i for i in free if i not in low]
        return parts

    def _solve_for(self, free: list[int]) -> list[float]:
        """Solve for some parts by elimination, with the others at the least."""
        others = [i for i in self._size if i not in free]
        rows = []
        for i in free:
            products = self._products[i]
            target = self._targets[i] - self._least * sum(products[j] for j in others) + self._prior_rows
            rows.append([*(products[j] + (self._prior_rows if j == i else 0.0) for j in free), target])
        size = len(free)
        for k, pivot in enumerate(rows):
            for row in rows[k + 1 :]:
                ratio = row[k] / pivot[k]
                for j in range(k, size + 1):
                    row[j] -= ratio * pivot[j]
        found = [0.0] * size
        for k in reversed(range(size)):
            rest = sum(rows[k][j] * found[j] for j in range(k + 1, size))
            found[k] = (rows[k][size] - rest) / rows[k][k]
        return found
