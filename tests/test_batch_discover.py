"""What a batch reads of the hub: discovery, headers that arrive damaged, files checked once."""

import time
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from batch_helpers import RECIPES, close_ledgers, ledger, watch
from huggingface_hub import HfApi
from release_helpers import (
    FOUR_BIT,
    LLAMA,
    factors,
    llama_shapes,
    llama_tensors,
    make,
    peft_config,
    peft_pair,
    write_adapter,
    write_release,
)

from converter.adapter import read_adapter
from converter.batch import discover as discover_module
from converter.batch import examine as examine_module
from converter.batch import work
from converter.batch.believed import believed
from converter.batch.catalogue import Catalogue
from converter.batch.discover import content_of, discover, wanted
from converter.batch.examine import examine
from converter.batch.failures import Failure
from converter.batch.needs import PROCESS_BYTES, guessed, needs_of, output_bytes, proof_bytes
from converter.batch.orders import Order, Part
from converter.batch.recipes import Asked, Policy
from converter.batch.watchlist import Filters
from converter.batch.work import convert_release, fetch_release, prove_output, publish_output
from converter.errors import HubError, PlanError
from converter.execute.parts import Part as Shards
from converter.hub import api as hub_api
from converter.hub import fetch as fetch_module
from converter.hub import resolve_revision
from converter.plan import Options, layout
from converter.staging import Fault, Faults, StagingOptions, Weather, running_hub
from quant.calibrate.text import Calibration
from quant.recipe import QuantSpec
from validate.streamed.tensors import whole_run_bytes

TOKEN = "hf_sentinelsentinelsentinel"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def _closed():
    yield
    close_ledgers()


@pytest.fixture
def catalogue(tmp_path):
    return Catalogue(ledger(f"sqlite:///{tmp_path / 'state' / 'ledger.db'}"))


CARD = "---\nlicense: {licence}\npipeline_tag: {task}\n---\n# x\n"


@pytest.fixture
def faults():
    return Faults()


@pytest.fixture
def api(tmp_path, faults, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_api, "FIRST_WAIT_S", 0.01)
    options = StagingOptions(page_size=2)
    with running_hub(tmp_path / "hub", options=options, faults=faults) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        yield HfApi(endpoint=endpoint, token=TOKEN)


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


@pytest.fixture
def order_of(api, tmp_path, monkeypatch):
    """Publishes a release, and gives the order for some variants of it."""
    place = api.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", place)

    def order(source, *variants, recipes=RECIPES):
        api.create_repo("acme/small")
        api.upload_folder(repo_id="acme/small", folder_path=source)
        policy = Policy(twin=False)
        parts = [
            Part(job=n, variant=v, target=f"n/small-{v}", asked=recipes[v], policy=policy)
            for n, v in enumerate(variants, start=1)
        ]
        return Order(
            repo="acme/small",
            commit=api.model_info("acme/small").sha,
            folder=tmp_path / "work",
            parts=tuple(parts),
            workers=1,
        )

    return order


def weight_requests(faults):
    return sum(path.endswith(".safetensors") for _, path in faults.requests)


def test_a_damaged_header_is_read_again_in_every_stage(order_of, faults, tmp_path):
    order = order_of(write_release(tmp_path / "source"), "bf16")
    (part,) = order.parts
    for number, stage in enumerate((examine, fetch_release, convert_release), start=1):
        faults.add(Fault(kind="corrupt", method="GET", path="/resolve/.*safetensors"))
        answer = stage(order)
        assert answer.failed == {}
        assert faults.struck["corrupt"] == number
        if stage is examine:
            order = replace(order, parts=(replace(part, plan=answer.facts[1]["plan"]),))
    assert (order.out(part) / "conversion.json").is_file()


def test_a_refused_release_is_read_as_often_for_many_variants_as_for_one(
    order_of, faults, tmp_path
):
    tensors = llama_tensors(LLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    order = order_of(write_release(tmp_path / "source", tensors=tensors), "bf16", "4bit")
    asked = weight_requests(faults)
    with pytest.raises(PlanError, match="up_proj"):
        examine(replace(order, parts=order.parts[:1]))
    alone = weight_requests(faults) - asked
    answer = examine(order)
    assert weight_requests(faults) - asked == 2 * alone
    assert {job: failure.kind for job, failure in answer.failed.items()} == dict.fromkeys(
        (1, 2), "unsupported"
    )


def test_a_variant_that_does_not_fit_leaves_the_others(order_of, tmp_path, monkeypatch):
    order = order_of(write_release(tmp_path / "source"), "bf16", "4bit")
    plan = examine_module.plan_request

    def picky(request, **given):
        if any(recipe.quant is not None for recipe in request.recipes):
            raise PlanError(["no 4bit today"])
        return plan(request, **given)

    monkeypatch.setattr(examine_module, "plan_request", picky)
    answer = examine(order)
    assert answer.failed == {2: Failure("unsupported", "no 4bit today")}
    assert list(answer.facts) == [1]
    shapes = llama_shapes(LLAMA)
    assert answer.needs["memory"] == whole_run_bytes(shapes) + PROCESS_BYTES
    assert 0 < answer.needs["convert"] < answer.needs["memory"]
    assert answer.facts[1]["needs"] == answer.needs


WIDER = LLAMA | {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 1024}
TARGET = Options(quant=QuantSpec.make("affine"), target_bits=6.0)
TEXT = Calibration(sha256="0" * 64, sequences=1, length=1)


def test_targets_and_adapters_are_made_as_by_hand(order_of, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_release(tmp_path / "small", WIDER)
    pairs = peft_pair("model.layers.0.mlp.down_proj", *factors((128, 384), 2, 2))
    lora = write_adapter(tmp_path / "lora", peft_config(r=2), pairs)
    record = read_adapter(lora).record()
    asked = {
        "bf16": RECIPES["bf16"],
        "target": Asked(options=TARGET),
        "tuned": Asked(options=FOUR_BIT, adapter=record, adapter_path=str(lora)),
        "never": Asked(options=replace(TARGET, target_bits=1.0)),
    }
    order = order_of(source, "bf16", "target", "tuned", "never", recipes=asked)
    looked = examine(order)
    assert looked.failed == {}
    assert ["plan" in looked.facts[job] for job in (1, 2, 3, 4)] == [True, False, True, False]
    parameters = looked.facts[2]["parameters"]
    assert looked.facts[2]["output_bytes"] == int(6 * parameters / 8)
    assert not any(path.suffix == ".safetensors" for path in order.folder.rglob("*"))
    answer = convert_release(order)
    (reason,) = answer.failed.items()
    assert (reason[0], reason[1].kind) == (4, "usage")
    assert "--q-target-bpw 1" in reason[1].text
    outputs = {part.variant: order.out(part) for part in order.parts if part.job != 4}
    make(source, tmp_path / "by-hand", asked["bf16"].options, TARGET)
    make(source, tmp_path / "by-hand" / "tuned", FOUR_BIT, adapter_path=lora)
    by_hand = dict(zip(outputs, ("small-bf16", "small-6bpw", "tuned"), strict=True))
    for name, out in outputs.items():
        weights = (tmp_path / "by-hand" / by_hand[name] / "model.safetensors").read_bytes()
        assert (out / "model.safetensors").read_bytes() == weights, name
    # What was made is known again, and what is not to be had is not measured for again.
    plans = {job: facts["plan"] for job, facts in answer.facts.items()}
    again = replace(order, parts=tuple(replace(p, plan=plans.get(p.job)) for p in order.parts[:3]))
    monkeypatch.setattr("converter.pipeline.allocated", None)
    assert convert_release(again).bytes == 0
    proved = {}

    def prove(out, *, source, plan, **given):
        proved[out.name] = (source, (source / "config.json").is_file())

    monkeypatch.setattr(work, "prove", prove)
    monkeypatch.setattr(work, "write_card", lambda out, **given: None)
    monkeypatch.setattr(work, "require_proof", lambda out, **given: {})
    monkeypatch.setattr(work, "_read", lambda path: {"verdict": "pass", "checks": []})
    for part in again.parts:
        prove_output(replace(again, parts=(part,)))
    found = {name: (folder == order.source, there) for name, (folder, there) in proved.items()}
    assert found == {
        "small-bf16": (True, True),
        "small-target": (True, True),
        "small-tuned": (False, True),
    }


def test_an_adapter_that_is_not_on_this_machine_leaves_the_other_variants(order_of, tmp_path):
    pairs = peft_pair("model.layers.0.mlp.down_proj", *factors((64, 128), 2, 2))
    lora = write_adapter(tmp_path / "lora", peft_config(r=2), pairs)
    record = read_adapter(lora).record()
    asked = {
        "tuned": Asked(options=FOUR_BIT, adapter=record, adapter_path=str(lora)),
        "bf16": RECIPES["bf16"],
        "never": Asked(options=replace(TARGET, target_bits=1.0)),
    }
    source = write_release(tmp_path / "source")
    order = order_of(source, "tuned", "bf16", "never", recipes=asked)
    lora.rename(tmp_path / "elsewhere")
    answer = convert_release(order)
    kinds = {job: failure.kind for job, failure in answer.failed.items()}
    assert kinds == {1: "adapter", 3: "usage"}
    assert list(answer.facts) == [2]


def test_what_was_finished_before_its_worker_was_killed_is_not_made_again(
    order_of, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = {"bf16": RECIPES["bf16"], "target": Asked(options=TARGET)}
    order = order_of(write_release(tmp_path / "small", WIDER), "bf16", "target", recipes=asked)
    first = convert_release(order)
    with monkeypatch.context() as patch:
        patch.setattr("converter.pipeline.execute", None)
        assert convert_release(order).facts == first.facts
    other = replace(order, parts=(replace(order.parts[1], asked=Asked(options=FOUR_BIT)),))
    assert convert_release(other).facts[2] != first.facts[2]  # what is in the way is replaced


def test_outputs_that_are_published_at_once_use_folders_of_their_own(tmp_path, monkeypatch):
    seen_in = []
    there = SimpleNamespace(facts={}, url="there")
    monkeypatch.setattr(work, "find_published", lambda *given: seen_in.append(given[2]) or there)
    monkeypatch.setattr(work, "read_manifest", lambda out: SimpleNamespace(plan="p", files={}))
    for number in (1, 2):
        asked = RECIPES["bf16"]
        part = Part(job=number, variant="v", target="n/v", asked=asked, policy=Policy())
        publish_output(Order(repo="a/b", commit="c", folder=tmp_path, parts=(part,)))
    assert len({*seen_in}) == 2


def test_files_that_were_checked_are_not_read_for_that_again(order_of, tmp_path, monkeypatch):
    monkeypatch.setitem(layout.lay_out.__kwdefaults__, "shard_bytes", 100_000)
    order = order_of(write_release(tmp_path / "source"), "bf16")
    fetch_release(order)
    checked = []
    check = fetch_module.check_hash
    monkeypatch.setattr(
        fetch_module, "check_hash", lambda *given: checked.append(given[1].path) or check(*given)
    )
    for number in (1, 2):
        convert_release(replace(order, shards=Shards(number, 2)))
    convert_release(order)
    fetch_release(order)
    assert checked == []
    weights = order.source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(HubError, match="arrived damaged"):
        fetch_release(order)
    assert checked == ["model.safetensors"]


def test_what_a_release_needs_is_guessed_from_its_size_as_from_its_plans():
    plan = SimpleNamespace(parameters=10**9, output_bytes=2 * 10**9, outputs=(), options=Options())
    source = SimpleNamespace(tensors={"all": SimpleNamespace(shape=(10**9,))})
    given = {"proof": proof_bytes(source), "source_bytes": 2 * 10**9, "workers": 1}
    found = needs_of([plan], fused=False, **given)
    assert guessed(2 * 10**9, 1) == {name: found[name] for name in ("disk", "memory")}
    assert needs_of([plan], fused=True, **given)["disk"] == found["disk"] + 4 * 10**9
    assert set(needs_of([], fused=False, **given).values()) == {0}
    assert found["convert"] < found["memory"]
    plan.options = Options(quant=QuantSpec.make("affine", 4, method="imatrix"), calibration=TEXT)
    assert needs_of([plan], fused=False, **given)["convert"] == found["memory"]  # the model is run
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
