"""A fleet's worker: an engine that claims in the ledger what Dask's scheduler hands it.

Dask says who should try which release; the ledger says who has it. The engine outlives its
connection: a scheduler that is lost leaves what is in hand to be finished, and is joined again
when it is back.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

from converter.batch import budget
from converter.batch.catalogue import Catalogue
from converter.batch.child import WARM
from converter.batch.dask import Scheduler, distributed, offered
from converter.batch.engine import TICK_S, Engine, Stages
from converter.batch.ledger import Ledger
from converter.batch.piecework import STAGE as PIECE_STAGE
from converter.batch.progress import InHand
from converter.batch.run import FAILED, TERMINATED, engine_settings, stopping
from converter.batch.site import Place, Site, at_work
from converter.batch.sweep import sweep
from converter.batch.watchlist import Budgets, WatchList

RELEASE: Final = "release"
PIECE: Final = "piece"
SWEEP_S: Final = 20.0
_REJOIN_S: Final = 2.0
_serving: list[Service] = []
"""The service of this process, for the tasks that Dask runs in it."""


@dataclass(slots=True)
class _Asked:
    kind: str
    number: int
    repo: str
    commit: str
    done: Future[bool] = field(default_factory=Future)


class Service(Engine):
    """An engine that takes what it is asked to, and never ends by itself."""

    def __init__(self, ledger: Ledger, folder: Path, **settings: Any) -> None:
        """As Engine."""
        super().__init__(ledger, folder, **settings)
        self._inbox: SimpleQueue[_Asked] = SimpleQueue()
        self._waited: dict[tuple[str, int], _Asked] = {}
        self._swept = time.monotonic()

    def ask(self, kind: str, number: int, repo: str, commit: str) -> Future[bool]:
        """Take a release or piece; the future says whether it was free, once it has left."""
        asked = _Asked(kind, number, repo, commit)
        asked.done.set_running_or_notify_cancel()  # whoever stops waiting changes nothing here
        self._inbox.put(asked)
        return asked.done

    def close(self) -> None:
        """Answer what was never taken; the engine has ended."""
        while (asked := self._next()) is not None:
            asked.done.set_result(False)
        for asked in self._waited.values():
            asked.done.set_result(True)

    def _next(self) -> _Asked | None:
        try:
            return self._inbox.get_nowait()
        except Empty:
            return None

    def _claim(self) -> None:
        while (asked := self._next()) is not None:
            if (asked.kind, asked.number) in self._waited or not self._try(asked):
                asked.done.set_result(False)
            else:
                self._waited[asked.kind, asked.number] = asked
        for one in self._piecework.ended:
            self._answer(PIECE, one.id)
        self._piecework.ended.clear()

    def _help(self) -> None:
        if self.shared and self._hands and self._slot_free(PIECE_STAGE):
            self._piecework.look(set(self._hands))  # a scheduler that is lost stops nothing

    def _try(self, asked: _Asked) -> bool:
        if asked.kind == PIECE:
            free = partial(self._slot_free, PIECE_STAGE)
            taken = free() and self._piecework.take(asked.number)
            self._piecework.begin(free)  # at once, so that the next one finds its slot taken
            return taken
        claim = self.ledger.claim(self._hands, only=asked.number)
        if claim is None:
            return False
        if (claim.repo, claim.commit) != (asked.repo, asked.commit):
            self.ledger.give_back(claim)
            self.say(f"{asked.repo}: the scheduler's client has another ledger than this worker")
            return False
        self._twins = self.ledger.twins()
        self._take(claim)
        return True

    def _forget(self, hand: InHand) -> None:
        super()._forget(hand)
        self._answer(RELEASE, hand.claim.release)

    def _answer(self, kind: str, number: int) -> None:
        asked = self._waited.pop((kind, number), None)
        if asked is not None:
            asked.done.set_result(True)

    def _rest(self) -> bool:
        if time.monotonic() - self._swept > SWEEP_S:
            self._swept = time.monotonic()
            sweep(self.folder, Catalogue(self.ledger), shared=self.shared)
        time.sleep(TICK_S)
        return True


async def work_on(kind: str, number: int, repo: str, commit: str) -> bool:
    """What a task does in a worker: False when the ledger did not give it the claim."""
    (service,) = _serving
    return await asyncio.wrap_future(service.ask(kind, number, repo, commit))


def serve(
    watchlist: WatchList,
    place: Place,
    scheduler: Scheduler,
    *,
    tags: frozenset[str],
    echo: Callable[[str], None] | None = None,
    stages: Stages | None = None,
    preload: Sequence[str] = WARM,
) -> int:
    """Be a worker until SIGTERM; the exit status.

    Raises UsageError when another run or worker is at work in this state folder.
    """
    distributed()
    with at_work(watchlist, place, tags=tags, echo=echo) as site:
        site.sweep()
        settings = engine_settings(watchlist, stages)
        service = Service(site.ledger, site.work, say=site.say, preload=preload, **settings)
        ended = _attended(service, scheduler, watchlist.budgets, site)
        site.sweep()
        return TERMINATED if ended else FAILED


def _attended(service: Service, scheduler: Scheduler, budgets: Budgets, site: Site) -> bool:
    """Run the engine beside Dask's worker; whether it ended as it was asked to."""
    resources = offered(
        memory=budget.memory(budgets.memory).limit,
        # What lies here is counted in what its release needs, and is no loss of room for it.
        disk=budget.disk(site.work, budgets.disk).limit_with(budget.bytes_in(site.work)),
        tags=site.ledger.tags,
    )
    errors: list[BaseException] = []

    def engine() -> None:
        try:
            service.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=engine, name="engine")
    _serving.append(service)
    try:
        with stopping(service):
            thread.start()
            asyncio.run(_attend(service, scheduler, thread, resources, site))
    finally:
        service.stop()
        service.stop()
        thread.join()
        service.close()
        _serving.clear()
    if errors:
        raise errors[0]
    return service.outcome.stopped


async def _attend(
    service: Service,
    scheduler: Scheduler,
    thread: threading.Thread,
    resources: dict[str, float],
    site: Site,
) -> None:
    """Keep a Dask worker at the scheduler for as long as the engine lives."""
    library, say = distributed(), site.say
    tags = ", ".join(sorted(site.ledger.tags))
    say(f"looking for the fleet at {scheduler.address}, tagged {tags}")
    while thread.is_alive():
        worker = library.Worker(
            scheduler.address,
            nthreads=service.limit,
            resources=resources,
            name=f"{site.worker}{uuid.uuid4().hex[:4]}",
            security=scheduler.security(),
            memory_limit=0,  # the engine counts memory, and its children use it
            dashboard=False,
        )
        present = asyncio.ensure_future(_present(worker, say))
        while thread.is_alive() and not present.done():
            await asyncio.sleep(TICK_S)
        if not present.done():
            present.cancel()
        lost = (await asyncio.gather(present, return_exceptions=True))[0]
        if isinstance(lost, OSError | TimeoutError | None) and thread.is_alive():
            say("the scheduler is away; what is in hand goes on")
            await asyncio.sleep(_REJOIN_S)
        elif thread.is_alive() and isinstance(lost, BaseException):
            raise lost


async def _present(worker: Any, say: Callable[[str], None]) -> None:
    """From joining the scheduler until it is lost."""
    async with worker:
        say("joined the fleet")
        await worker.finished()
