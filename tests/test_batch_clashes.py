"""Jobs that would publish in one repo: the later one waits until it has the repo for itself."""

import threading
from dataclasses import replace

import pytest
from batch_helpers import RECIPES, add, ledger, seen, wanted

from converter.batch.catalogue import Catalogue, Wanted
from converter.batch.recipes import Policy

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
