"""Qwen4-Exp: tables of n-grams, hashes of 64 bits, and layers by three names."""

import json
from itertools import pairwise

import header_fixtures
import numpy as np
import pytest
from mtp_twins import make_mtp_twin
from release_helpers import make, stored

from arch_maps.facts import Facts
from arch_maps.ops import sources
from arch_maps.registry import find
from arch_maps.text.qwen4_exp import MAX_TABLES, primes_from
from converter.plan import Options, build_plan
from converter.plan.match import match_release
from converter.source import open_folder
from quant.recipe import QuantSpec
from validate.batched import batched
from validate.metrics import relative_error
from validate.runtime import MlxRuntime
from validate.twin import load_example

TABLE = "ple.ple_embedding.ngram_embedding"
ARCH = find("qwen4_exp")


def problems_of(**text):
    config = load_example("qwen4_exp")
    config["text_config"] |= text
    facts = Facts(config)
    ARCH.expand(facts, ARCH.layouts[0])
    ARCH.config(config, facts)
    return facts.problems


def test_primes_are_the_references():
    from transformers.models.qwen4_exp import modeling_qwen4_exp as reference

    for low, count in ((1, 12), (2, 3), (90, 8), (4090, 30), (20_000_000, 5)):
        wanted = [reference._find_nth_prime_after(low - 1, n + 1) for n in range(count)]
        assert list(primes_from(low, count)) == wanted


def test_the_release_is_planned_with_its_tables_in_narrower_groups():
    """Rows of 160 numbers are no whole groups of 64, and hold a fourth of all parameters."""
    [path] = (header_fixtures.ROOT / "qwen4_exp").glob("*.json")
    source = header_fixtures.load(path).source()
    plan = build_plan(source, match_release(source, ARCH), Options(quant=QuantSpec.make("affine")))
    tables = [out for out in plan.outputs if TABLE in out.rule.target]
    assert len(tables) == 128
    assert {(out.quant.bits, out.quant.group_size) for out in tables} == {(4, 32)}
    named = plan.config["quantization"]
    entry = {"group_size": 32, "bits": 4, "mode": "affine"}
    assert named["group_size"] == 64
    assert named[f"language_model.model.layers.1.{TABLE}.shards.127"] == entry
    hashes = [out for out in plan.outputs if out.dtype == "I64"]
    assert {out.rule.target.rpartition(".")[2] for out in hashes} == {
        *("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets")
    }


def test_a_whole_table_is_shared_out_as_its_parts_are():
    config = load_example("qwen4_exp")
    parts, whole = (
        [r for r in ARCH.expand(Facts(config), layout).rules if TABLE in r.target]
        for layout in (ARCH.layouts[0], ARCH.layouts[2])
    )
    assert [rule.target for rule in parts] == [rule.target for rule in whole]
    assert [rule.expr.shape for rule in parts] == [rule.expr.shape for rule in whole]
    assert len({leaf for rule in whole for leaf in sources(rule.expr)}) == 1
    cuts = [(rule.expr.start, rule.expr.stop) for rule in whole]
    assert cuts[0][0] == 0
    assert all(stop == start for (_, stop), (start, _) in pairwise(cuts))
    assert cuts[-1][1] == 320_001_536


@pytest.mark.parametrize("kind", ["full_attention", "indexed_attention", "qwen_sparse_attention"])
def test_layers_that_choose_tokens_have_three_names(kind):
    """The release's, transformers' and the runtime's; the first is written, which all read."""
    config = load_example("qwen4_exp")
    kinds = config["text_config"]["layer_types"]
    config["text_config"]["layer_types"] = [kind if k == "full_attention" else k for k in kinds]
    facts = Facts(config)
    assert ARCH.config(config, facts)["text_config"]["layer_types"] == kinds
    assert facts.problems == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ({"ple_layer_ids": [4]}, "ple_layer_ids must list layers with linear attention"),
        ({"ple_layer_ids": [0]}, "ple_layer_ids must list layers with linear attention"),
        ({"split_ngram_parts": 512 - 1}, "split_ngram_parts (511) does not divide 320001536 rows"),
        ({"heads_per_ngram": MAX_TABLES}, f"make {2 * MAX_TABLES} n-gram tables"),
        ({"ngram_size": 1}, "make 0 n-gram tables"),
        ({"indexer_n_heads": None}, "does not state text_config.indexer_n_heads"),
        ({"indexer_kv_heads": 2}, "one key for a block of tokens"),
        ({"indexer_budget": 2047}, "indexer_budget must be a multiple"),
        ({"output_gate_type": "tanh"}, "only sigmoid and silu are computed"),
        ({"eos_token_id": None}, "eos_token_id, at which n-grams begin anew"),
        ({"layer_types": ["linear_attention"] * 47 + ["windowed"]}, "layer_types has windowed"),
    ],
)
def test_what_neither_side_computes_is_a_problem(text, problem):
    assert any(problem in found for found in problems_of(**text))


def test_an_output_gate_that_is_not_stated_is_the_activation():
    """Where the reference takes SiLU, the runtime takes a sigmoid."""
    config = load_example("qwen4_exp")
    config["text_config"].pop("output_gate_type")
    assert ARCH.config(config, Facts(config))["text_config"]["output_gate_type"] == "silu"


def test_hashes_keep_64_bits(twin_of, tmp_path):
    from safetensors import safe_open

    source = twin_of("qwen4_exp")
    [out] = make(source, tmp_path / "out")
    names = [f"layers.{layer}.ple.ple_embedding.layer_multipliers" for layer in (1, 3)]
    with (
        safe_open(source / "model.safetensors", "numpy") as old,
        safe_open(out / "model.safetensors", "numpy") as new,
    ):
        for name in names:
            was = old.get_tensor(f"model.language_model.{name}")
            now = new.get_tensor(f"language_model.model.{name}")
            assert now.dtype == was.dtype == np.int64
            assert now.max() > 2**31
            np.testing.assert_array_equal(now, was)
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["ple_layer_ids"] == [2, 4]


def test_rows_of_a_table_in_parts_are_read_alone(twin_of):
    """So that the block-by-block reference never holds the table of a release, 100 GB of it."""
    import torch

    from quant.calibrate.loading import Weights, empty_model

    folder = twin_of("qwen4_exp")
    source = open_folder(folder)
    shapes = {name: info.shape for name, info in source.tensors.items()}
    path = f"model.language_model.layers.1.{TABLE}"
    names = [f"{path}.shard_{part}.weight" for part in range(12)]
    with source.open() as reader:
        whole = np.concatenate([reader.read_rows(name, 0, shapes[name][0]) for name in names])
        read = Weights(empty_model(folder), reader, shapes).rows_of(f"{path}.weight")
        for start, stop in ((0, 1), (33, 35), (30, 110), (0, len(whole)), (5, 5)):
            rows = read(start, stop)
            torch.testing.assert_close(rows, torch.from_numpy(whole[start:stop]), rtol=0, atol=0)


@pytest.mark.usefixtures("runtimes")
def test_the_drafter_has_the_tensors_of_the_stock_splitter(tmp_path):
    from mlx_vlm.split_mtp import split_mtp

    twin = make_mtp_twin("qwen4_exp", tmp_path / "twin")
    _, drafter = make(twin, tmp_path / "out", mtp=True)
    split_mtp(str(twin), str(tmp_path / "stock"))
    wanted, found = stored(tmp_path / "stock"), stored(drafter)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name].view(np.uint32), value.view(np.uint32), name)


def test_padded_rows_decode_with_all_tokens_until_the_indexers_mask_is_put_in(
    twin_of, tmp_path, monkeypatch, runtimes
):
    """The cause that reports name where rows of a batch part (``validate/batch_faults.py``)."""
    from mlx_vlm.models.qwen4_exp import language

    (out,) = make(twin_of("qwen4_exp"), tmp_path / "out")
    model = MlxRuntime.load(out, runtime="mlx_vlm")
    prompts = [[*range(20, 38)], [*range(60, 90)]]
    answers = [[5, 6, 7], [8, 9, 10]]
    alone = [model.run(model.text_inputs(p), a) for p, a in zip(prompts, answers, strict=True)]
    wanted = [run.steps for run in alone]

    def error():
        found = batched(model, prompts, answers)
        return max(relative_error(w, f) for w, f in zip(wanted, found, strict=True))

    assert 0.02 < error() < 0.5
    forward = language.Qwen4ExpBatchInvariantForward
    stock = forward._qsa_attention

    def chosen(self, attention, states, cache, positions, mask):
        if mask != "left_padded_decode":
            return stock(self, attention, states, cache, positions, mask)
        projected = self._linear(attention.indexer.index_qk_proj, states)
        own = attention.indexer.from_projected(projected, cache, positions)
        mask = mask if own is None else own
        return self._attention(attention, states, mask, cache, positions, None)

    monkeypatch.setattr(forward, "_qsa_attention", chosen)
    assert error() < 1e-5
