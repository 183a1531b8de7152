"""Plans of real releases equal the golden files; a difference changes what users get."""

import hashlib
import json
from dataclasses import replace

import golden_plans
import pytest
from golden_plans import golden, golden_cases, path_of, plan_of, render

from converter.plan import Plan, canonical
from quant.recipe import QuantSpec

CASES = golden_cases()


@pytest.mark.parametrize(("model_type", "recipe"), CASES)
def test_plan_is_the_golden_one(model_type, recipe):
    text = path_of(model_type, recipe).read_text()
    found = golden(plan_of(model_type, recipe))
    assert found == json.loads(text), "if this is meant: python tests/golden_plans.py"
    assert render(found) == text


def test_every_golden_plan_is_of_a_type_that_has_one():
    written = {path.name for path in golden_plans.FOLDER.glob("plan_*.json")}
    assert written == {path_of(*case).name for case in CASES}


def test_golden_files_stay_small():
    assert max(path_of(*case).stat().st_size for case in CASES) < 60_000


@pytest.mark.parametrize("word", ["version", "hash", "files"])
def test_nothing_that_changes_with_the_program_is_kept(word):
    assert word not in golden(plan_of("llama", "4bit"))


def test_a_moved_tensor_changes_the_golden_content():
    plan: Plan = plan_of("llama", "4bit")
    shard = plan.shards[0]
    swapped = shard.header.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1)
    assert swapped != shard.header
    moved = replace(plan, shards=(replace(shard, header=swapped), *plan.shards[1:]))
    assert golden(moved) != golden(plan)


def test_layers_that_differ_are_told_apart():
    entries = [{"target": f"layers.{i}.w", "from": f"layers.{i}.w", "bits": 4} for i in range(4)]
    entries[2]["bits"] = 6
    assert golden_plans._collapsed(entries) == {
        "layers.{0-1,3}.w": {"from": "layers.{}.w", "bits": 4},
        "layers.{2}.w": {"from": "layers.{}.w", "bits": 6},
    }


@pytest.mark.parametrize(("recipe", "lot"), [("4bit", 1000), ("bf16", 1000), ("4bit", 7)])
def test_the_hash_is_that_of_the_json_with_its_keys_sorted(recipe, lot, monkeypatch):
    monkeypatch.setattr(canonical, "_LOT", lot)
    plan: Plan = plan_of("llama", recipe)
    strange = plan.outputs[-1]._replace(
        quant=QuantSpec.make("affine", method="search"), kept='a "quoted" é', origin="decoded:\n\\"
    )
    for told in (plan, replace(plan, outputs=(*plan.outputs, strange))):
        data = told.to_json()
        found = data.pop("hash")
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        assert found == hashlib.sha256(text.encode()).hexdigest()


def test_headers_are_as_json_writes_them():
    for shard in plan_of("llama", "4bit").shards:
        start = len(shard.header)
        entries = {
            t.name: {
                "dtype": t.dtype,
                "shape": t.shape,
                "data_offsets": [t.start - start, t.start - start + t.nbytes],
            }
            for t in shard.tensors
        }
        text = json.dumps({"__metadata__": {"format": "mlx"}, **entries}, separators=(",", ":"))
        assert shard.header[8:].rstrip() == text.encode()
