"""What a worker holds of the ledger, or could hold: plain data that crosses to other modules."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sqlalchemy import Row


class LeaseLostError(Exception):
    """Another worker holds the release now; whatever was in hand is to be dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One job of a claim."""

    id: int
    kind: str
    variant: str
    target: str
    recipe: Mapping[str, Any]
    policy: Mapping[str, Any]
    attempts: Mapping[str, int]
    facts: Mapping[str, Any]
    needs: str | None


def task_of(row: Row[Any]) -> Task:
    """A row of the job table as a task."""
    return Task(**{item.name: getattr(row, item.name) for item in fields(Task)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A release that could be claimed now, with the jobs that are due."""

    release: int
    repo: str
    commit: str
    weight_bytes: int
    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim(Due):
    """A release that a worker holds, until somebody holds it with a higher ``fence``."""

    fence: int

    @classmethod
    def of(cls, due: Due, *, fence: int) -> Claim:
        """A release that was due and has been taken."""
        return cls(**{item.name: getattr(due, item.name) for item in fields(Due)}, fence=fence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What a stage took: seconds since 1970 by this machine's clock, bytes of memory and data."""

    started: float
    ended: float
    peak_memory: int | None = None
    bytes: int | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
