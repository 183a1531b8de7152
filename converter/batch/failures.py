"""What went wrong in a stage, as a class, and what a class of failure means for its job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from converter.errors import ConvertError, GateError, HubError, PlanError, UsageError
from converter.execute.folder import BusyError

if TYPE_CHECKING:
    from converter.batch.watchlist import Retries

Kind = Literal[
    "unsupported",  # the release cannot be converted by this version
    "gate",  # converted, and not good enough to be published
    "usage",  # the watch list asks for something that cannot be
    "failed",  # a step said no, for good
    "gated",  # access to the release has to be granted first
    "resources",  # more disk or memory than the budget has
    "refused",  # the hub says 401, 403 or 404
    "hub",  # the hub or the network failed
    "disk",  # the disk is full or failing, or another process has the folder
    "crash",  # the process died, or ran out of memory
    "internal",  # a fault of this program
    "lost",  # the worker vanished with its lease
    "held",  # parked by hand
    "adapter",  # waits for its adapter or text, which does not lie on this machine
    "worker",  # waits for a worker with the tag that a stage needs
]
State = Literal["queued", "waiting", "parked", "quarantined", "published", "superseded"]

PERMANENT: Final = frozenset({"unsupported", "gate", "usage", "failed"})
"""Parked at once; another version of the tools, or other gates, give a new chance."""
WAITING: Final = frozenset({"gated", "resources", "adapter"})
BELIEVED_AFTER: Final = 3
"""Refusals in a row before a 401, 403 or 404 is taken for the truth: a hub shows new repos late."""
CRASHES: Final = 2
_FATAL: Final = frozenset({"crash", "internal"})


class AdapterError(UsageError):
    """The adapter or calibration text of a job does not lie where the watch list says."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed stage: its class and one readable paragraph without secrets."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a job: its next state, and the seconds until it is due again."""

    state: State
    wait: float = 0.0


def classify(error: BaseException) -> Failure:
    """The failure behind an exception of a stage."""
    from converter.hub.errors import redact

    return Failure(_kind(error), redact(_text(error)))


def verdict(kind: Kind, *, attempts: int, crashes: int, lost: int, retries: Retries) -> Verdict:
    """What a failure means after ``attempts`` failures of that stage, this one included."""
    if kind in PERMANENT:
        return Verdict("parked")
    if kind in WAITING:
        return Verdict("waiting", retries.gated_wait)
    if kind in _FATAL and crashes >= CRASHES:
        return Verdict("quarantined")
    limit = min(BELIEVED_AFTER, retries.attempts) if kind == "refused" else retries.attempts
    if (lost if kind == "lost" else attempts) >= limit:
        return Verdict("parked")
    return Verdict("queued", min(retries.longest_wait, retries.first_wait * 2 ** (attempts - 1)))


def _kind(error: BaseException) -> Kind:
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, PlanError):
        return "unsupported"
    if isinstance(error, GateError):
        return "gate"
    if isinstance(error, BusyError):
        return "disk"
    if isinstance(error, AdapterError):
        return "adapter"
    if isinstance(error, UsageError):
        return "usage"
    if isinstance(error, HubError):
        from converter.hub.errors import status_of

        if any(isinstance(cause, GatedRepoError) for cause in _causes(error)):
            return "gated"
        if _full_disk(error):
            return "disk"
        return "refused" if status_of(error) in (401, 403, 404) else "hub"
    if isinstance(error, MemoryError):
        return "crash"
    if isinstance(error, OSError) or any(isinstance(c, OSError) for c in _causes(error)):
        return "disk"
    return "failed" if isinstance(error, ConvertError) else "internal"


def _text(error: BaseException) -> str:
    if isinstance(error, ConvertError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"the process ran out of memory: {error}"
    return f"{type(error).__name__}: {error}"


def _full_disk(error: BaseException) -> bool:
    import errno

    full = (errno.ENOSPC, errno.EDQUOT)
    return any(isinstance(c, OSError) and c.errno in full for c in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    from converter.hub.errors import causes

    return causes(error)
