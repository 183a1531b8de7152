"""Jobs that would publish in one repo: the later one waits until it has the repo for itself."""

import threading
from dataclasses import replace

import pytest
from batch_helpers import RECIPES, add, ledger, seen, used, wanted
from sqlalchemy import text, update

from converter.batch import ledger as ledger_module
from converter.batch.catalogue import Catalogue, Wanted, choose
from converter.batch.failures import Failure
from converter.batch.ledger import Ledger
from converter.batch.recipes import Policy
from converter.batch.schema import version_table

pytestmark = pytest.mark.usefixtures("closed_ledgers")


def with_drafter(target: str, *, mtp: bool = True) -> list[Wanted]:
    asked = replace(RECIPES["4bit"] if mtp else RECIPES["bf16"], mtp=mtp)
    return [Wanted(variant="own", asked=asked, target=target, policy=Policy())]


def test_two_that_enqueue_one_target_see_each_other(postgres):
    """Of two releases under one name the later one is parked, however close they come."""
    url = postgres.database()
    first, second = ledger(url), ledger(url)
    done = threading.Event()

    def other() -> None:
        add(Catalogue(second), "zeta/model")
        done.set()

    thread = threading.Thread(target=other)
    with first.database.engine.begin() as connection:
        Catalogue(first)._enqueue(connection, seen("acme/model"), wanted("acme/model"))
        thread.start()
        assert not done.wait(0.3)
    thread.join(60)
    states = {e.release.repo: e.state for e in Catalogue(first).entries()}
    assert states == {"acme/model": "queued", "zeta/model": "parked"}


def test_two_releases_of_one_name_do_not_share_a_repo(catalogue):
    add(catalogue, "acme/model")
    add(catalogue, "other/model")
    second = catalogue.entries()[1].job
    assert (second.state, second.error_class) == ("parked", "usage")
    assert second.error.startswith("night/model-bf16 is made from acme/model already")


@pytest.mark.parametrize("drafter_first", [True, False])
def test_a_drafter_does_not_go_where_another_output_goes(catalogue, drafter_first):
    jobs = [
        ("acme/model", with_drafter("night/model")),
        ("acme/model-mtp", with_drafter("night/model-mtp", mtp=False)),
    ]
    for repo, wants in jobs if drafter_first else reversed(jobs):
        assert catalogue.enqueue(seen(repo), wants) == 1
    first, second = sorted(catalogue.entries(), key=lambda entry: entry.job.id)
    assert (first.state, second.state, second.job.error_class) == ("queued", "parked", "usage")
    told = f"night/model-mtp is made from {first.release.repo} already; give names with"
    assert second.job.error.startswith(told)


def test_drafter_and_output_of_one_release_do_not_share_a_repo(catalogue):
    catalogue.enqueue(seen(), with_drafter("night/d"))
    catalogue.enqueue(seen(), with_drafter("night/d-mtp", mtp=False))
    catalogue.enqueue(seen(), with_drafter("night/other", mtp=False))
    found = {entry.job.target: entry for entry in catalogue.entries()}
    assert {target: entry.state for target, entry in found.items()} == {
        "night/d": "queued",
        "night/d-mtp": "parked",
        "night/other": "queued",
    }
    assert "rename one of the two" in found["night/d-mtp"].job.error


def of(catalogue) -> dict[str, tuple[str, str]]:
    """State of the last job of every release, by repo, with its commit."""
    return {e.release.repo: (e.release.commit, e.state) for e in reversed(catalogue.entries())}


def test_the_release_that_has_a_repo_goes_on_and_the_other_does_not(catalogue):
    add(catalogue, "acme/model", commit="c1")
    add(catalogue, "other/model", commit="c1")
    add(catalogue, "acme/model", commit="c2", content="new", modified=2.0)
    assert of(catalogue) == {"acme/model": ("c2", "queued"), "other/model": ("c1", "parked")}
    add(catalogue, "other/model", commit="c2", content="new", modified=2.0)
    assert of(catalogue) == {"acme/model": ("c2", "queued"), "other/model": ("c2", "parked")}
    assert [entry.release.repo for entry in catalogue.taken()] == ["other/model"]


def test_an_output_with_a_drafter_goes_on_beside_a_recipe_that_clashes_with_it(catalogue):
    wants = [*with_drafter("night/d"), *with_drafter("night/d-mtp", mtp=False)]
    for commit in ("c1", "c2"):
        catalogue.enqueue(seen(commit=commit, content=commit, modified=float(commit[1])), wants)
        found = {e.job.target: (e.release.commit, e.state) for e in catalogue.entries()}
        assert found == {"night/d": (commit, "queued"), "night/d-mtp": (commit, "parked")}


@pytest.mark.parametrize("held", [True, False])
def test_retry_asks_whether_the_repo_is_still_anothers(catalogue, held):
    for repo in ("acme/model", "other/model", "third/model"):
        add(catalogue, repo)
    if held:  # which says nothing about whose the repo is
        catalogue.park(choose(catalogue.entries(), ["other/model"]), "not now")
    refused = catalogue.retry(choose(catalogue.entries(), ["other/model"]))
    assert [(number, why[:46]) for number, why in refused.items()] == [
        (2, "night/model-bf16 is made from acme/model alrea")
    ]
    assert of(catalogue)["other/model"] == ("c1", "parked")
    catalogue.forget(choose(catalogue.entries(), ["acme/model"]))
    refused = catalogue.retry(choose(catalogue.entries(), ["*/model"]))
    assert of(catalogue) == {"other/model": ("c1", "queued"), "third/model": ("c1", "parked")}
    assert refused[3].startswith("night/model-bf16 is made from other/model already")


def test_a_job_that_is_held_is_in_nobodys_way_where_another_has_its_repo(catalogue):
    add(catalogue, "acme/model")
    add(catalogue, "other/model")
    catalogue.park(catalogue.taken(), "not now")
    add(catalogue, "acme/model", commit="c2", content="new", modified=2.0)
    assert of(catalogue) == {"acme/model": ("c2", "queued"), "other/model": ("c1", "parked")}


def test_other_tools_do_not_let_two_jobs_into_one_repo(mine, catalogue, monkeypatch):
    for repo in ("acme/model", "other/model"):
        add(catalogue, repo)
    monkeypatch.setattr(ledger_module, "tool_versions", lambda: {"mlx": "99"})
    newer = Catalogue(Ledger(mine.database))
    assert newer.renew() == 2
    assert of(newer) == {"acme/model": ("c1", "queued"), "other/model": ("c1", "parked")}
    assert [entry.job.tools for entry in newer.entries()] == [newer.ledger.tools] * 2
    assert newer.taken()[0].job.error.startswith("night/model-bf16 is made from acme/model alr")


def test_a_job_goes_on_by_itself_once_it_has_the_repo_for_itself(catalogue):
    for repo in ("acme/model", "other/model", "third/model", "fourth/model"):
        add(catalogue, repo)
    catalogue.park(choose(catalogue.entries(), ["other/model"]), "not now")
    assert catalogue.settle() == 0
    catalogue.forget(choose(catalogue.entries(), ["acme/model"]))
    assert catalogue.settle() == 1
    assert {repo: state for repo, (_, state) in of(catalogue).items()} == {
        "other/model": "parked",  # by hand
        "third/model": "queued",
        "fourth/model": "parked",
    }
    (_, fourth) = sorted(catalogue.taken(), key=lambda entry: entry.job.id)
    assert fourth.job.error.startswith("night/model-bf16 is made from third/model already")


def brought_up(catalogue) -> Catalogue:
    """The ledger as the version before ``owns`` would have left it, opened by this one."""
    database = catalogue.database
    database.do(lambda c: c.execute(text("ALTER TABLE job DROP COLUMN owns")))
    database.do(lambda c: c.execute(update(version_table).values(version=3)))
    return Catalogue(ledger(str(database.engine.url)))


def test_an_older_ledger_knows_its_clashes_again(catalogue):
    add(catalogue, "acme/model")
    add(catalogue, "other/model")
    add(catalogue, "acme/asks-too-much")
    claim = catalogue.ledger.claim([1])
    no = Failure("usage", "what the watch list asks for cannot be")
    catalogue.ledger.failed(claim, claim.tasks[0].id, "examine", used(), no)
    again = brought_up(catalogue)
    assert [entry.release.repo for entry in again.taken()] == ["other/model"]


@pytest.mark.parametrize("renewed", [True, False])
def test_an_older_ledger_knows_clashes_that_were_parked_by_hand(catalogue, renewed):
    add(catalogue, "acme/model")
    add(catalogue, "other/model")
    catalogue.park(catalogue.taken(), "not now")
    if renewed:  # so that the one which has the repo has the higher number
        add(catalogue, "acme/model", commit="c2", content="new", modified=2.0)
    again = brought_up(catalogue)
    assert [entry.release.repo for entry in again.taken()] == ["other/model"]
    add(again, "acme/model", commit="c3", content="newer", modified=3.0)
    assert of(again) == {"acme/model": ("c3", "queued"), "other/model": ("c1", "parked")}


@pytest.mark.parametrize("drafter_first", [True, False])
def test_an_older_ledger_knows_clashes_with_a_drafter_that_were_parked(catalogue, drafter_first):
    jobs = [
        ("acme/model", with_drafter("night/model")),
        ("acme/model-mtp", with_drafter("night/model-mtp", mtp=False)),
    ]
    for repo, wants in jobs if drafter_first else reversed(jobs):
        catalogue.enqueue(seen(repo), wants)
    catalogue.park(catalogue.taken(), "not now")
    again = brought_up(catalogue)
    assert [entry.job.id for entry in again.taken()] == [2]


def test_an_older_ledger_keeps_the_repo_of_one_that_was_parked_by_hand(catalogue):
    add(catalogue, "acme/model")
    catalogue.park(catalogue.entries(), "not now")
    add(catalogue, "other/model")
    newer = seen("acme/plain", commit="c2", content="new", modified=2.0)
    catalogue.enqueue(seen("acme/plain"), with_drafter("night/plain"))
    catalogue.enqueue(newer, with_drafter("night/plain", mtp=False))  # makes no drafter any more
    catalogue.enqueue(seen("acme/plain-mtp"), with_drafter("night/plain-mtp", mtp=False))
    catalogue.park(choose(catalogue.entries(), ["acme/plain-mtp"]), "not now")
    again = brought_up(catalogue)
    assert [entry.release.repo for entry in again.taken()] == ["other/model"]
