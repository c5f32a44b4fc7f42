"""Cut the dimensions of a value into the factors that reshapes and permutations keep together.

    (b, t, h*d) -> (b, t, h, d) -> (b, h, t, d)     the factors are b, t, h and d,
                                                    in the order 0, 2, 1, 3 at last

Whatever leads from one order of factors to another can be done by at most one reshape, one
permutation and one more reshape.

Source: Rogozhnikov, "Einops", ICLR 2022, section 4 (the same decomposition).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Factors", "Step"]

# "reshape" and a shape, or "permute" and an order of dimensions.
Step = tuple[str, list[int]]


@dataclass(eq=False)
class _Factor:
    size: int


class Factors:
    """What became of a value's dimensions.

    Args:
        shape: Of the value; its sizes other than 1 are the first factors.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.first = list(shape)
        self.shape = list(shape)
        self.before = [[_Factor(size)] if size != 1 else [] for size in shape]
        self.now = [list(dim) for dim in self.before]

    def permute(self, order: Sequence[int]) -> None:
        """Follow a permutation of the dimensions."""
        self.now = [self.now[dim] for dim in order]
        self.shape = [self.shape[dim] for dim in order]

    def reshape(self, shape: Sequence[int]) -> bool:
        """Follow a reshape; return False if it cuts across factors: (4, 6) to (8, 3)."""
        rest = [factor for dim in self.now for factor in dim]
        now: list[list[_Factor]] = []
        for size in shape:
            dim: list[_Factor] = []
            while size > 1 and rest:
                if rest[0].size > size:
                    if rest[0].size % size:
                        return False
                    rest[:1] = self._cut(rest[0], size)
                if size % rest[0].size:
                    return False
                size //= rest[0].size
                dim.append(rest.pop(0))
            now.append(dim)
        self.now, self.shape = now, list(shape)
        return True

    def steps(self) -> list[Step]:
        """Return the fewest steps from the first shape to the present one."""
        choices = itertools.product((True, False), repeat=2)
        return min((self._steps(*choice) for choice in choices), key=len)

    def _cut(self, factor: _Factor, size: int) -> list[_Factor]:
        parts = [_Factor(size), _Factor(factor.size // size)]
        for dim in (*self.before, *self.now):
            if factor in dim:
                place = dim.index(factor)
                dim[place : place + 1] = parts
        return parts

    def _steps(self, keeps_first: bool, keeps_last: bool) -> list[Step]:
        """Return the steps where neighbours that stay neighbours are one dimension in between.

        Args:
            keeps_first: But not where they were two dimensions at first.
            keeps_last: Nor where they are two at last.
        """
        flat = [factor for dim in self.before for factor in dim]
        first = {factor: n for n, dim in enumerate(self.before) for factor in dim}
        last = {factor: n for n, dim in enumerate(self.now) for factor in dim}
        runs: list[list[_Factor]] = []
        for factor in (factor for dim in self.now for factor in dim):
            if runs and flat.index(factor) == flat.index(runs[-1][-1]) + 1:
                neighbour = runs[-1][-1]
                if not (keeps_first and first[factor] != first[neighbour]) and not (
                    keeps_last and last[factor] != last[neighbour]
                ):
                    runs[-1].append(factor)
                    continue
            runs.append([factor])
        in_order = sorted(runs, key=lambda run: flat.index(run[0]))
        order = [in_order.index(run) for run in runs]
        if order == sorted(order):
            return [] if self.first == self.shape else [("reshape", self.shape)]
        sizes = [math.prod(factor.size for factor in run) for run in in_order]
        steps: list[Step] = [] if sizes == self.first else [("reshape", sizes)]
        steps.append(("permute", order))
        if [sizes[place] for place in order] != self.shape:
            steps.append(("reshape", self.shape))
        return steps
