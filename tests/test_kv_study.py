"""The KV study: allocation, what it writes, and what it refuses."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from quant.kv.allocate import allocate, allocated_spec, choices, sensitivity
from quant.kv.measure import baseline, forward_of, loss
from quant.kv.observe import observed
from quant.kv.runtime import caches, own_caches
from quant.kv.scan import LayerFacts, effective_bits, spec_for, static_scan
from quant.kv.spec import BASES, KvSpec
from quant.kv.split import Layout
from quant.kv.turbo import KvError

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.usefixtures("runtimes")


def layers(count, dim=128, **given):
    return [
        LayerFacts(index=i, cache="KVCache", key_dim=dim, value_dim=dim, **given)
        for i in range(count)
    ]


def curves(facts, weight):
    """Losses that fall fourfold a bit, as rate-distortion has it, scaled by ``weight``."""
    one = Layout(dim=facts[0].key_dim)
    return {
        (fact.index, role): [
            replace(choice, kl=weight(fact.index, role) * 4.0**-choice.bits)
            for choice in choices(one, {2: 1.0})
        ]
        for fact in facts
        for role in ("key", "value")
    }


def test_equal_layers_get_equal_bits_within_the_budget():
    facts = layers(4)
    chosen = allocate(facts, curves(facts, lambda *_: 1.0), bits=4.125)
    assert {one.bits for one in chosen.values()} == {4}
    assert effective_bits(allocated_spec(facts, chosen), facts) == pytest.approx(4.125)


def test_allocation_is_the_best_of_all():
    """Against every combination of widths, in quarters of a bit, for two layers."""
    from functools import reduce

    facts = layers(2)
    weight = {(0, "key"): 900.0, (0, "value"): 1.0, (1, "key"): 30.0, (1, "value"): 4.0}
    measured = curves(facts, lambda layer, role: weight[layer, role])
    for budget in (2.625, 3.375, 4.125, 5.125):
        chosen = allocate(facts, measured, bits=budget)
        paid = sum(one.price for one in chosen.values()) / (4 * 128)
        assert budget - 8 / (4 * 128) < paid <= budget  # but for part of a unit all is spent
        found = sum(one.kl for one in chosen.values())
        steps = 2 + np.arange(25) / 4
        losses = reduce(np.add.outer, [one * 4.0**-steps for one in weight.values()])
        stored = reduce(np.add.outer, [steps] * 4) / 4 + 0.125
        assert found <= losses[stored <= paid].min() * (1 + 1e-9)


def test_layouts_are_compared_at_equal_bytes():
    """Of small heads two layouts rarely have one price; the one that is cheaper for a loss wins."""
    facts = layers(1, dim=32)
    plain, aside = Layout(dim=32), Layout(dim=32, aside=((3, 4),))

    def lost(one, price):  # the second is better from 160 bits a vector on
        slope, start = (1.0, 0.0) if one is plain else (1.6, 0.6 * 160 / 32)
        return 4.0 ** -(slope * price / 32 - start)

    every = [
        replace(choice, kl=lost(choice.layout, choice.price))
        for one in (plain, aside)
        for choice in choices(one, {1: 1.0})
    ]
    assert not {one.price for one in every if one.layout is plain} <= {
        one.price for one in every if one.layout is aside
    }
    measured = {(0, "key"): every, (0, "value"): every}
    for bits, one in ((4.0, plain), (6.0, aside)):
        chosen = allocate(facts, measured, bits=bits)
        assert {choice.layout for choice in chosen.values()} == {one}
        paid = sum(choice.price for choice in chosen.values())
        assert paid <= bits * 64
        spec = allocated_spec(facts, chosen)
        assert effective_bits(spec, facts) == pytest.approx(paid / 64)


def test_a_layer_that_minds_gets_more():
    facts = layers(3)
    chosen = allocate(
        facts, curves(facts, lambda i, r: 1e4 if (i, r) == (1, "key") else 1.0), bits=4
    )
    bits = {place: one.bits for place, one in chosen.items()}
    assert bits.pop((1, "key")) > max(bits.values())


def test_too_few_bits_are_refused():
    facts = layers(2)
    with pytest.raises(KvError, match=r"2 bits are too few: the narrowest choice has 2\.125"):
        allocate(facts, curves(facts, lambda *_: 1.0), bits=2)


@pytest.fixture(scope="module")
def spiked(twin_of):
    """A Qwen2 twin with the massive key bias that its releases have in a layer."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(twin_of("qwen2"))
    model.set_dtype(mx.float32)
    projection = model.layers[1].self_attn.k_proj
    bias = np.zeros(projection.bias.shape, np.float32)
    bias[[7, 11]] = 700.0, -560.0
    projection.bias = mx.array(bias)
    return model


def test_a_planted_spike_is_seen_and_survived(spiked):
    facts = static_scan(spiked)
    assert [fact.spike for fact in facts].index(True) == 1
    assert facts[1].key_bias == pytest.approx(np.hypot(700, 560), rel=1e-4)
    from quant.kv.spec import TensorSpec

    ids = [int(i) for i in np.random.default_rng(0).integers(5, 500, 320)]
    seen = observed(spiked, facts, ids, bits=3.5)
    # After the rotary embedding each of the two channels is a pair.
    assert set(seen.layout(facts[1], "key").aside[0]) == {7, 11, 23, 27}
    assert all(not seen.layout(fact, "value").aside for fact in facts)
    assert not any(seen.layout(facts[i], "key").aside for i in (0, 2))
    # Text enough for some of it to be encoded while the rest attends to it.
    measured = sensitivity(spiked, facts, ids, seen=seen)
    auto = allocated_spec(facts, allocate(facts, measured, bits=3.5), seen)
    forward = forward_of(spiked)
    exact = baseline(forward, own_caches(spiked), ids, chunk=64, start=64)
    plain = TensorSpec(scheme="uniform", bits=4, group=32)
    uniform = spec_for(facts, lambda _: (plain, plain), subtract_mean=False)
    assert effective_bits(auto, facts) <= 3.5 < effective_bits(uniform, facts)
    ours, stock = (
        loss(forward, caches(spiked, spec), exact)["prefill"] for spec in (auto, uniform)
    )
    assert ours.kl_mean < stock.kl_mean
    assert ours.kl_mean < 0.04


def test_passes_from_a_layer_on_are_whole_passes(spiked):
    """What precedes a layer is taken from a recording, and nothing of the loss changes."""
    from quant.kv.cache import QuantizedStateCache
    from quant.kv.replay import recorded
    from quant.kv.spec import FLOAT, TensorSpec

    facts, ids = (
        static_scan(spiked),
        [int(i) for i in np.random.default_rng(1).integers(5, 500, 320)],
    )
    two = TensorSpec(scheme="turboquant", bits=2)
    spec = spec_for(facts, lambda fact: (two, FLOAT) if fact.index == 2 else (FLOAT, FLOAT))
    layers = list(spiked.layers)

    def cache():
        rows = [QuantizedStateCache(spec.layers[2], spec.rotations) for _ in "ab"]
        return rows[0].merge(rows)

    with recorded(spiked, ids, chunk=64) as replay:
        assert replay.shared
        called = []
        for stand in replay._stands:
            stand.layer = (lambda layer, i: lambda *a, **k: called.append(i) or layer(*a, **k))(
                stand.layer, len(called)
            )
        found = replay.losses(2, cache(), 2)
        passed = len(called)
        replay.shared = False
        whole = replay.losses(2, cache(), 2)
    assert passed == len(ids) // 64 * (len(layers) - 2)
    assert found == pytest.approx(whole, rel=1e-3)
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] > 1e-5
    assert list(spiked.layers) == layers


def test_losses_between_measured_widths_follow_the_codebooks():
    from quant.kv.allocate import _between
    from quant.kv.codebook import distortion

    plain = Layout(dim=64)
    for power in (0.7, 1.0, 1.4):
        known = {b: 3.0 * distortion(64, b) ** power for b in (2, 4)}
        below = 3.0 * distortion(64, 1.5) ** power
        assert _between(known, 1.5, plain) == pytest.approx(below)
        assert _between(known, 3, plain) == pytest.approx(3.0 * distortion(64, 3) ** power)
        beyond = known[4] * distortion(64, 6) / distortion(64, 4)
        assert _between(known, 6, plain) == pytest.approx(beyond)
        assert _between(known, 4, plain) == known[4]


def test_decoding_is_told_apart_from_the_prompt(spiked):
    """Token by token as many positions as asked, the rest in pieces, all of them once."""
    from quant.kv.measure import spans

    plan = spans(1200, 64, 1024, 32)
    assert [low for low, _, _ in plan[:4]] == [0, 512, 1024, 1088]
    assert [(high - low, told) for low, high, told in plan[-33:]] == [(16, True)] + [(1, True)] * 32
    assert [low for low, _, _ in plan[1:]] == [high for _, high, _ in plan[:-1]]
    ids = [int(i) for i in np.random.default_rng(2).integers(5, 500, 160)]
    forward = forward_of(spiked)
    exact = baseline(forward, own_caches(spiked), ids, chunk=64, start=64, steps=8)
    same = loss(forward, own_caches(spiked), exact)
    assert {part: one.positions for part, one in same.items()} == {"prefill": 88, "decode": 8}
    assert all(abs(one.kl_mean) < 1e-6 and one.top1 == 1.0 for one in same.values())


def test_sliding_layers_stay_as_they_are(twin_of):
    from mlx_lm.utils import load_model

    model, _ = load_model(twin_of("gemma3_text"))
    facts = static_scan(model)
    reasons = {fact.cache: fact.reason for fact in facts}
    assert "stays as it is" in reasons["RotatingKVCache"]
    assert reasons["KVCache"] == ""


def test_attention_with_sinks_stays_in_float(twin_of, tmp_path):
    """Its runtime refuses quantized caches, which the scan finds by asking."""
    from mlx_lm.utils import load_model

    from converter.pipeline import Request, convert
    from converter.ui import Console

    out = tmp_path / "out"
    convert(Request(hf_path=str(twin_of("gpt_oss")), mlx_path=out), Console(quiet=True))
    model, _ = load_model(out)
    assert not any(fact.quantizable for fact in static_scan(model))


@pytest.mark.parametrize("runtime", ["mlx_lm", "mlx_vlm"])
def test_stock_caches_unpacked_compute_what_their_kernel_does(runtime, output):
    import mlx.core as mx

    from quant.kv.runtime import dense_on_cpu
    from validate.runtime import MlxRuntime

    model = MlxRuntime.load(output, runtime=runtime)
    model.to_float32(dense=True)
    language = getattr(model.model, "language_model", model.model)
    forward, made = forward_of(language), []
    for dense in (False, True):
        caches_of = own_caches(language)
        forward(mx.array([list(range(5, 69))]), caches_of)
        caches_of = [cache.to_quantized(group_size=64, bits=4) for cache in caches_of]
        if dense:
            with dense_on_cpu(runtime):
                made.append(np.array(forward(mx.array([[7, 8, 9]]), caches_of)))
        else:
            made.append(np.array(forward(mx.array([[7, 8, 9]]), caches_of)))
    assert np.abs(made[0] - made[1]).max() < 1e-4 * np.abs(made[0]).max()


# The command


@pytest.fixture
def output(tinylm_output):
    return tinylm_output


@pytest.fixture
def brief(monkeypatch):
    """Texts of a few chunks, so that the study of a whole model takes seconds."""
    import quant.kv.study as module

    monkeypatch.setattr(module, "LONG", 512)
    monkeypatch.setattr(module, "STEPS", 8)


def test_spreads_are_those_of_every_place_in_a_context(spiked):
    """Values are the same wherever they are; keys turn by the rotary embedding of their place."""
    import mlx.core as mx

    from quant.kv.spread import spreads

    facts, ids = static_scan(spiked), list(range(5, 69))
    near, far = (
        spreads(spiked, facts, ids, means=(), skip=4, context=context) for context in (64, 1064)
    )
    own = own_caches(spiked)
    forward_of(spiked)(mx.array([ids]), own)
    keys, values = (np.array(x[0, :, 4:64], np.float64) for x in (own[1].keys, own[1].values))
    assert near[1, "key"].count == far[1, "value"].count == 8 * 60
    still = np.zeros_like(keys[:, 0])
    wanted = keys.swapaxes(-1, -2) @ keys / 60
    found = near[1, "key"].about(still)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * wanted.max())
    mean = values.mean(axis=1)
    np.testing.assert_allclose(far[1, "value"].mean(), mean, atol=1e-4)
    values -= mean[:, None]
    wanted = values.swapaxes(-1, -2) @ values / 60
    np.testing.assert_allclose(far[1, "value"].about(mean), wanted, atol=1e-3 * wanted.max())
    # A key further on is the same key, turned once more by the embedding of so many tokens.
    alone = own[1].keys[0, :, 4:64].swapaxes(0, 1)[:, :, None]
    wanted = np.zeros_like(found)
    for place in (1000 * part // 7 for part in range(8)):
        turned = np.array(spiked.layers[1].self_attn.rope(alone, offset=place), np.float64)
        wanted += np.einsum("thxi,thxj->hij", turned, turned) / 60 / 8
    np.testing.assert_allclose(far[1, "key"].about(still), wanted, atol=1e-3 * wanted.max())
    assert np.abs(wanted - found).max() > 0.1 * wanted.max()


def test_no_keys_are_learned_where_those_further_on_cannot_be_seen(spiked, monkeypatch):
    """The context is unknown, the predictions change, or the runtime does not take it."""
    import quant.kv.spread as module

    facts, ids, run = static_scan(spiked), list(range(5, 69)), module.run
    given = {"means": (), "skip": 4}

    def changed(model, ids, place, **given):
        rows, seen = run(model, ids, 0, **given)
        return rows + 0.1 * np.sign(place) * rows, seen

    def refused(model, ids, place, **given):
        if place:
            raise ValueError("shapes cannot be broadcast")
        return run(model, ids, place, **given)

    for context, patched in ((0, run), (1064, changed), (1064, refused)):
        monkeypatch.setattr(module, "run", patched)
        found = module.spreads(spiked, facts, ids, context=context, **given)
        assert {role for _, role in found} == {"value"}, patched
    seen = observed(spiked, facts, ids, bits=3.5, lesson=ids)
    # Of values there is nothing else then; keys are as they would be without a lesson.
    assert [bool(one.basis) for one in seen.choices(facts[0], "value")] == [True]
    assert [bool(one.basis) for one in seen.choices(facts[0], "key")] == [False]


def test_a_context_is_believed_as_far_as_it_changes_nothing(spiked, monkeypatch):
    """Every place is tried, not the last alone; then those of half of it, and so on."""
    import quant.kv.spread as module

    run, tried = module.run, []

    def bounded(model, ids, place, **given):
        tried.append(place)
        rows, seen = run(model, ids, place, **given)
        return rows + 0.1 * (place in wrong) * rows, seen

    monkeypatch.setattr(module, "run", bounded)
    ids = list(range(5, 69))
    for wrong, last in (((), 7000), ((7000,), 3500), ((4000, 3500), 1750), ((6000,), 3500)):
        found = module._places(spiked, ids, 7064)
        assert found == [last * number // 7 for number in range(8)], wrong
    assert set(tried) >= {3500 * number // 7 for number in range(8)}
    wrong = (7000, 3500, 1750, 875)
    assert module._places(spiked, ids, 7064) == []
    assert module._places(spiked, ids, 64) == [0]
    assert module._places(spiked, ids, 0) == []


def test_costs_are_the_slopes_of_the_log_probability(spiked):
    """Against differences: what a small change of one result of attention does to the text's."""
    import mlx.core as mx

    from quant.kv.further import run, slopes
    from quant.kv.spread import spreads

    ids = list(range(5, 69))
    rows, seen = run(spiked, ids, 100, watched=(0, 2))
    plain = forward_of(spiked)(mx.array([ids]), own_caches(spiked))[0]
    plain = plain - mx.logsumexp(plain, axis=-1, keepdims=True)
    # Further on all is as at the beginning, and read through our hands.
    np.testing.assert_allclose(np.array(rows), np.array(plain), atol=2e-3)
    found = slopes(spiked, ids, 100, rows, seen)
    drawn = mx.random.categorical(rows, key=mx.random.key(7))[:, None]
    draw = np.random.default_rng(0)
    for index, cache in seen.items():
        (result,), (slope,) = cache.results, found[index]
        assert slope.shape == result.shape
        way = mx.array(draw.standard_normal(result.shape).astype(np.float32))
        there, back = (
            mx.take_along_axis(
                run(spiked, ids, 100, watched=(0, 2), shifts={index: [way * step]})[0],
                drawn,
                axis=-1,
            ).sum()
            for step in (1e-3, -1e-3)
        )
        wanted = float((way * slope).sum())
        assert float(there - back) / 2e-3 == pytest.approx(wanted, rel=0.02, abs=0.05)
    # What errors of values cost is the mean outer product of slopes of all heads that read them.
    facts = static_scan(spiked)
    spread = spreads(spiked, facts, ids, means=(), skip=4, context=0)[2, "value"]
    rows, seen = run(spiked, ids, 0, watched=[fact.index for fact in facts])
    slope = np.array(slopes(spiked, ids, 0, rows, seen)[2][0][0], np.float64)
    slope = slope.reshape(len(spread.total), -1, slope.shape[-1])
    wanted = slope.swapaxes(-1, -2) @ slope * 8
    np.testing.assert_allclose(spread.cost, wanted, atol=1e-3 * np.abs(wanted).max())
    assert not spiked.training


def test_without_derivatives_directions_are_of_what_is_stored(spiked, monkeypatch):
    import quant.kv.further as module

    def refused(model, ids, place, *, shifts=None, **given):
        if shifts:
            raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")
        return run(model, ids, place, **given)

    run = module.run
    monkeypatch.setattr(module, "run", refused)
    ids = list(range(5, 69))
    seen = observed(spiked, static_scan(spiked), ids, bits=3.5, lesson=ids)
    assert not seen.weighed
    assert (0, "value") in seen.learned


def test_nothing_is_measured_on_what_decided_it():
    from quant.kv.study import LONG, Texts

    for count in (512, 700, 4096, LONG, LONG + 999):
        texts = Texts.of(list(range(count)))
        apart = [*texts.lesson, *texts.trial] if count >= 1024 else texts.lesson
        assert [*apart, *texts.short] == list(range(min(count, LONG)))
        measured = texts.long[texts.starts["long"] :]
        assert list(measured) == list(texts.short)
        assert len(measured) > texts.starts["short"] + 32
        assert 256 <= len(texts.trial) == len(texts.short) <= len(texts.lesson)
        assert texts.trial[-1] + 1 == texts.short[0]
    with pytest.raises(KvError, match="511 tokens of text: a KV study needs 512 or more"):
        Texts.of(list(range(511)))


def test_stock_loaders_fetch_the_bases_and_take_none_for_weights(monkeypatch):
    """What each asks the hub for has the file; loading is seen where settings are written."""
    import mlx_lm.utils
    import mlx_vlm.utils
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def snapshot(*given, allow_patterns, **more):
        asked.append(allow_patterns)
        return "."

    for module in (mlx_lm.utils, mlx_vlm.utils):
        monkeypatch.setattr(module, "snapshot_download", snapshot)
    mlx_lm.utils._download("somebody/model")
    mlx_vlm.utils.get_model_path("somebody/model")
    files = ["model.safetensors", BASES, "kv_cache.npz", "other/bases.bin"]
    for patterns in asked:
        assert list(filter_repo_objects(files, allow_patterns=patterns)) == files[:2]
    assert len(asked) == 2


def test_killed_anywhere_a_study_leaves_all_or_nothing(output, tmp_path, monkeypatch):
    """At every step of the file system; the next run goes on, and finds what was there or all."""
    import os

    from converter import renewal
    from converter.earlier import complete
    from converter.manifest import renewed, verify
    from converter.renewal import renew

    class Killed(BaseException):
        pass

    more = {"kv_cache.json": b"{}", BASES: b"bases", "config.json": b'{"new": 1}'}
    less = {"kv_cache.json": b"[]", BASES: None}
    first = tmp_path / "first"
    shutil.copytree(output, first)
    renew(first, {**more, "conversion.json": renewed(first, more)})
    verify(first)
    for files, start in ((more, output), (less, first)):
        before = (start / "conversion.json").read_bytes()
        unchanged: set[bool] = set()
        killed, step = True, 0
        while killed:
            out = tmp_path / f"{start.name}-{step}"
            shutil.copytree(start, out)
            left = [step]

            def counted(call, left=left):
                def checked(*given, **more):
                    if str(given[0]).endswith(".lock"):  # which dies with its process
                        return call(*given, **more)
                    left[0] -= 1
                    if left[0] < 0:
                        raise Killed
                    return call(*given, **more)

                return checked

            with monkeypatch.context() as patched:
                patched.setattr(renewal, "write_atomic", counted(renewal.write_atomic))
                patched.setattr(os, "replace", counted(os.replace))
                for name in ("rename", "unlink", "rmdir", "mkdir"):
                    patched.setattr(Path, name, counted(getattr(Path, name)))
                try:
                    renew(out, {**files, "conversion.json": renewed(out, files)})
                    killed = False
                except Killed:
                    pass
            complete(out)
            verify(out)
            assert not list(out.glob(".renewal*"))
            same = (out / "conversion.json").read_bytes() == before
            assert (out / BASES).exists() == ((start is first) == same)
            unchanged.add(same)
            shutil.rmtree(out)
            step += 1
        assert unchanged == {True, False}
        assert step > 8


@pytest.mark.usefixtures("brief")
def test_settings_are_written_measured_and_vouched_for(output, tmp_path):
    from converter.kv import study_output, summary_text
    from converter.manifest import verify
    from converter.publish import write_card
    from converter.ui import Console

    out = tmp_path / "out"
    shutil.copytree(output, out)
    report = study_output(
        out, scheme="turboquant", bits=4, group=None, text=None, console=Console(quiet=True)
    )
    verify(out)
    config = json.loads((out / "config.json").read_text())["kv_cache_quantization"]
    schema = json.loads((DOCS / "kv_cache_quantization.schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "schema": 2}, schema)
    spec = KvSpec.from_json(config)
    # Norms of 8 bits leave 8 for the codes: as many bytes as four bits and a norm of 16.
    assert {layer.key.bits for layer in spec.layers} == {4.125}
    assert all(layer.key.top > 0 for layer in spec.layers)
    assert config["effective_bits"] == 4.25
    assert json.loads((out / "kv_cache.json").read_text()) == report
    chosen = report["chosen"]["long"]
    for part in ("prefill", "decode"):
        assert chosen[part]["all"]["kl_mean"] < 2e-3
        assert chosen[part]["keys only"]["kl_mean"] + chosen[part]["values only"]["kl_mean"] > 0
    assert chosen["decode"]["all"]["positions"] == 8
    measured = {row["flags"]: row for row in report["stock"] if "error" not in row}
    assert any("turboquant" in flags for flags in measured)
    assert report["flags"][0]["kl_mean"] == min(
        row["long"]["decode"]["all"]["kl_mean"] for row in measured.values()
    )
    assert "turboquant" in summary_text(report)
    card = write_card(out).read_text()
    assert "## KV cache" in card
    assert "--kv-bits 4 --kv-group-size 64" in card
    # The stock runtimes still load it: they do not read the new key.
    from validate.runtime import MlxRuntime

    for runtime in ("mlx_lm", "mlx_vlm"):
        MlxRuntime.load(out, runtime=runtime)


@pytest.mark.usefixtures("brief")
def test_learned_bases_are_written_and_taken_away_again(output, tmp_path, monkeypatch):
    """With `auto`, on a text of a few chunks, the settings name bases, which the file holds."""
    import quant.kv.study as module
    from converter.kv import study_output
    from converter.manifest import verify
    from converter.ui import Console
    from validate.runtime import MlxRuntime

    every = module.stock_settings
    monkeypatch.setattr(module, "stock_settings", lambda *given: every(*given)[1:2])
    out = tmp_path / "out"
    shutil.copytree(output, out)
    given = {"group": None, "text": None, "console": Console(quiet=True)}
    report = study_output(out, scheme="auto", bits=3, **given)
    verify(out)
    config = json.loads((out / "config.json").read_text())["kv_cache_quantization"]
    schema = json.loads((DOCS / "kv_cache_quantization.schema.json").read_text())
    jsonschema.validate(config, schema)
    spec = KvSpec.load(out)
    assert spec.bases
    assert json.loads(json.dumps(spec.to_json()))["layers"] == config["layers"]
    assert config["effective_bits"] <= 3
    stock = [row for row in report["stock"] if row["flags"].startswith("--kv-bits 4 --kv-group")]
    kls = [row["long"]["prefill"]["all"]["kl_mean"] for row in (report["chosen"], *stock)]
    assert kls[0] < kls[1]
    for runtime in ("mlx_lm", "mlx_vlm"):  # neither takes the file for weights
        MlxRuntime.load(out, runtime=runtime)
    study_output(out, scheme="uniform", bits=4, **given)
    verify(out)
    assert not (out / BASES).parent.exists()
    assert not KvSpec.load(out).bases


def test_a_text_too_short_to_tell_is_refused_and_nothing_changes(output, tmp_path):
    from converter.errors import ConvertError
    from converter.kv import study_output
    from converter.ui import Console

    text = tmp_path / "short.txt"
    text.write_text("Too short to tell.")
    before = (output / "config.json").read_bytes()
    with pytest.raises(ConvertError, match="tokens of text: a KV study needs 512"):
        study_output(
            output, scheme="auto", bits=4, group=None, text=text, console=Console(quiet=True)
        )
    assert (output / "config.json").read_bytes() == before
    assert not (output / "kv_cache.json").exists()


def test_the_study_has_the_fast_blas(output):
    """Whether MLX was first imported after the fast BLAS is seen in a process of its own only."""
    code = f"""
import quant.kv.study as module
from pathlib import Path
from converter.kv import study_output
from converter.ui import Console
from quant.kv.turbo import KvError
from validate.runtime import prepare_mlx

def stopped(*given, **named):
    raise KvError("prepared" if prepare_mlx() else "MLX came first")

module.study = stopped
study_output(Path({str(output)!r}), scheme="auto", bits=4, group=None, text=None,
             console=Console(quiet=True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "cannot be quantized as asked: prepared" in done.stderr


# Told from headers


@pytest.mark.parametrize(
    ("model_type", "asked", "message"),
    [
        ("qwen2", {"scheme": "uniform"}, "layer 0, keys: groups of 64 do not divide 32 channels"),
        ("qwen2", {"scheme": "turboquant", "bits": 3.3}, r"3\.3 bits do not split 32 channels"),
        ("deepseek_v3", {"scheme": "auto"}, "4 layers stay in float: .* reads keys and values"),
        ("gpt_oss", {"scheme": "auto"}, "2 layers stay in float: its cache is a RotatingKVCache"),
        ("bert", {"scheme": "auto"}, "no stock runtime generates text with bert"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_converted(twin_of, model_type, asked, message):
    from converter.errors import PlanError
    from converter.kv import KvAsked
    from converter.pipeline import Request, plan_request

    request = Request(hf_path=str(twin_of(model_type)), kv=KvAsked(**asked))
    with pytest.raises(PlanError, match=f"--kv-quant-scheme.*{message}"):
        plan_request(request)


def test_the_plan_says_which_layers_stay_in_float(twin_of, capfd):
    from converter.cli.app import cli
    from converter.cli.errors import run

    arguments = ["plan", "--hf-path", str(twin_of("minicpmv4_6")), "--kv-quant-scheme", "auto"]
    assert run(lambda: cli.main(arguments, standalone_mode=False)) == 0
    shown = capfd.readouterr().out
    assert "KV cache: 2 of 6 layers can be quantized" in shown
    assert "4 layers stay in float: its cache is a ArraysCache" in shown


def test_layers_that_read_the_keys_of_another_are_served(twin_of):
    """Gemma 4: three caches for six layers, the last of which take an earlier one's keys."""
    from converter.kv import KvAsked
    from converter.pipeline import Request, plan_request

    told = plan_request(Request(hf_path=str(twin_of("gemma4")), kv=KvAsked(scheme="auto"))).kv
    assert told[0] == "KV cache: 1 of 3 layers can be quantized"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-bits", "4"], "--kv-bits without --kv-quant-scheme"),
        (["--kv-quant-scheme", "auto", "--kv-bits", "9"], "--kv-bits 9: 1 to 8"),
        (["--kv-quant-scheme", "uniform", "--kv-bits", "3.5"], "uniform caches have 2, 3, 4"),
        (["--kv-quant-scheme", "turboquant", "--kv-group-size", "64"], "has no groups"),
    ],
)
def test_contradictory_flags_are_usage_errors(flags, message, tinylm, tmp_path, capfd):
    from converter.cli.app import cli
    from converter.cli.errors import run

    arguments = ["--hf-path", str(tinylm), "--mlx-path", str(tmp_path / "out"), *flags]
    assert run(lambda: cli.main(arguments, standalone_mode=False)) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
