"""The KV study: what it sees of a model, what it learns, and what that is worth."""

from itertools import product

import numpy as np
import pytest

from quant.kv.allocate import allocate, allocated_spec, sensitivity
from quant.kv.measure import baseline, forward_of, loss
from quant.kv.observe import observed
from quant.kv.runtime import caches, own_caches
from quant.kv.scan import effective_bits, spec_for, static_scan
from quant.kv.turbo import KvError

pytestmark = pytest.mark.usefixtures("runtimes")


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


def test_coherence_is_what_sums_over_tokens_have_more_than_their_squares(spiked):
    """Against one query, one token and one coordinate at a time, of the layer's own arrays."""
    from quant.kv.coherence import coherences
    from quant.kv.further import run

    facts = static_scan(spiked)
    ids = [int(i) for i in np.random.default_rng(1).integers(5, 500, 512)]
    seen = observed(spiked, facts, ids, bits=3.5, lesson=ids)
    found = {place: one.coherence for place, one in seen.learned.items()}
    assert found == coherences(spiked, ids, seen.learned, seen.means)
    assert max(found.values()) > 2
    for layer in (0, 2):
        cache = run(spiked, ids, 0, watched=(layer,))[1][layer]
        keys, values = (np.array(x[0], np.float64) for x in cache.taken)
        queries = np.array(cache.queries[0][0], np.float64)
        centres = (layer in seen.means) * keys[:, 4:68].mean(axis=1, keepdims=True)
        sums, squares = {"key": 0.0, "value": 0.0}, {"key": 0.0, "value": 0.0}
        for head, number in product(range(len(queries)), range(512 - 64, 512)):
            group = head * len(keys) // len(queries)
            query, k, v = queries[head, number], keys[group, : number + 1], values[group]
            weights = np.exp(cache.scale * k @ query)
            weights /= weights.sum()
            stored = slice(4, number - 96 + 1)  # behind four sinks, before a window of 64 to 127
            weight, gap = weights[stored], v[stored] - weights @ v[: number + 1]
            for role, x in (("key", (keys - centres)[group]), ("value", v)):
                rows = seen.learned[layer, role].basis.rows[group].astype(np.float64)
                y = (x[stored] - rows[-1]) @ np.linalg.inv(rows[:-1])
                if role == "key":
                    terms = weight[:, None] * y * (rows[:-1] @ query)
                    terms = terms[:, :, None] * gap[:, None]
                else:
                    terms = (weight[:, None] * y)[:, :, None]
                sums[role] += (terms.sum(axis=0) ** 2).sum()
                squares[role] += (terms**2).sum()
        assert found[layer, "value"] == pytest.approx(sums["value"] / squares["value"], rel=0.01)
        if (layer, "key") in found:  # by random signs
            assert found[layer, "key"] == pytest.approx(sums["key"] / squares["key"], rel=0.1)


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


def test_a_stock_scheme_that_quantizes_nothing_is_no_loss_of_nothing(twin_of):
    """Gemma 4: mlx-vlm leaves the last cache in float, the one that does not slide."""
    from quant.kv.study import stock_row, stock_settings
    from validate.runtime import MlxRuntime

    loaded = MlxRuntime.load(twin_of("gemma4"), runtime="mlx_vlm")
    loaded.to_float32(dense=True)
    model = loaded.model.language_model
    facts, forward = static_scan(model), forward_of(model)
    exact = {"short": baseline(forward, own_caches(model), list(range(5, 13)), chunk=4)}
    uniform, turbo = (stock_settings(model, facts)[at] for at in (1, 3))
    row = stock_row(model, forward, facts, turbo, exact)
    assert row["error"] == "it leaves every layer's cache in float"
    assert (row["in_float"], row["effective_bits"]) == ([2], 16)
    row = stock_row(model, forward, facts, uniform, exact)
    assert "RotatingKVCache Quantization NYI" in row["error"]
