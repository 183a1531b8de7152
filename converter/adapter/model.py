"""What an adapter does to a model, whichever library wrote it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Factor:
    """One of the two thin matrices: a tensor of the adapter, as it is or transposed."""

    name: str
    transposed: bool = False

    @property
    def flipped(self) -> Factor:
        """The transpose."""
        return Factor(self.name, not self.transposed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """``w + scale * (up @ down)`` for the stored matrix of ``module``, a DoRA's rows rescaled.

    ``up`` is [rows, rank] and ``down`` [rank, columns]; both have a leading axis of experts where
    ``experts`` is not None. With ``magnitude`` (one number for each row, or each column where
    ``by_column``) the sum is then scaled to rows, or columns, of exactly that norm.
    """

    module: str
    up: Factor
    down: Factor
    rank: int
    scale: float
    magnitude: str | None = None
    by_column: bool = False
    experts: int | None = None

    @property
    def flipped(self) -> Update:
        """The same update of the transposed matrix."""
        return Update(
            module=self.module,
            up=self.down.flipped,
            down=self.up.flipped,
            rank=self.rank,
            scale=self.scale,
            magnitude=self.magnitude,
            by_column=not self.by_column,
            experts=self.experts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """An update of rows ``[start, stop)`` of a source tensor, beginning at its row ``first``."""

    update: Update
    start: int
    stop: int
    first: int = 0
    expert: int | None = None
