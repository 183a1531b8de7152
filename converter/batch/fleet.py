"""The fleet engine: Dask's scheduler hands what is due to workers, who claim it in the ledger.

Tasks name a release or a piece by its number, and nothing else: no path, no recipe, no secret.
What became of it is read from the ledger, so a scheduler, a worker or this process may be lost at
any moment; what is still due is handed out again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from converter.batch.catalogue import Catalogue
from converter.batch.claims import Due, Used
from converter.batch.dask import DISK, MEMORY, Scheduler, asked, distributed, fits
from converter.batch.engine import Outcome
from converter.batch.failures import Failure
from converter.batch.fleet_worker import PIECE, RELEASE, work_on
from converter.batch.ledger import Ledger
from converter.batch.pieces import Pieces
from converter.errors import ConvertError
from converter.ui import size_text

TURN_S: Final = 0.5
CONNECT_S: Final = 5.0
_PIECE_BYTES: Final = 1_000_000_000
"""Memory of one streaming conversion."""
_LONGEST_REST_S: Final = 60.0
_BASE_BYTES: Final = 1_000_000_000
Key = tuple[str, int]


@dataclass(slots=True)
class _Rest:
    """When something that a worker could not claim is handed out again."""

    until: float
    wait: float


class Fleet:
    """Hands out a ledger's work until nothing is due."""

    def __init__(
        self,
        ledger: Ledger,
        scheduler: Scheduler,
        *,
        shared: bool,
        say: Callable[[str], None],
    ) -> None:
        """``shared`` says that an output can be carried on by another worker."""
        self.ledger = ledger
        self.catalogue = Catalogue(ledger)
        self.pieces = Pieces(ledger)
        self.scheduler = scheduler
        self.shared = shared
        self.say = say
        self.stopping = 0
        self._client: Any = None
        self._lost_at = time.monotonic()
        self._given: dict[Key, Any] = {}
        self._rests: dict[Key, _Rest] = {}
        self._jobs: set[int] = set()
        self._silent = False

    def stop(self) -> None:
        """Hand out nothing more; workers finish what they have."""
        self.stopping += 1

    def run(self) -> Outcome:
        """Hand out until nothing is due within the ledger's patience, or until stopped."""
        try:
            while self._turn():
                time.sleep(TURN_S)
        finally:
            self._disconnect()
        return self._outcome()

    def _turn(self) -> bool:
        if self.stopping:
            return False
        if not self._connected():
            return True
        self._collect()
        workers = self._workers()
        self.ledger.tags = frozenset(name for one in workers.values() for name in one)
        self._hand_out(workers)
        if self._given:
            return True
        due = self.ledger.next_due()
        return (due is not None and due <= self.ledger.retries.patience) or self._others_at_work()

    def _connected(self) -> bool:
        """Whether there is a scheduler; one that is away is waited for as long as a retry is."""
        if self._client is not None and self._client.status == "running":
            return True
        self._disconnect()
        try:
            self._client = distributed().Client(
                self.scheduler.address,
                security=self.scheduler.security(),
                timeout=CONNECT_S,
                set_as_default=False,
            )
        except (OSError, TimeoutError) as error:
            if time.monotonic() - self._lost_at > self.ledger.retries.patience:
                raise ConvertError(
                    f"{self.scheduler.address}: no scheduler answers; start one with "
                    "`dask scheduler`"
                ) from error
            if not self._silent:
                self.say(f"{self.scheduler.address}: the scheduler is away")
            self._silent = True
            return False
        self._silent = False
        self.say(f"{self.scheduler.address}: {len(self._workers())} workers")
        return True

    def _disconnect(self) -> None:
        if self._client is not None:
            self._lost_at = time.monotonic()
            for future in self._given.values():
                future.release()
            self._client.close(timeout=5)
        self._client = None
        self._given.clear()

    def _workers(self) -> dict[str, dict[str, float]]:
        """The resources of every worker that the scheduler knows, by address."""
        known = self._client.scheduler_info(n_workers=-1)["workers"]
        return {address: dict(one.get("resources") or {}) for address, one in known.items()}

    def _collect(self) -> None:
        """Let go of what has ended, however it did: the ledger knows what it came to."""
        for key, future in list(self._given.items()):
            if future.status == "pending":
                continue
            del self._given[key]
            taken = future.status == "finished" and future.result()
            if taken:
                self._rests.pop(key, None)
            else:  # somebody else has it, or the worker was lost while its lease goes on
                wait = min(2 * self._rests[key].wait, _LONGEST_REST_S) if key in self._rests else 1
                self._rests[key] = _Rest(time.monotonic() + wait, wait)
            future.release()

    def _hand_out(self, workers: Mapping[str, Mapping[str, float]]) -> None:
        if not workers:
            return
        for due in self.ledger.due():
            self._jobs |= {task.id for task in due.tasks}
            if not self._resting((RELEASE, due.release)):
                wanted, planned = self._wanted(due, workers)
                if not any(fits(wanted, one) for one in workers.values()):
                    if planned:
                        self._refuse(due, wanted, workers)
                        continue
                    wanted |= {MEMORY: 0.0, DISK: 0.0}  # somebody has to plan it, to know
                self._submit((RELEASE, due.release), due.repo, due.commit, wanted)
        for number, repo, commit in self.pieces.open():
            if not self._resting((PIECE, number)):
                wanted = asked(memory=_PIECE_BYTES, disk=0, tag=None)
                self._submit((PIECE, number), repo, commit, wanted)

    def _resting(self, key: Key) -> bool:
        rest = self._rests.get(key)
        return key in self._given or (rest is not None and time.monotonic() < rest.until)

    def _wanted(
        self, due: Due, workers: Mapping[str, Mapping[str, float]]
    ) -> tuple[dict[str, float], bool]:
        """Memory, disk and tag that a release needs, and whether that is known from its plans."""
        tasks = [task for task in due.tasks if task.kind != "card"]  # a card needs nothing
        planned = [task.facts["needs"] for task in tasks if "needs" in task.facts]
        if planned:
            needs = {name: max(int(one[name]) for one in planned) for name in (MEMORY, DISK)}
        else:  # 2 bytes a parameter there, two models of 4 bytes each in a proof
            size = due.weight_bytes if tasks else 0
            needs = {MEMORY: 4 * size + _BASE_BYTES, DISK: (3 + len(tasks)) * size}
        tags = {task.needs for task in tasks} - {None}
        if not self.shared:
            tags |= {task.policy.get("accept") for task in tasks} - {None}
        there = {name for one in workers.values() for name in one}
        tag = min((str(tag) for tag in tags if tag in there), default=None)
        return asked(memory=needs[MEMORY], disk=needs[DISK], tag=tag), bool(planned)

    def _submit(self, key: Key, repo: str, commit: str, wanted: dict[str, float]) -> None:
        kind, number = key
        self._given[key] = self._client.submit(
            work_on,
            kind,
            number,
            repo,
            commit,
            key=f"{kind}-{number}-{uuid.uuid4().hex[:8]}",
            pure=False,
            resources=wanted,
        )

    def _refuse(
        self, due: Due, wanted: Mapping[str, float], workers: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Say in the ledger that no worker is large enough."""
        claim = self.ledger.claim(only=due.release)
        if claim is None:
            return
        tags = wanted.keys() - {MEMORY, DISK}
        able = [one for one in workers.values() if tags <= one.keys()]
        most = {name: max(one[name] for one in able) for name in (MEMORY, DISK)}
        lacks = [
            f"{size_text(int(wanted[name]))} of {name} where the largest worker has "
            f"{size_text(int(most[name]))}"
            for name in most
            if wanted[name] > most[name]
        ]
        both = " and ".join(f"{size_text(int(wanted[name]))} of {name}" for name in most)
        needs = " and ".join(lacks) or f"{both} on one worker"
        failure = Failure("resources", f"{claim.repo}: needs {needs}")
        used = Used(started=time.time(), ended=time.time())
        for task in claim.tasks:
            self.ledger.failed(claim, task.id, "fetch", used, failure)
        self.ledger.give_back(claim)
        self.say(failure.text)

    def _others_at_work(self) -> bool:
        """Whether a worker has something of this run in hand that no task stands for any more."""
        return any(e.running for e in self.catalogue.entries() if e.job.id in self._jobs)

    def _outcome(self) -> Outcome:
        """What became of everything that was handed out, by the ledger."""
        outcome = Outcome(stopped=bool(self.stopping))
        for entry in self.catalogue.entries():
            job = entry.job
            if job.id not in self._jobs:
                continue
            told = {"target": job.target, "repo": entry.release.repo}
            if job.state == "published":
                outcome.published.append(told | {"address": job.facts.get("address")})
            elif job.error is not None:
                told |= {"commit": entry.release.commit, "state": job.state}
                outcome.failed.append(told | {"class": job.error_class, "reason": job.error})
        return outcome
