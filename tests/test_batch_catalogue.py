"""The catalogue: what a new commit, another policy or another version makes of jobs, and people."""

from dataclasses import replace

from batch_helpers import RECIPES, add, seen, states_of, used, wanted
from sqlalchemy import select, update

from converter.batch import ledger as ledger_module
from converter.batch.catalogue import Catalogue, Wanted, choose
from converter.batch.failures import Failure
from converter.batch.ledger import Ledger
from converter.batch.recipes import Policy
from converter.batch.schema import job, release


def publish(mine, catalogue):
    claim = mine.claim()
    for task in claim.tasks:
        mine.passed(claim, task.id, "publish", used(), published=True)
    mine.give_back(claim)


def test_enqueue_is_idempotent(catalogue):
    assert add(catalogue, "acme/model", "bf16", "4bit") == 2
    assert add(catalogue, "acme/model", "bf16", "4bit") == 0
    assert len(catalogue.entries()) == 2


def test_a_new_commit_replaces_what_was_not_finished(mine, catalogue):
    add(catalogue, commit="c1")
    add(catalogue, commit="c2", content="other", modified=2.0)
    assert [e.release.commit for e in catalogue.entries()] == ["c2"]
    assert len(catalogue.entries(superseded=True)) == 2
    claim = mine.claim()
    assert (claim.commit, claim.tasks[0].kind) == ("c2", "convert")


def test_a_commit_without_new_weights_renews_the_card_only(mine, catalogue):
    add(catalogue, commit="c1")
    publish(mine, catalogue)
    add(catalogue, commit="c2", modified=2.0)
    add(catalogue, commit="c3", content="new weights", modified=3.0)
    kinds = {e.release.commit: (e.job.kind, e.job.state) for e in catalogue.entries()}
    assert kinds == {"c1": ("convert", "published"), "c3": ("convert", "queued")}
    add(catalogue, commit="c4", modified=4.0)
    assert mine.claim().tasks[0].kind == "card"


def test_gates_that_change_give_a_parked_job_another_chance(mine, catalogue):
    strict, loose = Policy(kl_threshold=0.1), Policy(kl_threshold=0.5)
    catalogue.enqueue(seen(), wanted(policy=strict))
    claim = mine.claim()
    assert mine.failed(claim, 1, "prove", used(), Failure("gate", "KL 0.2")) == "parked"
    mine.give_back(claim)
    catalogue.enqueue(seen(), wanted(policy=strict))
    assert catalogue.entries()[0].job.state == "parked"
    catalogue.enqueue(seen(), wanted(policy=loose))
    (entry,) = catalogue.entries()
    assert (entry.job.state, entry.job.error) == ("queued", None)
    assert entry.job.policy["kl_threshold"] == 0.5


def test_permanent_failures_wait_for_other_tools(mine, catalogue, monkeypatch):
    add(catalogue, "acme/bad")
    add(catalogue, "acme/good")
    add(catalogue, "acme/held")
    for kind in (Failure("unsupported", "no map"), None, None):
        claim = mine.claim()
        if kind is None:
            mine.passed(claim, claim.tasks[0].id, "publish", used(), published=True)
        else:
            mine.failed(claim, claim.tasks[0].id, "examine", used(), kind)
        mine.give_back(claim)
        if claim.repo == "acme/good":
            break
    catalogue.park(choose(catalogue.entries(), ["acme/held"]), "not now")
    assert catalogue.renew() == 0
    monkeypatch.setattr(ledger_module, "tool_versions", lambda: {"mlx": "99"})
    newer = Ledger(mine.database)
    assert Catalogue(newer).renew() == 1
    assert states_of(catalogue) == {
        "bad-bf16": "queued",
        "good-bf16": "published",
        "held-bf16": "parked",
    }
    assert mine.claim() is None  # is for the newer tools
    claim = newer.claim()
    assert claim.repo == "acme/bad"
    assert Catalogue(newer).renew() == 0


def test_a_job_goes_on_when_earlier_tools_come_back(mine, catalogue, monkeypatch):
    add(catalogue)
    with monkeypatch.context() as other:
        other.setattr(ledger_module, "tool_versions", lambda: {"mlx": "99"})
        newer = Ledger(mine.database)
    assert Catalogue(newer).renew() == 1
    assert mine.claim() is None
    assert catalogue.renew() == 1
    assert [entry.state for entry in catalogue.entries()] == ["queued"]
    assert mine.claim() is not None


def test_what_is_parked_by_hand_stays_so_with_other_tools(mine, catalogue, monkeypatch):
    add(catalogue)
    catalogue.park(catalogue.entries(), "not now")
    monkeypatch.setattr(ledger_module, "tool_versions", lambda: {"mlx": "99"})
    newer = Catalogue(Ledger(mine.database))
    newer.renew()
    assert add(newer) == 0
    assert [entry.job.error for entry in newer.entries()] == ["not now"]
    newer.retry(newer.entries())
    assert newer.renew() == 1
    assert newer.ledger.claim() is not None


def test_versions_that_store_recipes_otherwise_share_no_jobs(mine, catalogue, monkeypatch):
    add(catalogue)
    monkeypatch.setattr(ledger_module, "FORMAT", ledger_module.FORMAT + 1)
    newer = Ledger(mine.database)
    assert newer.claim() is None
    assert Catalogue(newer).renew() == 1
    quant = {**RECIPES["4bit"].to_json()["quantization"], "method": "new"}
    for change in ({"q_new": 1}, {"quantization": quant}):
        unknown = {**RECIPES["bf16"].to_json(), **change}
        mine.database.do(lambda c, found=unknown: c.execute(update(job).values(recipe=found)))
        assert catalogue.renew() == 0  # is left to those who know what that is
    assert newer.claim() is not None


def test_people_choose_retry_park_and_forget(mine, catalogue):
    add(catalogue, "acme/one", "bf16", "4bit")
    add(catalogue, "beta/two")
    entries = catalogue.entries()
    assert [e.job.id for e in choose(entries, ["acme/*"])] == [1, 2]
    assert [e.job.id for e in choose(entries, ["night/*-4bit"])] == [2]
    assert [e.job.id for e in choose(entries, ["beta/two@c1", "1"])] == [1, 3]
    catalogue.park(choose(entries, ["acme/*"]), "later")
    assert mine.claim().repo == "beta/two"
    catalogue.retry(choose(catalogue.entries(), ["2"]))
    assert [t.variant for t in mine.claim([2]).tasks] == ["4bit"]
    catalogue.set_watermark("list", "acme", 5.0)
    catalogue.forget(choose(catalogue.entries(), ["acme/*"]))
    assert [e.release.repo for e in catalogue.entries()] == ["beta/two"]
    assert catalogue.watermark("list", "acme") is None
    assert mine.database.do(lambda c: c.execute(select(release))).all()[0].repo == "beta/two"
    assert catalogue.attempts() == []


def test_watermarks_only_rise(catalogue):
    assert catalogue.watermark("list", "acme") is None
    for modified in (5.0, 9.0, 7.0):
        catalogue.set_watermark("list", "acme", modified)
    assert catalogue.watermark("list", "acme") == 9.0
    assert catalogue.watermark("list", "other") is None


def with_adapter(path: str) -> list[Wanted]:
    (one,) = wanted()
    asked = replace(one.asked, adapter={"files": {"a": "sha256"}}, adapter_path=path)
    return [replace(one, asked=asked)]


def test_a_job_without_its_adapter_waits_and_begins_anew_when_it_is_wanted_again(mine, catalogue):
    catalogue.enqueue(seen(), with_adapter("/old"))
    claim = mine.claim()
    no = Failure("adapter", "adapter_path /old: no such folder")
    assert mine.failed(claim, 1, "examine", used(), no) == "waiting"
    mine.give_back(claim)
    assert mine.claim() is None
    catalogue.enqueue(seen(), with_adapter("/old"))  # it may lie there now
    assert mine.claim() is not None
    mine.failed(claim := mine.claim(), 1, "convert", used(), Failure("disk", "is failing"))
    mine.give_back(claim)
    catalogue.enqueue(seen(), with_adapter("/new"))
    (entry,) = catalogue.entries()
    assert (entry.state, entry.job.attempts, entry.job.error) == ("queued", {}, None)
    assert entry.job.recipe["adapter_path"] == "/new"


def test_moving_an_adapter_says_nothing_about_a_missed_gate_or_what_is_held(mine, catalogue):
    catalogue.enqueue(seen(), with_adapter("/old"))
    for how in ("gate", "held"):
        if how == "gate":
            mine.failed(mine.claim(), 1, "prove", used(), Failure("gate", "KL 0.2"))
        else:
            catalogue.park(catalogue.entries(), "not now")
        catalogue.enqueue(seen(), with_adapter(f"/{how}"))
        (entry,) = catalogue.entries()
        assert (entry.job.state, entry.job.error_class) == ("parked", how)
