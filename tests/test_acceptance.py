"""The stock programs on a checkpoint: what is judged, what is caught, and a few rows for real."""

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from release_helpers import make, status

from model_cards.card import CardFacts, render_card
from validate.acceptance import needs
from validate.acceptance.bench import Bench
from validate.acceptance.facts import Continued, Facts
from validate.acceptance.model import (
    Found,
    NotApplicable,
    Outcome,
    Row,
    RowFailure,
    report_json,
    verdict_of,
)
from validate.acceptance.process import Command, last_error
from validate.acceptance.replies import Reply, Step, require_same
from validate.acceptance.rows import ROWS
from validate.acceptance.rows.drafting import parting
from validate.acceptance.rows.generate import judge_continuations
from validate.acceptance.run import judge
from validate.acceptance.server import Server
from validate.report import render_html


def reply(*steps: tuple[str, float, float], text: str = "") -> Reply:
    return Reply(
        text=text or "".join(step[0] for step in steps),
        steps=tuple(Step(token=t, logprob=p, lead=lead) for t, p, lead in steps),
    )


ALONE = reply(("a", -1.0, 0.5), ("b", -1.0, 1e-4), ("c", -1.0, 2.0))


def test_the_same_tokens_are_the_same_whatever_became_of_the_blanks() -> None:
    same = require_same([("q", ALONE, replace(ALONE, text=" abc\n"))], computing="float32")
    assert (same.equal, same.ties, same.noise) == (1, 0, 0.0)


def test_a_parting_within_the_measured_noise_is_a_near_tie() -> None:
    other = reply(("a", -1.00006, 0.5), ("x", -1.0, 1e-4), ("y", -1.0, 2.0))
    same = require_same([("q", ALONE, other)], computing="float32")
    assert (same.equal, same.ties) == (0, 1)
    assert same.noise == pytest.approx(6e-5)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        # The lead of 1e-4 is more than twice a noise of 1e-5.
        (reply(("a", -1.00001, 0.5), ("x", -1.0, 1e-4)), "part at token 1.*led by 0.0001 nats"),
        (reply(("x", -1.0, 0.5)), "part at token 0.*led by 0.5 nats"),
        # A noise that explains every parting is no noise.
        (reply(("a", -1.3, 0.5), ("x", -1.0, 1e-4)), "differ by 0.3 nats.*float32 does not"),
        (reply(("a", -1.0, 0.5)), "part at token 1"),
    ],
)
def test_what_is_no_near_tie_fails(other: Reply, says: str) -> None:
    with pytest.raises(RowFailure, match=says):
        require_same([("q", ALONE, other)], computing="float32")


def facts(folder: Path = Path("/models/m"), **given: object) -> Facts:
    common: dict[str, object] = {
        "folder": folder,
        "config": {"model_type": "qwen3", "head_dim": 64},
        "runtimes": ("mlx_vlm", "mlx_lm"),
        "template": "",
        "tokens": {},
        "stop_ids": (),
        "computing": "float32",
    }
    return Facts(**{**common, **given})


@pytest.mark.parametrize(
    ("need", "lacking", "having", "reason"),
    [
        (needs.sees, {}, {"config": {"vision_config": {"depth": 1}}}, "no vision part"),
        (needs.hears, {}, {"config": {"audio_config": {"depth": 1}}}, "no audio part"),
        (needs.chats, {}, {"template": "{{ messages }}"}, "no chat template"),
        (needs.stops, {}, {"stop_ids": (2,)}, "no config of the checkpoint names an eos_token_id"),
        (needs.has_drafter, {}, {"drafter": Path("d")}, "--draft-model DIR"),
        (
            needs.thinks,
            {"tokens": {"<think>": 1}},
            {"tokens": {"<think>": 1, "</think>": 2}, "template": "<think>"},
            "no token </think>",
        ),
        (needs.quantizable_cache, {"config": {"head_dim": 80}}, {}, "head_dim 80"),
        (
            needs.quantizes_layers,
            {"config": {"layer_types": ["sliding_attention", "full_attention"]}},
            {"config": {"layer_types": ["full_attention", "full_attention"]}},
            "in float, and no other is left of this model's 2 caches",
        ),
        (needs.writes, {"config": {"architectures": ["BertModel"]}}, {}, "writes no text"),
    ],
)
def test_a_row_applies_by_declared_facts(need, lacking, having, reason) -> None:
    assert reason in need(facts(**lacking))
    assert need(facts(**having)) is None


def row(run) -> Row:
    return Row(name="some row", runtime="mlx_vlm", rule="r", run=run)


def raising(message: str, kind: type[Exception] = RowFailure):
    def run(bench: Bench) -> Found:
        raise kind(message)

    return run


@pytest.mark.parametrize(
    ("run", "device", "verdict", "note"),
    [
        (lambda bench: Found(note="well"), "cpu", "pass", "well"),
        (raising("TypeError: x"), "cpu", "fail", "TypeError: x"),
        (
            raising("[metal_kernel] No Metal back-end."),
            "cpu",
            "not applicable",
            "the CPU backend cannot run it: [metal_kernel] No Metal back-end.",
        ),
        (raising("[metal_kernel] No Metal back-end."), "gpu", "fail", "[metal_kernel]"),
        (raising("nothing", NotApplicable), "gpu", "not applicable", "nothing"),
    ],
)
def test_verdicts(tmp_path: Path, run, device: str, verdict: str, note: str) -> None:
    with Bench(facts(), tmp_path) as bench:
        bench.device = f"Device({device}, 0)"
        outcome = judge(row(run), bench)
    assert outcome.verdict == verdict
    assert outcome.note.startswith(note)


def test_no_path_of_this_machine_is_told(tmp_path: Path) -> None:
    given = facts(tmp_path / "model", drafter=tmp_path / "model-mtp")

    def run(bench: Bench) -> Found:
        bench.commands.append(f"x --model {given.folder} --draft-model {given.drafter}")
        return Found(note=f"in {bench.work}/data of {given.folder}")

    with Bench(given, tmp_path / "work") as bench:
        outcome = judge(row(run), bench)
    assert outcome.note == "in TMP/data of OUT"
    assert outcome.commands == ("x --model OUT --draft-model DRAFTER",)


def test_a_runtime_without_the_model_is_not_asked(tmp_path: Path) -> None:
    with Bench(facts(runtimes=("mlx_lm",)), tmp_path) as bench:
        outcome = judge(row(raising("never run")), bench)
    assert (outcome.verdict, outcome.note) == ("not applicable", "mlx-vlm has no model for qwen3")


def test_a_documented_fault_is_told_as_the_runtimes(tmp_path: Path) -> None:
    batch = next(r for r in ROWS if r.title == "mlx-vlm: server, eight at once")
    given = facts(config={"model_type": "minicpmv4_6"})
    with Bench(given, tmp_path) as bench:
        outcome = judge(replace(batch, run=raising("they differ")), bench)
    assert outcome.verdict == "fail"
    assert outcome.note.startswith("they differ; a fault of mlx-vlm 0.7.10")


def test_titles_are_unique_and_rules_are_told() -> None:
    titles = [r.title for r in ROWS]
    assert len(set(titles)) == len(titles)
    assert all(r.rule for r in ROWS)


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        (["pass", "not applicable"], "pass"),
        (["pass", "fail"], "fail"),
        (["not applicable"], "fail"),
        ([], "fail"),
    ],
)
def test_the_verdict_of_all_rows(verdicts: list[str], whole: str) -> None:
    assert verdict_of(verdicts) == whole


# Faults planted in a checkpoint: each caught by its row, in words that name it.


class HereBench(Bench):
    """The stock Python calls in this process, and a server that always stops."""

    def ask(self, request):
        from validate.acceptance.child import answer_all

        jobs = {"text": request["jobs"]["text"]}
        try:
            return answer_all({**request, "jobs": jobs})
        except Exception as error:
            raise RowFailure(f"{type(error).__name__}: {error}") from error

    def server(self, runtime, name="plain", **given):
        stopped = Reply(text="", finish="stop", completion_tokens=1)
        return SimpleNamespace(chat=lambda *words, **options: stopped)


@pytest.fixture(scope="module")
def converted(twin_of, tmp_path_factory, runtimes) -> Path:
    (out,) = make(twin_of("qwen3_vl"), tmp_path_factory.mktemp("accept") / "out")
    return out


def outcome_of(folder: Path, title: str, work: Path) -> Outcome:
    chosen = next(r for r in ROWS if r.title == title)
    work.mkdir()
    with HereBench(Facts.read(folder), work) as bench:
        return judge(chosen, bench)


TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"


def test_a_sound_checkpoint_passes(converted: Path, tmp_path: Path) -> None:
    for number, title in enumerate(("mlx-vlm: chat template", "mlx-vlm: stop tokens")):
        outcome = outcome_of(converted, title, tmp_path / str(number))
        assert outcome.verdict == "pass", outcome.note


@pytest.mark.parametrize(
    ("title", "file", "text", "says"),
    [
        ("mlx-vlm: chat template", TEMPLATE, "{% for %}", "TemplateSyntaxError"),
        ("mlx-vlm: chat template", TEMPLATE, "Hello", "lacks the message: 'Hello'"),
        ("mlx-vlm: stop tokens", GENERATION, '{"eos_token_id": 5}', "5 is no special token"),
        ("mlx-lm: stop tokens", GENERATION, '{"eos_token_id": 5}', "5 is no special token"),
    ],
)
def test_a_fault_is_named(
    converted: Path, tmp_path: Path, title: str, file: str, text: str, says: str
) -> None:
    bad = shutil.copytree(converted, tmp_path / "bad")
    (bad / file).write_text(text)
    outcome = outcome_of(bad, title, tmp_path / "work")
    assert outcome.verdict == "fail"
    assert says in outcome.note


def test_an_answer_that_would_run_on_is_named(converted: Path, tmp_path: Path) -> None:
    """The tokenizer stops at another token than the one that ends a turn."""
    bad = shutil.copytree(converted, tmp_path / "bad")
    end = "<|endoftext|>"
    tokenizer = json.loads((bad / "tokenizer_config.json").read_text())
    (bad / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "eos_token": end}))
    token = Facts.read(bad).tokens[end]
    (bad / GENERATION).write_text(json.dumps({"eos_token_id": token}))
    config = json.loads((bad / "config.json").read_text())
    config["text_config"]["eos_token_id"] = token
    (bad / "config.json").write_text(json.dumps(config))
    outcome = outcome_of(bad, "mlx-lm: stop tokens", tmp_path / "work")
    assert "ends an answer with <|im_end|>" in outcome.note
    assert "answers would run on" in outcome.note


def test_a_missing_processor_file_is_named(converted: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(converted, tmp_path / "bad")
    (bad / "preprocessor_config.json").unlink()
    outcome = outcome_of(bad, "mlx-vlm: generate image", tmp_path / "work")
    assert outcome.verdict == "fail"
    assert "preprocessor_config.json" in outcome.note


# Processes.


def test_the_last_error_of_a_program() -> None:
    told = "Traceback:\n  File x\nValueError: first\n\nDuring handling\nKeyError: 'second'\n"
    assert last_error(told) == "KeyError: 'second'"
    assert last_error("") == "it said nothing"


def test_a_program_that_fails_or_hangs_ends_with_all_it_started(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise ValueError('a wrong file')")
    with pytest.raises(RowFailure, match="exit status 1: ValueError: a wrong file"):
        Command(module="fails", arguments=()).run(cwd=tmp_path, limit_s=60)
    (tmp_path / "hangs.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path('pid').write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(RowFailure, match="no answer within 8 s"):
        Command(module="hangs", arguments=()).run(cwd=tmp_path, limit_s=8)
    stat = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


# What is shown.

HOSTILE = "<script>alert(1)</script>|x"


def acceptance() -> dict:
    outcome = Outcome(row=row(raising("")), verdict="fail", note=HOSTILE, commands=("python -m x",))
    return report_json([outcome], plan="p", checkpoint="c", backend={"device": "cpu"})


def test_the_page_shows_the_rows() -> None:
    parity = {"verdict": "pass", "plan": "p", "reference": {}, "runtime": {}, "checks": []}
    text = render_html({**parity, "acceptance": acceptance()})
    assert "Runtime acceptance" in text
    assert "python -m x" in text
    assert "<script>" not in text
    assert "Runtime acceptance" not in render_html(parity)


def test_the_card_shows_the_rows() -> None:
    common = {
        "repo_id": None,
        "base_model": None,
        "base_revision": None,
        "source_card": None,
        "source_files": (),
        "modalities": ("text",),
        "pipeline_tag": "text-generation",
        "runtimes": ("mlx-vlm",),
        "quantization": "",
        "dtype": "float32",
        "size_bytes": 1,
        "parameters": 1,
        "bits_per_weight": 32.0,
        "command": "convert",
        "versions": {},
        "plan_hash": "p",
        "parity": None,
    }
    text = render_card(CardFacts(**common, acceptance=acceptance()))
    assert "## Runtime acceptance" in text
    assert "| some row | mlx_vlm | fail |" in text
    assert "<script>" not in text


def test_rows_are_asked_for_by_name(tmp_path: Path, capsys) -> None:
    assert status("accept", tmp_path, "--only", "nothing such") == 2
    told = capsys.readouterr().err
    assert "no row has such a title" in told
    assert "mlx-lm: server chat" in told


def test_two_rows_for_real(tinylm: Path, tmp_path: Path, capsys) -> None:
    """Stock mlx-lm on the trained fixture: Python calls, and generate on the command line."""
    (out,) = make(tinylm, tmp_path / "out")
    rows = ("mlx-lm: generate text", "mlx-lm: Python calls")
    only = [word for title in rows for word in ("--only", title)]
    assert status("accept", out, *only, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "acceptance.json").read_text())
    assert [(r["name"], r["verdict"]) for r in report["rows"]] == [
        ("generate text", "pass"),
        ("Python calls", "pass"),
    ]
    assert report["plan"] == json.loads((out / "conversion.json").read_text())["plan"]
    assert any("python -m mlx_lm generate" in c for c in report["rows"][0]["commands"])


TORCH = {"prose": Continued(prompt="p", tokens=(5, 6, 7), logprobs=(-1.0, -1.0, -1.0))}


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([(5, -1.1, 1.0), (6, -1.0, 1.0), (7, -1.0, 1.0)], "3 of 3 tokens"),
        ([(5, -1.1, 1.0), (9, -1.0, 0.19)], "1 parted at a near tie; log-probabilities within 0.1"),
        ([(5, -1.1, 1.0), (9, -1.0, 0.21)], "at most 0.2 is rounding"),
        ([(5, -1.6, 1.0), (6, -1.0, 1.0)], "differ from torch's by 0.6 nats"),
        ([(9, -1.0, 0.01)], "at most 0 is rounding"),
    ],
)
def test_torchs_tokens_are_parted_from_at_rounding_alone(steps, says: str) -> None:
    try:
        told = judge_continuations(TORCH, {"prose": steps}, computing="16 bits").note
    except RowFailure as failure:
        told = str(failure)
    assert says in told


@pytest.mark.parametrize(
    ("shown", "place"),
    [
        ("drafter: auto\nab^^", (3, "ab")),  # the third token has no text, and led more
        ("drafter: auto\na^^", (1, "a")),
        ("DFLASH\n^^", (0, "")),
    ],
)
def test_where_a_printed_text_parts(shown: str, place: tuple[int, str]) -> None:
    plain = reply(("a", -1, 0.5), ("b", -1, 0.1), ("", -1, 0.3), (";", -1, 0.2), (";", -1, 2))
    assert parting(plain, ["a", "ab", "ab", "ab;", "ab;;"], shown) == place
    at, common = parting(plain, ["a", "ab", "ab", "ab;", "ab;;", "ab;;."], "ab;;,")
    assert (at, common) == (4, "ab;;"), "what a runtime flushes at the end is no token"


class Slow(Server):
    """A server that takes as long as an answer is, of as many requests at a time as there are."""

    def __init__(self, at_once: int) -> None:
        self.places = threading.Semaphore(at_once)

    def chat(self, content, *, max_tokens, **options):
        with self.places:
            time.sleep(max_tokens / 100)
        return Reply(text=f"{content} {options['logit_bias']}")


@pytest.mark.parametrize(("at_once", "overlapped"), [(2, True), (1, False)])
def test_requests_that_are_served_one_after_another_are_seen(at_once, overlapped) -> None:
    replies, seen = Slow(at_once).joined("long", "short", lengths=(80, 5), after_s=0.2, never=(7,))
    assert [one.text for one in replies] == ["long {'7': -1000.0}", "short {'7': -1000.0}"]
    assert seen is overlapped
