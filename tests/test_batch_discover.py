"""What a batch reads of the hub: discovery, headers that arrive damaged, files checked once."""

import time
from datetime import UTC, datetime
from types import SimpleNamespace

import httpx2
import pytest
from batch_helpers import watch
from PIL import Image

from converter.batch import discover as discover_module
from converter.batch.believed import believed
from converter.batch.discover import content_of, discover, wanted, watermark_key
from converter.batch.needs import guessed, needs_of, output_bytes, proof_bytes
from converter.batch.recipes import recipes_of
from converter.batch.watchlist import Filters
from converter.errors import HubError, PlanError
from converter.hub import resolve_revision
from converter.plan import Options
from converter.staging import Fault, Weather
from quant.recipe import QuantSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("closed_ledgers"),
]


CARD = "---\nlicense: {licence}\npipeline_tag: {task}\n---\n# x\n"


def release(api, repo, *, licence="apache-2.0", task="text-generation", weights=b"x" * 100):
    from huggingface_hub import CommitOperationAdd

    files = {
        "README.md": CARD.format(licence=licence, task=task).encode(),
        "config.json": b"{}",
        "model.safetensors": weights,
    }
    api.create_repo(repo, exist_ok=True)
    adds = [CommitOperationAdd(name, data) for name, data in files.items()]
    return api.create_commit(repo, adds, commit_message="release").oid


def found_in(catalogue):
    return {entry.release.repo for entry in catalogue.entries()}


def look(watchlist, catalogue, now=None):
    return discover(watchlist, catalogue, say=lambda line: None, now=now or time.time())


def test_discovery_pages_down_to_its_watermark(api, catalogue, tmp_path, faults, monkeypatch):
    monkeypatch.setattr(discover_module, "OVERLAP_S", 0.0)
    for number in range(5):
        release(api, f"acme/m{number}")
    release(api, "other/model")
    first = look(watch(tmp_path), catalogue)
    assert (first.seen, first.matched, first.added, first.problems) == (5, 5, 5, [])
    assert found_in(catalogue) == {f"acme/m{number}" for number in range(5)}
    commit = release(api, "acme/m1", weights=b"y" * 100)
    release(api, "acme/new")
    asked = len(faults.requests)
    second = look(watch(tmp_path), catalogue)
    assert (second.seen, second.added) == (2, 2)
    listings = [path for _, path in faults.requests[asked:] if path == "/api/models"]
    assert len(listings) <= 2  # of three items, on pages of two
    newest = {e.release.repo: e.release.commit for e in reversed(catalogue.entries())}
    assert newest["acme/m1"] == commit
    assert look(watch(tmp_path), catalogue).seen == 0
    # Another recipe is another question: everything is looked at again, what is known stays.
    more = watch(tmp_path, "[watch.filters]\nmin_size = 50\n")
    third = look(more, catalogue)
    assert (third.seen, third.added) == (6, 0)


def test_filters_are_honoured(api, catalogue, tmp_path):
    release(api, "acme/good")
    release(api, "acme/closed", licence="other")
    release(api, "acme/speech", task="text-to-speech")
    release(api, "acme/large", weights=b"x" * 2000)
    release(api, "acme/good-AWQ")
    text = (
        '[watch.filters]\nlicences = ["apache-2.0"]\npipeline_tags = ["text-generation"]\n'
        'exclude = ["*-AWQ"]\nmax_size = "1kB"\n'
    )
    look(watch(tmp_path, text), catalogue)
    assert found_in(catalogue) == {"acme/good"}


def info(**settings):
    facts = {"id": "acme/m", "tags": ["license:mit"], "downloads": 5, "disabled": False}
    facts |= {"pipeline_tag": "text-generation", "library_name": "transformers"}
    facts |= {"created_at": datetime.fromtimestamp(1000, UTC), "last_modified": None}
    return SimpleNamespace(**{**facts, **settings})


@pytest.mark.parametrize(
    ("filters", "settings", "passes"),
    [
        ({}, {}, True),
        ({}, {"library_name": "mlx"}, False),
        ({}, {"tags": ["mlx"]}, False),
        ({}, {"disabled": True}, False),
        ({"max_age": 50.0}, {}, False),
        ({"max_age": 150.0}, {}, True),
        ({"min_downloads": 6}, {}, False),
        ({"min_downloads": 5}, {}, True),
        ({"include": ("x*",)}, {}, False),
        ({"include": ("m",)}, {}, True),
        ({"licences": ("apache-2.0",)}, {}, False),
        ({"licences": ("mit",)}, {}, True),
        ({"licences": ("mit",)}, {"tags": []}, False),
        ({"pipeline_tags": ("image-text-to-text",)}, {}, False),
    ],
)
def test_each_filter(filters, settings, passes):
    assert wanted(info(**settings), Filters(**filters), now=1100.0) is passes


def test_what_cannot_be_looked_at_is_looked_at_again(api, catalogue, tmp_path, faults):
    release(api, "acme/one")
    release(api, "acme/two")
    for _ in range(4):
        faults.add(Fault("refuse", "GET", "/api/models/acme/one/", status=503))
    found = look(watch(tmp_path), catalogue)
    assert found.failed
    assert len(found.problems) == 1
    assert found.problems[0].startswith("acme/one: Looking up acme/one at ")
    assert found_in(catalogue) == {"acme/two"}
    assert look(watch(tmp_path), catalogue).problems == []
    assert found_in(catalogue) == {"acme/one", "acme/two"}


def test_single_models_follow_their_branch_and_may_be_missing(api, catalogue, tmp_path):
    release(api, "acme/one")
    first = api.model_info("acme/one").sha
    api.create_branch("acme/one", branch="stable")
    release(api, "acme/one", weights=b"new")
    models = 'models = ["acme/one@stable", "acme/none"]'
    found = look(watch(tmp_path, models=models), catalogue)
    assert [entry.release.commit for entry in catalogue.entries()] == [first]
    assert found.problems[0].startswith("models: acme/none: Looking up acme/none: there is no repo")
    assert not found.failed  # waiting would not help


@pytest.mark.parametrize("how", ["ConnectError", "ConnectTimeout", "ProxyError"])
def test_a_hub_that_cannot_be_reached_is_asked_once(catalogue, tmp_path, monkeypatch, how):
    """Asking takes minutes of patience, and a watch list may name a hundred."""
    asked, lines = [], []

    def away(repo, revision=None):
        asked.append(repo)
        try:
            raise getattr(httpx2, how)("away")
        except httpx2.TransportError as error:
            raise HubError("the hub cannot be reached") from error

    monkeypatch.setattr(discover_module, "resolve_revision", away)
    monkeypatch.setattr(discover_module, "list_changed", pytest.fail)
    several = watch(tmp_path, models='models = ["acme/a", "acme/b"]\norganisations = ["acme"]')
    found = discover(several, catalogue, say=lines.append, now=time.time())
    assert (asked, found.failed) == (["acme/a"], True)
    assert found.problems == ["models: acme/a: the hub cannot be reached"]
    assert lines[-1] == "what else is watched is left to the next run"


def test_a_run_that_is_stopped_looks_no_further(api, catalogue, tmp_path):
    for number in range(3):
        release(api, f"acme/m{number}")
    looked = []

    def stopped():
        looked.append(None)
        return len(looked) > 2

    found = discover(
        watch(tmp_path), catalogue, say=lambda line: None, now=time.time(), stopped=stopped
    )
    assert (found.seen, found.added) == (1, 1)
    assert look(watch(tmp_path), catalogue).added == 2  # the mark is where it came to


def test_an_organisation_without_models_is_said(api, catalogue, tmp_path):
    lines = []
    nobody = watch(tmp_path, models='organisations = ["acmee"]')
    discover(nobody, catalogue, say=lines.append, now=time.time())
    assert lines == ["organisations: acmee: the hub lists no model of it"]


def test_a_new_text_looks_at_all_anew(tmp_path):
    """As a new adapter does: what is made by it is other bytes."""
    keys = []
    for content in ("one text. " * 9000, "another. " * 9000):
        text = tmp_path / "text.txt"
        text.write_text(content)
        data = f'calibration_data = "{text}"\nrecipes = ["own"]'
        watchlist = watch(tmp_path, f'{data}\n[recipes.own]\nq_bits = 4\nq_method = "imatrix"')
        recipes = recipes_of(watchlist, watchlist.watch[0])
        keys.append(watermark_key(watchlist, watchlist.watch[0], recipes))
    assert keys[0] != keys[1]


def test_a_new_picture_looks_at_all_anew(tmp_path):
    keys = []
    for colour in ("red", "green"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "text.txt").write_text("one text. " * 9000)
        Image.new("RGB", (8, 8), colour).save(tmp_path / "data" / "picture.png")
        data = f'calibration_data = "{tmp_path / "data"}"\nrecipes = ["own"]'
        watchlist = watch(tmp_path, f'{data}\n[recipes.own]\nq_bits = 4\nq_method = "imatrix"')
        recipes = recipes_of(watchlist, watchlist.watch[0])
        keys.append(watermark_key(watchlist, watchlist.watch[0], recipes))
    assert keys[0] != keys[1]


def test_a_branch_that_moves_is_another_job(api, catalogue, tmp_path, faults):
    release(api, "acme/one")
    before = api.model_info("acme/one").sha
    faults.add(Fault("move_branch", "GET", "/api/models/acme/one/revision/"))
    look(watch(tmp_path), catalogue)
    assert [entry.release.commit for entry in catalogue.entries()] == [before]
    assert api.model_info("acme/one").sha != before
    look(watch(tmp_path), catalogue)
    assert [e.release.commit for e in catalogue.entries()] == [api.model_info("acme/one").sha]


def test_weather_is_the_same_for_the_same_seed_and_hits_its_rate():
    bad = Weather(0.1, seed=3)
    asked = [("GET", f"/acme/m/resolve/main/f{number}", 0) for number in range(2000)]
    struck = [bad.strike(*one) for one in asked]
    assert struck == [Weather(0.1, seed=3).strike(*one) for one in asked]
    assert struck != [Weather(0.1, seed=4).strike(*one) for one in asked]
    hit = [fault for fault in struck if fault is not None]
    assert 150 < len(hit) < 250
    assert {fault.kind for fault in hit} == {"refuse", "corrupt", "truncate", "ignore_range"}
    assert {fault.status for fault in hit if fault.kind == "refuse"} == {429, 500, 502, 503, 504}
    assert any(bad.strike("GET", "/x/resolve/", before) is None for before in range(50))


def test_content_is_everything_but_the_card(api):
    first = content_of(resolve_revision("acme/m", revision=release(api, "acme/m")))
    card = content_of(resolve_revision("acme/m", revision=release(api, "acme/m", licence="mit")))
    weights = release(api, "acme/m", weights=b"y" * 100)
    assert card == first
    assert content_of(resolve_revision("acme/m", revision=weights)) != first


def test_what_a_release_needs_is_guessed_from_its_size_as_from_its_plans():
    plan = SimpleNamespace(parameters=10**9, output_bytes=2 * 10**9, outputs=(), options=Options())
    source = SimpleNamespace(tensors={"all": SimpleNamespace(shape=(10**9,))})
    given = {"proof": proof_bytes(source), "source_bytes": 2 * 10**9, "workers": 1}
    found = needs_of([plan], fused=False, **given)
    assert guessed(2 * 10**9, 1) == {name: found[name] for name in ("disk", "memory")}
    assert needs_of([plan], fused=True, **given)["disk"] == found["disk"] + 4 * 10**9
    assert set(needs_of([], fused=False, **given).values()) == {0}
    assert found["convert"] < found["memory"]
    plan.options = Options(quant=QuantSpec.make("affine"), target_bits=4.5)
    assert output_bytes(plan) == 4.5e9 / 8


@pytest.mark.parametrize(
    ("said", "raised"),
    [
        (["a", "a", "a"], PlanError),
        (["a", "a", None], None),
        (["a", None], None),
        (["a", "b"], HubError),
        (["a", "a", "b"], HubError),
    ],
)
def test_a_refusal_is_believed_when_every_reading_says_it(said, raised):
    left = iter(said)

    def read():
        if (text := next(left)) is not None:
            raise PlanError([text])
        return "read"

    if raised is None:
        assert believed("acme/m", read) == "read"
    else:
        with pytest.raises(raised, match="a" if raised is PlanError else "damaged answers"):
            believed("acme/m", read)
    assert list(left) == []
