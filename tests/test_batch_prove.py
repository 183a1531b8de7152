"""The stage that proves an output: what an earlier report is worth, what a missed gate leaves."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from release_helpers import make, write_release

from converter.batch import work
from converter.batch.orders import Order, Part
from converter.batch.recipes import Asked, Policy
from converter.errors import GateError
from converter.manifest import read_manifest
from converter.plan import Options


@pytest.fixture
def order(tmp_path):
    """One output that is whole and not proven yet."""
    part = Part(
        job=7,
        variant="4bit",
        target="night/m-4bit",
        asked=Asked(options=Options()),
        policy=Policy(),
    )
    order = Order(repo="a/m", commit="c", folder=tmp_path / "work" / "a--m@c", parts=(part,))
    make(write_release(tmp_path / "release"), order.out(part))
    return order


def report(order, *checks, **changed):
    """Write a parity report of exactly the output's files."""
    out = order.out(order.parts[0])
    manifest = read_manifest(out)
    data = {"plan": manifest.plan, "checkpoint": manifest.checkpoint, "verdict": "pass"}
    (out / "parity.json").write_text(json.dumps({**data, "checks": checks, **changed}))
    return out


def test_a_missed_gate_leaves_its_report(order, tmp_path, monkeypatch):
    out = report(order, {"name": "kl", "verdict": "fail", "value": 0.5}, verdict="fail")
    (out / "parity.html").write_text("why")
    monkeypatch.setattr(work, "write_card", lambda *arguments, **named: None)

    def refuse(folder, **named):
        raise GateError(f"{folder}: the parity report says fail (kl); see {folder}/parity.html")

    monkeypatch.setattr(work, "require_proof", refuse)
    answer = work.prove_output(order)
    kept = tmp_path / "reports" / "night" / "m-4bit" / "parity.html"
    assert kept.read_text() == "why"
    assert not (out / "parity.json").exists()  # for it is judged anew when the gates change
    assert answer.failed[7].kind == "gate"
    assert answer.failed[7].text == (f"night/m-4bit: the parity report says fail (kl); see {kept}")
    assert answer.facts[7]["parity"]["failed"] == ["kl"]


@pytest.mark.parametrize(
    ("changed", "again"),
    [({}, False), ({"gate": 0.01}, True), ({"checkpoint": "another"}, True)],
    ids=["the same", "another gate", "other files"],
)
def test_a_report_stands_for_these_files_and_gates_alone(order, monkeypatch, changed, again):
    loss = {"name": "loss", "verdict": "info", "value": 0.5, "threshold": changed.pop("gate", None)}
    report(order, loss, **changed)
    proofs = []

    def prove(out, **given):
        proofs.append(given["kl_threshold"])
        report(order, {**loss, "threshold": None})

    planned = SimpleNamespace(arch=None, plans=(None,))
    monkeypatch.setattr(work, "open_release", lambda source: None)
    monkeypatch.setattr(work, "plan_request", lambda request, **given: planned)
    monkeypatch.setattr(work, "reference_of_output", lambda *given: nullcontext())
    monkeypatch.setattr(work, "prove", prove)
    monkeypatch.setattr(work, "write_card", lambda *arguments, **named: None)
    assert not work.prove_output(order).failed
    assert proofs == ([None] if again else [])
