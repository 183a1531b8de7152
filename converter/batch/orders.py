"""What a stage is told, and what it answers; plain data that crosses to a child process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converter.batch.failures import Failure
from converter.batch.recipes import Asked, Policy, digest
from converter.execute.folder import MANIFEST
from converter.execute.parts import Part as Shards
from converter.manifest import read_manifest
from converter.naming import DRAFTER, published_as


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One job of an order."""

    job: int
    variant: str
    target: str
    asked: Asked
    policy: Policy
    plan: str | None = None
    """Hash of the plan, once it is known: for a target size once its weights were measured."""
    drafter_plan: str | None = None
    """That of the drafter beside it, where one is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One folder that a job makes, and the repo that it is published in."""

    folder: Path
    target: str
    plan: str | None

    @property
    def finished(self) -> bool:
        """Whether the folder holds this plan's output, whole."""
        return (self.folder / MANIFEST).is_file() and read_manifest(self.folder).plan == self.plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One release at one commit, the jobs to do of it, and where to work."""

    repo: str
    commit: str
    folder: Path
    parts: tuple[Part, ...]
    workers: int = 2
    bandwidth: float | None = None
    """Bytes per second of downloading."""
    twins: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Verdict and text of the twins that are known, by the hash of their config."""
    shards: Shards | None = None
    """The part of a conversion that several workers share, None for all of it."""

    @property
    def cache(self) -> Path:
        """The release's files, in the layout of the hub's cache."""
        return self.folder / "hub"

    @property
    def source(self) -> Path:
        """The release as a folder, once it has been fetched."""
        name = f"models--{self.repo.replace('/', '--')}"
        return self.cache / name / "snapshots" / self.commit

    def kept_report(self, target: str) -> Path:
        """Where the parity report of an output that is not published stays."""
        return self.folder.parent.parent / "reports" / target

    def out(self, part: Part) -> Path:
        """Where a job's output is made."""
        return self.folder / "out" / part.target.rpartition("/")[2]

    def made(self, part: Part) -> tuple[Made, ...]:
        """All that a job makes: its output, and where it asks for one the drafter beside it."""
        out = self.out(part)
        output = Made(folder=out, target=part.target, plan=part.plan)
        _, *beside = published_as(part.target, mtp=part.asked.mtp)
        folder = out.with_name(out.name + DRAFTER)
        return output, *(Made(folder=folder, target=t, plan=part.drafter_plan) for t in beside)


@dataclass(slots=True, kw_only=True)
class Answer:
    """What a stage came to; a job is in ``failed`` or has passed."""

    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By job: what the ledger should keep."""
    failed: dict[int, Failure] = field(default_factory=dict)
    published: dict[int, str] = field(default_factory=dict)
    """By job: the address, where the stage ended it."""
    needs: dict[str, int] = field(default_factory=dict)
    """Bytes that the rest will take (`converter.batch.needs`)."""
    cuts: int = 1
    """Into how many pieces the conversion can be cut at the most."""
    twin: tuple[str, str, str] | None = None
    """A newly judged twin: hash of the config, verdict, text."""
    bytes: int | None = None
    """Bytes downloaded, written or uploaded."""


def together(parts: Sequence[Part]) -> list[tuple[Part, ...]]:
    """The parts that can be made in one run: with the same adapter, and all or none drafted for."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(digest([part.asked.adapter, part.asked.mtp]), []).append(part)
    return [tuple(group) for group in groups.values()]
