"""An engine's hands for pieces: conversions of other workers' releases that it helps with."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, Final

from converter.batch.budget import Budget
from converter.batch.child import Child, start
from converter.batch.failures import Failure
from converter.batch.ledger import Ledger
from converter.batch.orders import Answer, Order
from converter.batch.pieces import Piece, Pieces
from converter.batch.progress import parts_of
from converter.execute.parts import Part as Shards

LOOK_S: Final = 1.0
STAGE: Final = "convert"


class PieceWork:
    """Claims pieces, runs each in a child process, and says in the ledger what came of them."""

    def __init__(
        self,
        ledger: Ledger,
        folder_of: Callable[[str, str], Path],
        *,
        work: Callable[[Order], Answer],
        context: Any,
        workers: int,
        memory: Budget,
        say: Callable[[str], None],
    ) -> None:
        """``folder_of`` gives a release's folder by repo and commit; ``work`` is the stage.

        ``memory`` is what this machine may use of it, for all that it does.
        """
        self.pieces = Pieces(ledger)
        self.running: list[tuple[Child, Piece]] = []
        self.ended: list[Piece] = []
        """Pieces that have left, for whoever waits for one."""
        self._due: list[Piece] = []
        self._folder_of = folder_of
        self._work = work
        self._context = context
        self._workers = workers
        self._memory = memory
        self._say = say
        self._looked = 0.0

    def take(self, only: int) -> bool:
        """Claim a certain piece; whether it was free, and fits into this machine now."""
        return self._claim(only=only)

    def look(self, of: Collection[int] | None) -> None:
        """Claim some piece of these releases (None: of any), now and then."""
        if not self._due and time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            self._claim(of=of)

    def _claim(self, *, only: int | None = None, of: Collection[int] | None = None) -> bool:
        held = [one.id for one in self._held()]
        one = self.pieces.claim(held, only=only, of=of, memory=self._memory.left)
        if one is not None:
            self._due.append(one)
        return one is not None

    def _held(self) -> list[Piece]:
        return [one for _, one in self.running] + self._due

    def begin(self, free: Callable[[], bool]) -> None:
        """Start what is due, as long as there is a slot, and memory beside what else goes on."""
        while self._due and free():
            one = self._due[0]
            if not self._memory.reserve(_key(one), one.memory):
                return
            self._due.pop(0)
            order = self._order(one)
            self._say(f"{name_of(one)}: {STAGE} piece {one.number} of {one.count}")
            self.running.append((start(STAGE, order, self._work, self._context), one))

    def _order(self, one: Piece) -> Order:
        return Order(
            repo=one.repo,
            commit=one.commit,
            folder=self._folder_of(one.repo, one.commit),
            parts=parts_of(one.tasks),
            workers=self._workers,
            shards=Shards(one.number, one.count),
        )

    def listen(self) -> None:
        """Settle the pieces whose children have ended."""
        for child, one in list(self.running):
            ended = child.ended(partial(self._quote, one))
            if ended is None:
                continue
            self.running.remove((child, one))
            failed = [ended] if isinstance(ended, Failure) else [*ended.failed.values()]
            for why in failed[:1]:
                text = f"piece {one.number} of {one.count} is left to the holder of the release"
                self._say(f"{name_of(one)}: {text} ({why.kind}): {why.text}")
            self._leave(one, "failed" if failed else "done")

    def _quote(self, one: Piece, line: str) -> None:
        self._say(f"{name_of(one)} | {line}")

    def keep(self) -> None:
        """Prolong the leases, and stop work on pieces that have passed to another worker."""
        mine = self._held()
        lost = self.pieces.heartbeat(mine) if mine else set()
        for child, one in list(self.running):
            if one.id in lost:
                child.kill()
                self.running.remove((child, one))
                self._ended(one)
        for one in self._due:
            if one.id in lost:
                self._ended(one)
        self._due = [one for one in self._due if one.id not in lost]

    def give_back(self) -> None:
        """Stop, and leave every piece to others; what is on disk is resumed."""
        for child, _ in self.running:
            child.kill()
        for one in self._held():
            self._leave(one, "open")
        self.running, self._due = [], []

    def _leave(self, one: Piece, state: str) -> None:
        self.pieces.settle(one, state)
        self._ended(one)

    def _ended(self, one: Piece) -> None:
        self._memory.free(_key(one))
        self.ended.append(one)


def _key(one: Piece) -> tuple[str, int]:
    """What a piece's memory is set aside under."""
    return STAGE, one.id


def name_of(one: Piece) -> str:
    """The release as log lines name it."""
    return f"{one.repo}@{one.commit[:8]}"
