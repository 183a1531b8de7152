"""A night, simulated: many releases, a failing hub, workers killed; then everything is counted.

``python -m benchmarks.night --large`` makes forty twins of twelve architectures in three
organisations and four variants each; without it a night takes a minute. Faults strike requests at
a rate, a worker is killed at random every so often, the ledger's PostgreSQL is stopped as by a
power cut and started again, and what was killed is replaced until nothing is left to do
(`benchmarks.night_work`). ``problems`` then compares hub, ledger and folders with what should be
there (`benchmarks.night_report`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.night_report import problems, summary, write_outcome
from benchmarks.night_work import ENVIRONMENT, Process, work
from benchmarks.postgres import Server, running_postgres

TYPES = (
    *("llama", "qwen3", "qwen2", "mistral", "gemma2", "phi3", "granite", "olmo2", "stablelm"),
    *("qwen3_moe", "minicpmv4_6", "bert"),
)
VARIANTS = ("bf16", "8bit", "4bit", "mxfp4")
ORGANISATIONS = ("north", "south", "west")
ACCOUNT = "night"


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
    fleet: bool = False
    """Whether the workers are a Dask fleet's, or whole runs that share a ledger."""
    kill_every: float | None = 60.0
    restart_every: float | None = None
    """Seconds between two restarts of ``postgres``."""
    twin: bool = True
    deadline: float = 3600.0
    postgres: Server | None = None
    """The ledger's server; SQLite where there is none."""
    choose: Callable[[Night, dict[int, Process]], Process | None] | None = None
    """Names the worker to kill now, if any; by default ``kill_every`` decides."""
    after: Callable[[Any], None] | None = None
    """Called with the hub's client when the work is done, before the hub goes."""
    say: Callable[[str], None] = print
    ledger: str = ""
    killed: int = 0
    started: int = 0
    restarted: int = 0
    roles: Counter[str] = field(default_factory=Counter)
    """Kills of a fleet's scheduler and of its run."""
    seconds: float = 0.0
    struck: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    uploads: int = 0
    """Commits of conversions in the hub's own logs."""
    confirmed: dict[str, list[str]] = field(default_factory=dict)
    """Target -> failed checks, of what missed a gate in the night and in a calm conversion."""
    expected: dict[str, str] = field(default_factory=dict)
    """Target -> "published", or the class of the failure that is to park it."""
    rows: list[dict[str, Any]] = field(default_factory=list)


def simulate(night: Night) -> list[str]:
    """Run a night and return everything that is not as it should be."""
    from huggingface_hub import HfApi

    from converter.batch.database import ledger_url
    from converter.staging import Faults, StagingOptions, Weather, running_hub

    night.ledger = ledger_url(night.postgres.database() if night.postgres else None, night.root)
    faults = Faults()
    options = StagingOptions(user=ACCOUNT, page_size=7)
    with running_hub(night.root / "hub", options=options, faults=faults) as endpoint:
        api = HfApi(endpoint=endpoint, token=ENVIRONMENT["HF_TOKEN"])
        _stock(night, api)
        faults.weather = Weather(night.rate, seed=night.seed)
        begun = time.monotonic()
        work(night, endpoint, _watchlist(night))
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
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
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
attempts = 10
first_wait = "1s"
longest_wait = "8s"
patience = "20s"
lease = "20s"
"""
    )
    return path


def main() -> int:
    """Simulate one night and print what came of it; 0 when it was perfect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="40 releases, 12 types, 4 variants")
    parser.add_argument("--count", type=int, help="sound releases")
    parser.add_argument("--types", nargs="+", help="model types")
    parser.add_argument("--rate", type=float, default=0.1, help="of requests that meet a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fleet", action="store_true", help="Dask workers instead of whole runs")
    parser.add_argument("--kill-every", type=float, default=60.0, help="seconds; 0: never")
    parser.add_argument("--postgres", action="store_true", help="instead of SQLite")
    parser.add_argument("--restart-every", type=float, default=240.0, help="PostgreSQL, seconds")
    parser.add_argument("--deadline", type=float, default=7200.0, help="seconds")
    parser.add_argument("--keep", type=Path, help="work here, and leave everything")
    parser.add_argument("--out", type=Path, help="folder that takes night.md and night.json")
    given = parser.parse_args()
    root = given.keep or Path(tempfile.mkdtemp(prefix="night-"))
    root.mkdir(parents=True, exist_ok=True)
    types = tuple(given.types or (TYPES if given.large else TYPES[:3]))
    with ExitStack() as stack:
        if given.keep is None:
            stack.callback(shutil.rmtree, root, ignore_errors=True)
        night = Night(
            root=root.resolve(),
            types=types,
            count=given.count or (40 if given.large else 3),
            variants=VARIANTS if given.large else VARIANTS[1:3],
            rate=given.rate,
            seed=given.seed,
            workers=given.workers,
            fleet=given.fleet,
            kill_every=given.kill_every or None,
            restart_every=given.restart_every or None,
            deadline=given.deadline,
            postgres=stack.enter_context(running_postgres()) if given.postgres else None,
        )
        found = simulate(night)
    if given.out is not None:
        write_outcome(night, found, given.out)
    print(summary(night, found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
