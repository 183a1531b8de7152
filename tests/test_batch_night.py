"""One night, small: real conversions, a failing hub, a killed worker, and what is left after it."""

import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.night import Night, simulate
from benchmarks.night_report import summary
from converter.batch.examine import examine
from converter.batch.orders import Order, Part
from converter.batch.recipes import Asked, Policy
from converter.batch.work import renew_card
from converter.plan import Options
from quant.recipe import QuantSpec


def part(target: str) -> Part:
    return Part(
        job=1,
        variant="4bit",
        target=target,
        asked=Asked(options=Options(quant=QuantSpec.make("affine", 4, 64))),
        policy=Policy(twin=False),
    )


def order(api, repo: str, target: str, folder: Path) -> Order:
    commit = api.model_info(repo).sha
    return Order(repo=repo, commit=commit, folder=folder, parts=(part(target),), workers=1)


def is_inside(ledger: str) -> bool:
    """Whether a worker is in the middle of a stage; SQLite's readers wait for nobody's write."""
    place = Path(ledger.removeprefix("sqlite:///"))
    if not place.exists():
        return False
    with closing(sqlite3.connect(f"file:{place}?mode=ro", uri=True)) as connection:
        tables = "SELECT count(*) FROM sqlite_master WHERE name = 'job'"
        stages = "SELECT count(*) FROM job WHERE inside = 1 AND stage != 'examine'"
        return all(connection.execute(query).fetchone()[0] for query in (tables, stages))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_night(tmp_path, monkeypatch):
    release, target = "north/llama-0", "night/llama-0-4bit"

    def kill_inside_a_stage(night, running):
        worker = running.get(0)
        if worker is None or worker.poll() is not None or night.killed:
            return None
        worker.send_signal(signal.SIGSTOP)  # so that what the ledger says stays true
        if is_inside(night.ledger):
            return worker
        worker.send_signal(signal.SIGCONT)
        return None

    def after(api):
        # A ledger that is lost loses nothing: the hub says what is published.
        place = api.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", api.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", place)
        monkeypatch.setenv("HF_TOKEN", api.token)
        answer = examine(order(api, release, target, tmp_path / "again"))
        assert answer.published == {1: f"{api.endpoint}/{target}"}
        assert not list((tmp_path / "again").rglob("*.safetensors"))
        # A commit that changes the card alone renews the card alone.
        before = {f.path: f.blob_id for f in api.list_repo_tree(target) if f.path != "README.md"}
        card = "---\nlicense: mit\npipeline_tag: text-generation\n---\n# Renewed\n"
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=release)
        renewed = order(api, release, target, tmp_path / "card")
        assert renew_card(renewed).published == {1: f"{api.endpoint}/{target}"}
        assert api.model_info(target).card_data.license == "mit"
        after = {f.path: f.blob_id for f in api.list_repo_tree(target) if f.path != "README.md"}
        assert after == before
        renew_card(renewed)
        titles = [commit.title for commit in api.list_repo_commits(target)]
        assert [title.split()[0] for title in titles] == ["Renew", "Convert", "initial"]

    night = Night(
        root=tmp_path,
        types=("llama",),
        count=1,
        variants=("4bit",),
        workers=1,
        choose=kill_inside_a_stage,
        after=after,
        deadline=400,
        say=lambda line: None,
    )
    found = simulate(night)
    assert found == [], summary(night, found)
    assert night.killed == 1
    assert sum(row["lost"] for row in night.rows) >= 1
    assert sum(night.struck.values()) >= 5
    errors = {row["repo"]: row["error"] for row in night.rows if row["error"]}
    assert set(errors) == {"south/unheard-of", "south/damaged", "south/locked"}
    assert "no map for model_type 'unheard_of'" in errors["south/unheard-of"]
    assert "model.embed_tokens.weight, row 0, column 0 is NaN" in errors["south/damaged"]
    assert "south/locked is gated" in errors["south/locked"]
