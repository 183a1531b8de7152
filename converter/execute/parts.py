"""A conversion in parts: some shards of every output, made by any process that has the folders.

Each part writes whole files and nothing else, so that no two processes ever share one; a record
with their hashes says that they are finished. The run that makes an output whole takes what is
recorded as done, makes the rest itself, and removes the records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from converter.atomic import write_atomic
from converter.errors import UsageError
from converter.execute.folder import sync_folder
from converter.execute.journal import NAME as JOURNAL
from converter.plan.model import Output, Plan, Shard

_RECORD: Final = ".done"


@dataclass(frozen=True, slots=True)
class Part:
    """The ``number``-th of ``count`` parts, counted from one."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """From ``2/4``; raises UsageError."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UsageError(f"--shard {text}: give a part and their count, such as 2/4")
        return cls(int(found[1]), int(found[2]))

    @property
    def name(self) -> str:
        """As files of the work folder are called after it."""
        return f"{self.number}-of-{self.count}"

    def shards(self, plan: Plan) -> tuple[Shard, ...]:
        """The shards of a plan that are this part's: a run of neighbours, maybe none."""
        every = len(plan.shards)
        first = (self.number - 1) * every // self.count
        return plan.shards[first : self.number * every // self.count]


def outputs_of(plan: Plan, shards: Sequence[Shard]) -> list[Output]:
    """The parameters that are stored in these shards, those on a boundary included."""
    names = {shard.file for shard in shards}
    return [out for out in plan.outputs if any(t.file in names for t in out.stored.values())]


def most_parts(plans: Sequence[Plan]) -> int:
    """Into how many parts plans can be cut so that each part has a shard of every plan.

    The source is then read once in all, but for tensors that lie on a boundary.
    """
    return min(len(plan.shards) for plan in plans)


def record(
    work: Path, part: Part, plan: Plan, stamp: Mapping[str, Any], digests: Mapping[str, str]
) -> None:
    """Write down that these files are whole and on disk, by sha256."""
    data = {"plan": plan.hash, "source": stamp, "files": digests}
    path = work / f"{_RECORD}.{part.name}.json"
    write_atomic(path, json.dumps(data) + "\n")
    sync_folder(work)


def forget(work: Path, files: Collection[str]) -> None:
    """Remove the records of files that are about to be written anew.

    They would outlive what they vouch for: a later run of the same weights would believe them.
    """
    for path in work.glob(f"{_RECORD}.*.json"):
        if set(files) & _read(path).get("files", {}).keys():
            path.unlink(missing_ok=True)


def recorded(work: Path, plan: Plan, stamp: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of every finished file of this plan and source, by name."""
    sizes = {shard.file: shard.size for shard in plan.shards}
    asked = json.loads(json.dumps({"plan": plan.hash, "source": stamp}))
    found: dict[str, str] = {}
    for path in sorted(work.glob(f"{_RECORD}.*.json")):
        data = _read(path)
        if data and {key: data.get(key) for key in asked} == asked:
            found |= {
                file: digest
                for file, digest in data["files"].items()
                if (work / file).is_file() and (work / file).stat().st_size == sizes.get(file)
            }
    return found


def _read(path: Path) -> dict[str, Any]:
    """A record; empty for one that a power cut tore, which vouches for nothing."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(data, dict) and isinstance(data.get("files"), dict)
    return data if whole else {}


def forget_parts(work: Path) -> None:
    """Remove records and journals of parts from a folder that has become whole."""
    drafts = work.glob(f".{'[0-9a-f]' * 16}.partial")  # of programs that were killed
    for path in (*work.glob(f"*{_RECORD}.*"), *work.glob(f"{JOURNAL}.*"), *drafts):
        path.unlink(missing_ok=True)
