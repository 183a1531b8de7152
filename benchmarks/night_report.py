"""What a simulated night came to: everything that is not as it should be, and the figures."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import describe, load
from benchmarks.night_work import ENVIRONMENT, ROOT, entries

if TYPE_CHECKING:
    from benchmarks.night import Night


def problems(night: Night, api: Any) -> list[str]:
    """What differs from a perfect night: on the hub, in the ledger, in folders, in logs."""
    night.rows = entries(night.ledger)
    by_target = {row["target"]: row for row in night.rows}
    found = []
    for target, expected in night.expected.items():
        row = by_target.get(target)
        if row is None:
            found.append(f"{target}: is not in the ledger")
            continue
        said = row["state"] if expected == "published" else row["class"]
        if expected == "published" and row["class"] == "gate":
            found += _unconfirmed(night, api, row)
        elif said != expected:
            found.append(f"{target}: {row['state']}, {row['class']}: {row['error']}")
        elif expected == "published":
            found += _unlike(night, api, target, row)
        if row["state"] != "published" and api.repo_exists(target):
            found.append(f"{target}: was published, and is {row['state']}")
    unasked = sorted(set(by_target) - set(night.expected))
    found += [f"{target}: nobody asked for it" for target in unasked]
    for folder in (*night.root.glob("w*/work"), *night.root.glob("w*/tmp"), night.root / "tmp"):
        left = [path for path in folder.iterdir() if path.name != "mlx"]  # MLX's own kernels
        found += [f"left behind: {path}" for path in left]
    secret = ENVIRONMENT["HF_TOKEN"].encode()
    for log in night.root.glob("w*/logs/*"):
        if secret in log.read_bytes():
            found.append(f"{log}: holds the token")
    return found


def _unlike(night: Night, api: Any, target: str, row: dict[str, Any]) -> list[str]:
    """Whether a repo holds exactly what the ledger says, from exactly one upload."""
    from converter.batch.published import find_published

    uploads = [c for c in api.list_repo_commits(target) if c.title.startswith("Convert ")]
    night.uploads += len(uploads)
    found = []
    if len(uploads) != 1:
        found.append(f"{target}: was uploaded {len(uploads)} times")
    with tempfile.TemporaryDirectory() as folder:
        there = find_published(
            target, row["facts"]["plan"], Path(folder) / "x", endpoint=api.endpoint
        )
    if there is None or there.facts["checkpoint"] != row["facts"]["checkpoint"]:
        found.append(f"{target}: its files are not those of the ledger's plan")
    return found


def _unconfirmed(night: Night, api: Any, row: dict[str, Any]) -> list[str]:
    """Whether a gate that a sound release missed is missed by a calm conversion as well."""
    out = night.root / "calm" / row["variant"]
    command = [sys.executable, "-m", "converter", "--hf-path", row["repo"], "--mlx-path", str(out)]
    command += ["--revision", row["commit"], "--variants", row["variant"]]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    environment |= {"HF_ENDPOINT": api.endpoint, "HF_HOME": str(night.root / "calm" / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    reports = list(out.rglob("parity.json"))
    checks = json.loads(reports[0].read_text())["checks"] if reports else []
    failed = sorted(str(c["name"]) for c in checks if c["verdict"] == "fail")
    shutil.rmtree(night.root / "calm", ignore_errors=True)
    told = sorted(row["facts"]["parity"]["failed"])
    if done.returncode != 4 or failed != told:
        return [f"{row['target']}: missed {told} in the night and {failed} in a calm conversion"]
    night.confirmed[row["target"]] = failed
    return []


def summary(night: Night, found: Sequence[str]) -> str:
    """The night in a few lines."""
    lines = [f"{name}: {value}" for name, value in figures(night, found).items()]
    return "\n".join([*lines, *found])


def figures(night: Night, found: Sequence[str]) -> dict[str, str]:
    """The night's figures by what they count."""
    states = Counter(f"{row['state']} {row['class'] or ''}".strip() for row in night.rows)
    struck = ", ".join(f"{count} {kind}" for kind, count in night.struck.most_common())
    published = states["published"]
    return {
        "releases": f"{night.count} sound ones of {len(set(_types(night)))} types in 3 "
        f"organisations, and 3 that cannot be published; {len(night.variants)} variants each",
        "time": f"{night.seconds / 60:.1f} minutes, {night.workers} "
        + ("Dask workers" if night.fleet else "runs that share a ledger"),
        "requests": f"{night.requests}; {sum(night.struck.values())} met a fault: {struck}",
        "workers": f"{night.started} started, {night.killed} killed by SIGKILL; "
        f"{sum(row['lost'] for row in night.rows)} jobs in hand were lost"
        + "".join(f"; the {role} killed {count} times" for role, count in night.roles.items()),
        "database": "SQLite"
        if night.postgres is None
        else f"PostgreSQL, stopped and started {night.restarted} times",
        "jobs": ", ".join(f"{count} {state}" for state, count in sorted(states.items())),
        "uploads": f"{night.uploads} for {published} published outputs, by the hub's commit logs; "
        "every file compared with the ledger's manifest by sha256",
        "gates": f"{len(night.confirmed)} outputs missed one, each confirmed by a calm conversion"
        if night.confirmed
        else "missed by none",
        "problems": str(len(found)),
    }


def write_outcome(night: Night, found: Sequence[str], folder: Path) -> None:
    """Write night.md and night.json."""
    told = figures(night, found)
    reasons = Counter(
        (row["state"], row["class"], _reason(row)) for row in night.rows if row["error"]
    )
    machine = describe() | {"load at the end": f"{load():.1f}"}
    data = {
        "figures": told,
        "problems": list(found),
        "machine": machine,
        "rate": night.rate,
        "types": _types(night),
        "variants": list(night.variants),
        "confirmed": night.confirmed,
        "jobs": [
            {key: row[key] for key in ("target", "state", "class", "lost", "crashes")}
            | {"error": _anywhere(row["error"]), "checkpoint": row["facts"].get("checkpoint")}
            for row in night.rows
        ],
    }
    (folder / "night.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    lines = ["# A simulated night", ""]
    lines += [
        f"`{_command()}`: real conversions and proofs of twins against the staging hub. Made by",
        "that command; every job is in [night.json](night.json).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in told.items()),
        "",
        f"Types: {', '.join(_types(night))}. Variants: {', '.join(night.variants)}.",
        "",
        "| not published | jobs |",
        "|---|---|",
        *(
            f"| {state}, {kind}: {text} | {count} |"
            for (state, kind, text), count in reasons.most_common()
        ),
        "",
        *(f"- problem: {line}" for line in found),
        "Machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + ".",
    ]
    (folder / "night.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _types(night: Night) -> list[str]:
    """The types that the sound releases are of."""
    return list(night.types[: night.count])


def _command() -> str:
    """This run, but for folders of this machine."""
    given = iter(sys.argv[1:])
    words = [word for word in given if word not in ("--keep", "--out") or not next(given)]
    return shlex.join(["python", "-m", "benchmarks.night", *words])


def _anywhere(text: str | None) -> str | None:
    """A reason without what only this machine has: folders, and the hub's port."""
    if text is None:
        return None
    return re.sub(r"(http://127\.0\.0\.1):\d+", r"\1", text.partition("; see ")[0])


def _reason(row: dict[str, Any]) -> str:
    """A job's reason without what only names the job."""
    text = str(row["error"]).splitlines()[0]
    for name in (row["target"], row["repo"]):
        text = text.replace(name, "it")
    return text.partition("; see ")[0].partition(" Ask for access")[0].replace("|", "\\|")
