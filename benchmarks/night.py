"""A night, simulated: many releases, a failing hub, workers killed; then everything is counted.

``python -m benchmarks.night --large`` makes forty twins of twelve architectures in three
organisations and four variants each; without it a night takes a minute. Workers are whole
``convert batch run`` processes with folders of their own and one ledger. Faults strike requests at
a rate, workers are killed at random moments, and new ones take their place until nothing is left
to do. ``problems`` then compares hub, ledger and folders with what should be there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

TYPES = (
    *("llama", "qwen3", "qwen2", "mistral", "gemma2", "phi3", "granite", "olmo2", "stablelm"),
    *("qwen3_moe", "minicpmv4_6", "bert"),
)
VARIANTS = ("bf16", "8bit", "4bit", "mxfp4")
ORGANISATIONS = ("north", "south", "west")
ACCOUNT = "night"
ROOT = Path(__file__).parents[1]
# Whatever the hub client may do on its own, and short waits where it would take minutes.
ENVIRONMENT = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | {
    "OMP_NUM_THREADS": "1",
    "HF_TOKEN": "hf_sentinelOfTheNight",
}


TURN_S = 0.5
REST_S = 3.0
"""Between two starts of workers."""
Process = subprocess.Popen[bytes]


@dataclass(slots=True)
class Night:
    """What is simulated, and what came of it."""

    root: Path
    types: Sequence[str]
    count: int
    variants: Sequence[str]
    rate: float = 0.1
    seed: int = 0
    workers: int = 2
    kill_every: float | None = 60.0
    twin: bool = True
    deadline: float = 3600.0
    ledger: str | None = None
    choose: Callable[[Night, dict[int, Process]], Process | None] | None = None
    """Names the worker to kill now, if any; by default ``kill_every`` decides."""
    after: Callable[[Any], None] | None = None
    """Called with the hub's client when the work is done, before the hub goes."""
    say: Callable[[str], None] = print
    killed: int = 0
    started: int = 0
    seconds: float = 0.0
    struck: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    expected: dict[str, str] = field(default_factory=dict)
    """Target -> "published", or the class of the failure that is to park it."""
    rows: list[dict[str, Any]] = field(default_factory=list)


def simulate(night: Night) -> list[str]:
    """Run a night and return everything that is not as it should be."""
    from huggingface_hub import HfApi

    from converter.staging import Faults, StagingOptions, Weather, running_hub

    faults = Faults()
    options = StagingOptions(user=ACCOUNT, page_size=7)
    with running_hub(night.root / "hub", options=options, faults=faults) as endpoint:
        api = HfApi(endpoint=endpoint, token=ENVIRONMENT["HF_TOKEN"])
        _stock(night, api)
        faults.weather = Weather(night.rate, seed=night.seed)
        begun = time.monotonic()
        _work(night, endpoint)
        night.seconds = time.monotonic() - begun
        night.struck, night.requests = faults.struck, len(faults.requests)
        faults.weather = None
        if night.after is not None:
            night.after(api)
        return problems(night, api)


def _stock(night: Night, api: Any) -> None:
    """The releases: sound twins, and one of each kind that cannot be published."""
    from validate.twin import load_example, make_twin

    twins = night.root / "twins"
    for number in range(night.count):
        kind = night.types[number % len(night.types)]
        repo = f"{ORGANISATIONS[number % 3]}/{kind.replace('_', '-')}-{number}"
        folder = twins / repo
        make_twin(load_example(kind), folder, dtype="bfloat16", seed=number)
        _card(folder)
        _upload(api, repo, folder)
        for variant in night.variants:
            night.expected[f"{ACCOUNT}/{repo.split('/')[1]}-{variant}"] = "published"
        night.say(f"stocked {repo}")
    sound = twins / f"{ORGANISATIONS[0]}/{night.types[0].replace('_', '-')}-0"
    for name, spoil, expected in (
        ("unheard-of", _unknown, "unsupported"),
        ("damaged", _not_a_number, "unsupported"),
        ("locked", None, "gated"),
    ):
        folder = twins / name
        shutil.copytree(sound, folder)
        if spoil is not None:
            spoil(folder)
        repo = f"{ORGANISATIONS[1]}/{name}"
        _upload(api, repo, folder)
        if expected == "gated":
            api.update_repo_settings(repo, gated="manual")
        for variant in night.variants:
            night.expected[f"{ACCOUNT}/{name}-{variant}"] = expected
    shutil.rmtree(twins)


def _card(folder: Path) -> None:
    text = "---\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n# A release\n"
    (folder / "README.md").write_text(text)


def _upload(api: Any, repo: str, folder: Path) -> None:
    api.create_repo(repo)
    with patch("huggingface_hub.constants.HF_HUB_DISABLE_XET", True):
        api.upload_folder(repo_id=repo, folder_path=folder)


def _unknown(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "unheard_of"}))


def _not_a_number(folder: Path) -> None:
    """One NaN in a weight matrix: sound by its headers, and not to be converted."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(n for n, t in header.items() if len(t.get("shape", ())) == 2)
    start = 8 + length + header[name]["data_offsets"][0]
    data[start : start + 2] = b"\xc0\x7f"
    path.write_bytes(data)


def _watchlist(night: Night) -> Path:
    path = night.root / "watch.toml"
    path.write_text(
        f"""namespace = "{ACCOUNT}"
[[watch]]
organisations = {json.dumps(ORGANISATIONS)}
variants = {json.dumps(list(night.variants))}
[watch.gates]
twin = {str(night.twin).lower()}
allow_gated = true
[retries]
first_wait = "1s"
longest_wait = "8s"
patience = "20s"
lease = "20s"
"""
    )
    return path


def _work(night: Night, endpoint: str) -> None:
    """Start workers, kill some, start others, until a run finds nothing left to do."""
    watchlist = _watchlist(night)
    temporary = night.root / "tmp"
    temporary.mkdir()
    environment = os.environ | ENVIRONMENT
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(night.root / "home")}
    environment |= {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    ledger = night.ledger or f"sqlite:///{night.root / 'ledger.db'}"
    running: dict[int, Process] = {}
    choose = night.choose or _every(night.kill_every, random.Random(night.seed))
    rested = 0.0
    begun = time.monotonic()

    def start(number: int) -> Process:
        night.started += 1
        state = night.root / f"w{number}"
        command = [sys.executable, "-m", "converter", "batch", "run", str(watchlist)]
        command += ["--state", str(state), "--ledger", ledger, "--quiet"]
        return subprocess.Popen(command, env=environment, cwd=night.root, start_new_session=True)

    try:
        while True:
            for number in range(night.workers):
                process = running.get(number)
                if process is None or process.poll() is not None:
                    if process is not None and _settled(ledger):
                        for other in running.values():
                            other.wait(timeout=120)
                        return
                    if time.monotonic() > rested:
                        rested = time.monotonic() + REST_S
                        running[number] = start(number)
            if time.monotonic() - begun > night.deadline:
                night.say("the night is over before the work is")
                return
            victim = choose(night, running)
            if victim is not None and victim.poll() is None:
                victim.send_signal(signal.SIGKILL)  # alone: its children have to notice
                night.killed += 1
            time.sleep(TURN_S)
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _every(
    seconds: float | None, rng: random.Random
) -> Callable[[Night, dict[int, Process]], Process | None]:
    """Somebody who kills a worker at random every so often."""
    due = time.monotonic() + (seconds or 0)

    def choose(night: Night, running: dict[int, Process]) -> Process | None:
        nonlocal due
        if seconds is None or time.monotonic() < due:
            return None
        due = time.monotonic() + seconds
        return rng.choice(list(running.values()))

    return choose


def _settled(ledger: str) -> bool:
    """Whether every job in the ledger is published, parked, or waits for somebody's permission."""
    entries = _entries(ledger)
    return bool(entries) and all(entry["state"] not in ("queued", "running") for entry in entries)


def _entries(ledger: str) -> list[dict[str, Any]]:
    from converter.batch.catalogue import Catalogue
    from converter.batch.database import Database
    from converter.batch.ledger import Ledger
    from converter.batch.status import rows_of

    database = Database(ledger)
    try:
        return rows_of(Catalogue(Ledger(database)).entries())
    finally:
        database.close()


def problems(night: Night, api: Any) -> list[str]:
    """What differs from a perfect night: on the hub, in the ledger, in folders, in logs."""
    night.rows = _entries(night.ledger or f"sqlite:///{night.root / 'ledger.db'}")
    by_target = {row["target"]: row for row in night.rows}
    found = []
    for target, expected in night.expected.items():
        row = by_target.get(target)
        if row is None:
            found.append(f"{target}: is not in the ledger")
            continue
        said = row["state"] if expected == "published" else row["class"]
        if said != expected:
            found.append(f"{target}: {row['state']}, {row['class']}: {row['error']}")
        elif expected == "published":
            found += _unlike(api, target, row)
        elif api.repo_exists(target):
            found.append(f"{target}: was published, and is {expected}")
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


def _unlike(api: Any, target: str, row: dict[str, Any]) -> list[str]:
    """Whether a repo holds exactly what the ledger says, from exactly one upload."""
    from converter.batch.published import find_published

    uploads = [c for c in api.list_repo_commits(target) if c.title.startswith("Convert ")]
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


def summary(night: Night, found: Sequence[str]) -> str:
    """The night in a few lines."""
    states = Counter(f"{row['state']} {row['class'] or ''}".strip() for row in night.rows)
    lost = sum(row["lost"] for row in night.rows)
    lines = [
        f"{night.count} sound releases of {len(set(night.types))} types, {len(night.variants)} "
        f"variants each, 3 that cannot be published; {night.seconds:.0f} s",
        f"{night.requests} requests, {sum(night.struck.values())} met a fault: "
        + ", ".join(f"{count} {kind}" for kind, count in night.struck.most_common()),
        f"{night.started} workers started, {night.killed} killed; {lost} jobs in hand were lost",
        "jobs: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items())),
        f"{len(found)} problems",
    ]
    return "\n".join([*lines, *found])


def main() -> int:
    """Simulate one night and print what came of it; 0 when it was perfect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="40 releases, 12 types, 4 variants")
    parser.add_argument("--count", type=int, help="sound releases")
    parser.add_argument("--rate", type=float, default=0.1, help="of requests that meet a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill-every", type=float, default=60.0, help="seconds; 0: never")
    parser.add_argument("--deadline", type=float, default=7200.0, help="seconds")
    parser.add_argument("--ledger", help="SQLAlchemy URL; default: SQLite")
    parser.add_argument("--keep", type=Path, help="work here, and leave everything")
    given = parser.parse_args()
    root = given.keep or Path(tempfile.mkdtemp(prefix="night-"))
    root.mkdir(parents=True, exist_ok=True)
    night = Night(
        root=root.resolve(),
        types=TYPES if given.large else TYPES[:3],
        count=given.count or (40 if given.large else 3),
        variants=VARIANTS if given.large else VARIANTS[1:3],
        rate=given.rate,
        seed=given.seed,
        workers=given.workers,
        kill_every=given.kill_every or None,
        deadline=given.deadline,
        ledger=given.ledger,
    )
    try:
        found = simulate(night)
    finally:
        if given.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    print(summary(night, found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
