"""Shared by the tests of batches: ledgers with jobs in them, and stages that only pretend."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

from converter.batch.catalogue import Catalogue, Seen, Wanted
from converter.batch.claims import Used
from converter.batch.database import Database
from converter.batch.engine import Engine
from converter.batch.failures import Failure
from converter.batch.ledger import Ledger
from converter.batch.orders import Answer, Order
from converter.batch.recipes import Asked, Policy
from converter.batch.watchlist import Budgets, Retries, WatchList, read_watchlist
from converter.plan import Options
from quant.recipe import QuantSpec

TESTS = Path(__file__).parent
PATHS = os.pathsep.join([str(TESTS.parent), str(TESTS)])
RECIPES = {
    "bf16": Asked(options=Options(dtype="bfloat16")),
    "4bit": Asked(options=Options(quant=QuantSpec.make("affine", 4, 64))),
}


_opened: list[Database] = []


def ledger(url, **settings) -> Ledger:
    _opened.append(Database(url, patience=20))
    return Ledger(_opened[-1], retries=Retries(**settings))


def close_ledgers() -> None:
    while _opened:
        _opened.pop().close()


def seen(repo="acme/model", commit="c1", content="weights", modified=1.0) -> Seen:
    return Seen(repo=repo, commit=commit, content=content, weight_bytes=1000, modified=modified)


def wanted(repo="acme/model", *variants, policy=None) -> list[Wanted]:
    return [
        Wanted(
            variant=name,
            asked=RECIPES[name],
            target=f"night/{repo.split('/')[1]}-{name}",
            policy=policy or Policy(),
        )
        for name in variants or ("bf16",)
    ]


def add(catalogue: Catalogue, repo="acme/model", *variants, policy=None, **settings) -> int:
    return catalogue.enqueue(seen(repo, **settings), wanted(repo, *variants, policy=policy))


def states_of(catalogue: Catalogue) -> dict[str, str]:
    return {entry.job.target.split("/")[1]: entry.state for entry in catalogue.entries()}


def watch(tmp_path, text="", models='organisations = ["acme"]') -> WatchList:
    path = tmp_path / "watch.toml"
    path.write_text(f'namespace = "night"\n[[watch]]\n{models}\nvariants = ["4bit"]\n{text}')
    return read_watchlist(path)


def used(**settings) -> Used:
    return Used(started=time.time(), ended=time.time(), **settings)


def claims_of(url: str, results) -> None:
    """A worker that takes everything it can get; run in several processes at once."""
    mine = ledger(url)
    taken = []
    while (claim := mine.claim(taken)) is not None:
        taken.append(claim.release)
    close_ledgers()
    results.put(taken)


# Stages that tell what they did in a file, and fail as the release's name says.


def note(order: Order, stage: str, what: str) -> None:
    line = json.dumps([time.time(), stage, what, order.repo, len(order.parts)]) + "\n"
    with (order.folder.parent / "story.jsonl").open("a") as file:
        file.write(line)


def story(folder: Path) -> list[list]:
    path = folder / "story.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def first(name: str, tries: int) -> bool:
    """Whether this is the first try of all: here, or on any machine that has the folder ONCE."""
    if "ONCE" not in os.environ:
        return tries == 1
    try:
        Path(os.environ["ONCE"], name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def pretend(stage: str):
    def work(order: Order) -> Answer:
        note(order, stage, "begin")
        name = order.repo.split("/")[1]
        if name.startswith(f"kill-{stage}"):
            os.kill(os.getpid(), signal.SIGKILL)
        tries = [s for _, s, what, r, _ in story(order.folder.parent) if r == order.repo]
        if name.startswith(f"once-{stage}") and first(name, tries.count(stage)):
            time.sleep(float(name.rpartition("-")[2]))
        if name.startswith(f"slow-{stage}"):
            time.sleep(float(name.rpartition("-")[2]))
        if name == f"says-{stage}":
            print("token hf_sentinelsentinel in a library's own words", file=sys.stderr)
        if stage == "accept" and os.environ.get("METAL") is None:
            raise RuntimeError("accepted where there is no Metal")
        if name.startswith(f"raise-{stage}"):
            raise RuntimeError("a fault of the program")
        time.sleep(0.05)
        if name.startswith(f"flaky-{stage}") and tries.count(stage) < 4:
            kind = Failure("hub", "the hub is failing (HTTP 503)")
            return Answer(failed={part.job: kind for part in order.parts})
        note(order, stage, "end")
        jobs = [part.job for part in order.parts]
        answer = Answer(facts={job: {"plan": f"plan {job}"} for job in jobs}, bytes=10)
        if stage == "examine":
            size = int(name.rpartition("-")[2]) if name.startswith("needs-") else 100
            answer.needs = {"disk": size, "memory": size}
            answer.cuts = int(name.rpartition("-")[2]) if name.startswith("cut-") else 1
            facts = {"plan": "p", "output_bytes": 10, "needs": dict(answer.needs)}
            answer.facts = dict.fromkeys(jobs, facts)
        if stage in ("publish", "card"):
            answer.published = {job: f"http://hub/{job}" for job in jobs}
        return answer

    return work


NAMES = ("examine", "fetch", "convert", "prove", "accept", "publish", "card")
examine, fetch, convert, prove, accept, publish, card = map(pretend, NAMES)


def stage(name: str, order: Order) -> Answer:
    return globals()[name](order)


class Named:
    """A stage by its name, which can cross to another process."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, order: Order) -> Answer:
        return stage(self.name, order)


STAGES = {name: Named(name) for name in NAMES}

PRELOAD = ["batch_helpers"]

WATCHLIST = """
namespace = "night"
[[watch]]
organisations = ["nobody"]
variants = ["bf16"]
[retries]
lease = "{lease}"
first_wait = 0.05
patience = "{patience}"
{extra}
"""
PROGRAM = """
import importlib
import sys
from pathlib import Path
from converter.batch import run as module
from converter.batch.dask import Scheduler
from converter.batch.discover import Found
from converter.batch.fleet_worker import serve
from converter.batch.site import Place
from converter.batch.tags import with_own
from converter.batch.watchlist import read_watchlist
module.discover = lambda *arguments, **named: Found()
if __name__ == "__main__":
    helpers, role, state, ledger, address, watchlist, *tags = sys.argv[1:]
    helpers = importlib.import_module(helpers)
    place = Place.of(None, state=Path(state), ledger=ledger or None)
    read = read_watchlist(Path(watchlist))
    files = dict.fromkeys(("ca_file", "cert", "key"))
    scheduler = Scheduler.of(address, **files) if address else None
    told = dict(stages=helpers.STAGES, preload=helpers.PRELOAD)
    told |= dict(echo=lambda line: print(line, flush=True))
    if role == "worker":
        sys.exit(serve(read, place, scheduler, tags=with_own(tags), **told))
    sys.exit(module.run(read, place, name="watch.toml", scheduler=scheduler, **told))
"""


def write_program(folder: Path, *, lease: str, patience: str, extra: str = "") -> None:
    """``convert batch`` with stages that only pretend and no hub, and its watch list."""
    (folder / "program.py").write_text(PROGRAM)
    watchlist = WATCHLIST.format(lease=lease, patience=patience, extra=extra)
    (folder / "watch.toml").write_text(watchlist)


def command(
    folder: Path, state: Path, *, helpers: str, role="run", ledger="", address="", tags=()
) -> list[str]:
    """The command of a run or worker; ``helpers`` is the module with its stages."""
    told = [helpers, role, state, ledger, address, folder / "watch.toml", *tags]
    return [sys.executable, *map(str, [folder / "program.py", *told])]


def start_run(state: Path) -> subprocess.Popen:
    """A run in a process of its own."""
    state.mkdir(exist_ok=True)
    write_program(state, lease="10m", patience="1s")
    return subprocess.Popen(
        command(state, state, helpers="batch_helpers"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": PATHS},
    )


QUICK = {"first_wait": 0.01, "longest_wait": 0.05, "patience": 1.0}


def engine(
    place, lines=None, *, budgets=None, tags=(), shared=False, split=None, made=Engine, **retries
):
    url, work = place
    mine = ledger(url, **{**QUICK, **retries})
    mine.tags = frozenset(tags)
    return made(
        mine,
        work,
        budgets=Budgets(**(budgets or {})),
        workers=1,
        stages=STAGES,
        say=(lines if lines is not None else []).append,
        preload=(),
        shared=shared,
        split=split,
    )


def catalogue_of(place) -> Catalogue:
    return Catalogue(ledger(place[0]))


def states(place):
    return {entry.job.target[6:]: entry.job.state for entry in catalogue_of(place).entries()}


def start_forkserver() -> None:
    """Start the server that children are forked from, with this module loaded."""
    multiprocessing.set_forkserver_preload(["batch_helpers"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS)
        patch.setenv("METAL", "1")  # who may be asked to accept is what the tests are about
        forkserver.ensure_running()


def wait_for(condition, seconds=180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
