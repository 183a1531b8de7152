"""The stages after the plan: fetch, convert, prove, accept, publish, and renewing a card."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from converter.acceptance import REPORT as ACCEPTANCE
from converter.acceptance import accept_output, acceptance_report
from converter.adapter.output import reference_of_output
from converter.batch.believed import believed
from converter.batch.commands import commands_of
from converter.batch.examine import examine
from converter.batch.failures import AdapterError, Failure, classify
from converter.batch.orders import Answer, Made, Order, Part, together
from converter.batch.published import PARITY, facts_of, published_of, snapshot_of
from converter.errors import GateError, HubError, PlanError, UsageError
from converter.execute.folder import MANIFEST
from converter.hub import download, resolve_revision, upload
from converter.manifest import read_manifest
from converter.pipeline import Request, convert, plan_request
from converter.proof import gated_alike, own_report, prove, prove_drafter, require_proof
from converter.publish import upload_output, write_card
from converter.release import fetch, open_release
from converter.ui import Console

_QUIET: Final = Console(quiet=True)
_CARD = "README.md"
_TOLD = ("config.json", MANIFEST, PARITY, "kv_cache.json")
"""What a card is written from."""


class Throttle:
    """Holds the threads that report progress up, so that they stay within a bandwidth."""

    def __init__(
        self,
        rate: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``rate`` in bytes per second, None for no limit."""
        self._rate, self._clock, self._sleep = rate, clock, sleep
        self._started = clock()
        self._first: int | None = None
        self._lock = threading.Lock()
        self.done = 0

    def __call__(self, done: int, total: int) -> None:
        """Note the bytes so far; returns when they may have arrived."""
        with self._lock:
            first = self._first = done if self._first is None else self._first
            self.done = done
        if self._rate is not None:
            ahead = (done - first) / self._rate - (self._clock() - self._started)
            if ahead > 0:
                self._sleep(ahead)


def fetch_release(order: Order) -> Answer:
    """All files of the release, hashes checked."""
    release = believed(
        order.repo,
        lambda: open_release(order.repo, revision=order.commit, cache=order.cache),
    )
    progress = Throttle(order.bandwidth)
    fetch(release, progress=progress)
    return Answer(bytes=progress.done)


def convert_release(order: Order) -> Answer:
    """Every output that is not there yet, from one read of the source for each adapter."""
    answer = Answer(bytes=0)
    todo = [part for part in order.parts if not all(one.finished for one in order.made(part))]
    for group in together([part for part in todo if _has_its_text(part, answer)]):
        try:
            _convert(order, group, answer)
        except (PlanError, UsageError) as error:
            answer.failed |= {part.job: classify(error) for part in group}
    if order.shards is None:  # a piece makes nothing whole
        for part in order.parts:
            if part.job not in answer.failed:
                out, *drafters = (read_manifest(one.folder) for one in order.made(part))
                answer.facts[part.job] = {"checkpoint": out.checkpoint, "plan": out.plan}
                for one in drafters:
                    answer.facts[part.job]["drafter_plan"] = one.plan
    return answer


def _has_its_text(part: Part, answer: Answer) -> bool:
    """Whether what calibrates a job lies on this machine; others are made without it."""
    try:
        part.asked.check_calibration(part.policy.calibration_data)
    except AdapterError as error:
        answer.failed[part.job] = classify(error)
        return False
    return True


def _convert(order: Order, group: tuple[Part, ...], answer: Answer) -> None:
    """Make some outputs together; a target size that cannot be had fails its own job alone."""
    if len(group) > 1:
        group = tuple(part for part in group if _target_is_met(order, part, answer))
    if not group:
        return
    request = _request(order, group)
    planned = believed(order.repo, lambda: plan_request(request))
    request = replace(request, commands=commands_of(order, group, planned))
    known = [part.plan for part in group] + [part.drafter_plan for part in group]
    for plan, output in zip(known, convert(request, _QUIET, planned=planned), strict=False):
        answer.bytes = (answer.bytes or 0) + output.plan.output_bytes
        if plan is not None and output.plan.hash != plan:
            raise HubError(
                f"{order.repo}: its headers were read differently before; the hub sends damaged "
                "answers"
            )


def _target_is_met(order: Order, part: Part, answer: Answer) -> bool:
    """Whether formats can be chosen for the size that a job asks for, if it asks for any.

    What was measured for that is kept, so that it need not be measured again.
    """
    if not part.asked.options.targeted:
        return True
    request = _request(order, (part,))
    try:
        believed(order.repo, lambda: plan_request(request))
    except (PlanError, UsageError) as error:
        answer.failed[part.job] = classify(error)
        return False
    return True


def _request(order: Order, parts: tuple[Part, ...]) -> Request:
    data = {part.policy.calibration_data for part in parts} - {None}
    return Request(
        hf_path=order.repo,
        revision=order.commit,
        mlx_path=order.folder / "out",
        recipes=tuple(part.asked.options for part in parts),
        names=tuple(order.out(part).name for part in parts),
        workers=order.workers,
        calibration_data=Path(str(data.pop())) if data else None,
        adapter_path=parts[0].asked.checked_adapter(),
        mtp=parts[0].asked.mtp,
        cache=order.cache,
        part=order.shards,
        keep_judged=True,
        replace_others=True,
    )


def prove_output(order: Order) -> Answer:
    """The parity report and card of all that a job makes; a failure where one may not go out."""
    (part,) = order.parts
    card = order.source / _CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    answer = Answer()
    out, *drafters = order.made(part)
    _prove(order, part)
    answer.facts[part.job] = facts_of(_read(out.folder / PARITY))
    for one in (out, *drafters):
        if one is not out and own_report(one.folder) is None:
            prove_drafter(one.folder, target=out.folder, console=_QUIET)
        write_card(one.folder, repo_id=one.target, source_card=text)
        try:
            require_proof(one.folder, allow_unproven=part.policy.allow_unproven)
        except GateError as error:
            answer.failed[part.job] = Failure("gate", _kept(order, one, str(error)))
            break
    return answer


def _prove(order: Order, part: Part) -> None:
    """Judge an output, unless a report by the same gates is there."""
    out, gate = order.out(part), part.policy.kl_threshold
    report = own_report(out)
    if report is not None and gated_alike(report, kl_threshold=gate):
        return
    release = open_release(str(order.source))
    adapter = part.asked.checked_adapter()
    request = Request(
        hf_path=str(order.source), recipes=(part.asked.options,), adapter_path=adapter
    )
    planned = plan_request(request, release=release, measure=False)
    with reference_of_output(out, release, planned.arch, adapter) as reference:
        prove(
            out,
            source=reference,
            console=_QUIET,
            plan=planned.plans[0],
            kl_threshold=gate,
            workers=order.workers,
            arch=planned.arch,
        )


def _kept(order: Order, made: Made, said: str) -> str:
    """Why an output is not published, once its report lies where a person will look for it."""
    kept = order.kept_report(made.target)
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("parity.html", PARITY):  # an output that stays for now is judged anew by then
        if (made.folder / name).is_file():
            shutil.move(made.folder / name, kept / name)
    text = said.replace(str(made.folder / "parity.html"), str(kept / "parity.html"))
    return text.replace(str(made.folder), made.target)


def accept_one(order: Order) -> Answer:
    """One proven output driven through the stock runtimes; a row that fails is a missed gate."""
    (part,) = order.parts
    out = order.out(part)
    report = acceptance_report(out) or accept_output(out)
    answer = Answer(facts={part.job: {"acceptance": report["verdict"]}})
    if report["verdict"] != "pass":
        failed = [f"{r['runtime']}: {r['name']}" for r in report["rows"] if r["verdict"] == "fail"]
        kept = order.kept_report(part.target)
        kept.mkdir(parents=True, exist_ok=True)
        shutil.move(out / ACCEPTANCE, kept / ACCEPTANCE)
        told = ", ".join(failed) or "no row applies to it"
        text = f"{part.target}: not accepted ({told}); see {kept / ACCEPTANCE}"
        answer.failed[part.job] = Failure("gate", text)
    return answer


def publish_output(order: Order) -> Answer:
    """All that a job made on the hub, once: a repo that holds its plan's files is left alone."""
    (part,) = order.parts
    made, before = order.made(part), published_of(order, part)
    for one in made:
        if before[one.target] is None:
            upload_output(
                one.folder,
                one.target,
                console=_QUIET,
                private=part.policy.private,
                allow_gated=part.policy.allow_gated,
                allow_unproven=part.policy.allow_unproven,
            )
    there = before if None not in before.values() else published_of(order, part)
    for target, found in there.items():
        if found is None:
            raise HubError(
                f"{target}: was uploaded, and somebody else has changed it since; look at "
                "its history"
            )
    out = there[part.target]
    assert out is not None
    files = [entry for one in made for entry in read_manifest(one.folder).files.values()]
    size = sum(int(entry["bytes"]) for entry in files)
    return Answer(facts={part.job: out.facts}, published={part.job: out.url}, bytes=size)


def renew_card(order: Order) -> Answer:
    """The published cards of a job, for a commit of the release that changed nothing else."""
    (part,) = order.parts
    folder = order.folder / "card"
    source = resolve_revision(order.repo, revision=order.commit)
    try:
        text = None
        if _CARD in source.by_path:
            root = download(source, [_CARD], cache_dir=folder / "source")
            text = (root / _CARD).read_text(encoding="utf-8", errors="replace")
        urls = [_renew(order, part, one.target, text, folder) for one in order.made(part)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Answer(facts={part.job: {"address": urls[0]}}, published={part.job: urls[0]})


def _renew(order: Order, part: Part, repo: str, text: str | None, folder: Path) -> str:
    """One repo's card made anew from what the repo holds, and from the release's own; its URL."""
    target = snapshot_of(repo)
    if target is None or MANIFEST not in target.by_path:
        raise UsageError(f"{repo}: has been removed, or is no output of this program")
    names = [name for name in _TOLD if name in target.by_path]
    held = download(target, names, cache_dir=folder / "target")
    work = folder / "out" / repo
    work.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(held / name, work / name)
    write_card(work, repo_id=repo, source_card=text)
    return upload(
        work,
        repo,
        paths=[_CARD],
        stale=(),
        private=part.policy.private,
        commit_message=f"Renew the card from {order.repo} at {order.commit[:12]}",
    )


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


STAGES: Final[dict[str, Callable[[Order], Answer]]] = {
    "examine": examine,
    "fetch": fetch_release,
    "convert": convert_release,
    "prove": prove_output,
    "accept": accept_one,
    "publish": publish_output,
    "card": renew_card,
}
"""What a child process does, by the name of its stage."""
