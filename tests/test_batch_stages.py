"""The stages of a batch against a hub: headers that arrive damaged, variants, targets, adapters."""

import json
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
from batch_helpers import RECIPES
from mtp_twins import make_mtp_twin
from release_helpers import (
    FOUR_BIT,
    LLAMA,
    factors,
    llama_shapes,
    llama_tensors,
    make,
    peft_config,
    peft_pair,
    status,
    write_adapter,
    write_release,
)

from converter.adapter import read_adapter
from converter.batch import examine as examine_module
from converter.batch import published, work
from converter.batch.examine import examine
from converter.batch.failures import Failure
from converter.batch.needs import PROCESS_BYTES
from converter.batch.orders import Order, Part
from converter.batch.published import PARITY
from converter.batch.recipes import Asked, Policy
from converter.batch.work import (
    convert_release,
    fetch_release,
    prove_output,
    publish_output,
    renew_card,
)
from converter.errors import HubError, PlanError
from converter.execute.parts import Part as Shards
from converter.hub import fetch as fetch_module
from converter.manifest import read_manifest
from converter.plan import Options, layout
from converter.staging import Fault
from quant.calibrate.text import calibration_of
from quant.recipe import QuantSpec
from validate.streamed.tensors import whole_run_bytes

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


POLICY = Policy(twin=False)


@pytest.fixture
def order_of(api, tmp_path):
    """Publishes a release, and gives the order for some variants of it."""

    def order(source, *variants, recipes=RECIPES, policy=POLICY):
        api.create_repo("acme/small")
        api.upload_folder(repo_id="acme/small", folder_path=source)
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
    assert {job: failure.kind for job, failure in looked.failed.items()} == {4: "usage"}
    assert ["plan" in looked.facts[job] for job in (1, 2, 3)] == [True, False, True]
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
    # So does the command that each of them tells, where the adapter lies.
    monkeypatch.chdir(tmp_path)
    for out in outputs.values():
        command = shlex.split(read_manifest(out).data["command"])
        told = tmp_path / "told" / out.name
        assert status(*command[1:], "--no-validate", "--mlx-path", told) == 0
        assert read_manifest(told).checkpoint == read_manifest(out).checkpoint
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


def test_a_text_that_is_not_on_this_machine_leaves_the_other_variants(order_of, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text. " * 100)
    calibration = calibration_of(text, sequences=2, length=16)
    quant = QuantSpec.make("affine", 4, 64, "imatrix")
    asked = {
        "own": Asked(options=Options(quant=quant, calibration=calibration)),
        "bf16": RECIPES["bf16"],
    }
    policy = replace(POLICY, calibration_data=str(text))
    source = write_release(tmp_path / "source")
    order = order_of(source, "own", "bf16", recipes=asked, policy=policy)
    text.rename(tmp_path / "elsewhere")
    answer = convert_release(order)
    told = f"calibration_data {text}: cannot be read on this machine: no such file or folder"
    assert answer.failed == {1: Failure("adapter", told)}
    assert list(answer.facts) == [2]
    text.write_text("another. " * 100)
    assert convert_release(order).failed[1].text.endswith("run it again")


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
    monkeypatch.setattr(
        published, "find_published", lambda *given: seen_in.append(given[2]) or there
    )
    monkeypatch.setattr(work, "read_manifest", lambda out: SimpleNamespace(plan="p", files={}))
    for number in (1, 2):
        asked = RECIPES["bf16"]
        part = Part(job=number, variant="v", target="n/v", asked=asked, policy=POLICY, plan="p")
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


def judged(order, made, verdict="pass"):
    """Write the report that a proof of these files would leave."""
    manifest = read_manifest(made.folder)
    report = {"plan": manifest.plan, "checkpoint": manifest.checkpoint, "verdict": verdict}
    row = {"name": "logits", "verdict": verdict, "value": 1e-6, "modality": "text"}
    (made.folder / PARITY).write_text(json.dumps({**report, "checks": [row]}))


def known(order, answer):
    """The order of the next stage, which knows the plans that a stage told of."""
    facts = answer.facts[1]
    plans = {name: facts[name] for name in ("plan", "drafter_plan")}
    return replace(order, parts=(replace(order.parts[0], **plans),))


def test_a_drafter_goes_with_its_output(order_of, api, tmp_path, monkeypatch, faults):
    """Made, judged, published and known again as the output is, in a repo of its own."""
    asked = {"4bit": Asked(options=FOUR_BIT, mtp=True)}
    order = order_of(make_mtp_twin("qwen3_5", tmp_path / "source"), "4bit", recipes=asked)
    looked = examine(order)
    assert (looked.failed, looked.published, looked.cuts) == ({}, {}, 1)
    order = known(order, looked)
    fetch_release(order)
    assert known(order, convert_release(order)) == order
    out, drafter = order.made(order.parts[0])
    assert (out.target, drafter.target) == ("n/small-4bit", "n/small-4bit-mtp")
    told = {read_manifest(one.folder).data["command"] for one in (out, drafter)}
    asked = f"convert --hf-path acme/small --revision {order.commit} --quantize --q-bits 4"
    assert told == {f"{asked} --q-group-size 32 --mtp"}
    [by_hand, *_] = make(tmp_path / "source", tmp_path / "by-hand", FOUR_BIT, mtp=True)
    for one, theirs in ((out, by_hand), (drafter, by_hand.with_name("by-hand-mtp"))):
        weights = (theirs / "model.safetensors").read_bytes()
        assert (one.folder / "model.safetensors").read_bytes() == weights
    monkeypatch.setattr("converter.pipeline.execute", None)
    assert convert_release(order).bytes == 0
    beside = []
    monkeypatch.setattr(work, "_prove", lambda order, part: judged(order, out))
    monkeypatch.setattr(
        work,
        "prove_drafter",
        lambda folder, *, target, console: beside.append(target) or judged(order, drafter, "fail"),
    )
    missed = prove_output(order)
    assert missed.failed[1].kind == "gate"
    assert missed.failed[1].text.startswith("n/small-4bit-mtp: ")
    assert (order.kept_report("n/small-4bit-mtp") / PARITY).is_file()
    monkeypatch.setattr(
        work,
        "prove_drafter",
        lambda folder, **given: beside.append(folder) or judged(order, drafter),
    )
    assert not prove_output(order).failed
    assert beside == [out.folder, drafter.folder]
    faults.add(Fault("refuse", "POST", r"n/small-4bit-mtp/commit", status=403))
    with pytest.raises(HubError):
        publish_output(order)
    first = api.model_info(out.target).sha
    told = publish_output(order)
    assert told.published == {1: f"{api.endpoint}/{out.target}"}
    assert api.model_info(out.target).sha == first, "published once"
    assert {"config.json", "README.md", PARITY} <= {
        file.rfilename for file in api.model_info(drafter.target).siblings
    }
    again = examine(replace(order, parts=(replace(order.parts[0], plan=None),)))
    assert again.published == told.published
    assert again.needs["disk"] == 0
    renew_card(order)
    api.delete_repo(drafter.target)
    assert examine(order).published == {}


def test_a_drafter_of_a_target_size_is_known_again_from_headers(
    order_of, api, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = Options(quant=QuantSpec.make("affine"), target_bits=12.0)
    order = order_of(
        make_mtp_twin("qwen3_5", tmp_path / "source"),
        "sized",
        recipes={"sized": Asked(options=options, mtp=True)},
    )
    assert examine(order).published == {}
    made = known(order, convert_release(order))
    out, drafter = made.made(made.parts[0])
    assert read_manifest(drafter.folder).plan == drafter.plan
    for one in (out, drafter):
        judged(made, one)
    told = publish_output(made)
    again = examine(order)  # by a ledger that knows nothing of it
    assert again.published == told.published
    assert again.needs["disk"] == 0
