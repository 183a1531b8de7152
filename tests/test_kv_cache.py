"""Quantized caches inside the stock runtimes' own generation, saving and trimming."""

import numpy as np
import pytest

from quant.kv.cache import QuantizedStateCache
from quant.kv.runtime import caches, takes_quantized
from quant.kv.spec import FLOAT, KvSpec, LayerSpec, TensorSpec
from quant.kv.turbo import KvError

pytestmark = pytest.mark.usefixtures("runtimes")

TURBO = TensorSpec(scheme="turboquant", bits=4, tries=5)
SCHEMES = {
    "uniform": TensorSpec(scheme="uniform", bits=4, group=64),
    "rotated": TensorSpec(scheme="rotated", bits=4, group=64),
    "turboquant": TURBO,
    "fraction": TensorSpec(scheme="turboquant", bits=3.5),
}


def spec_of(layers, key=TURBO, value=TURBO, **given):
    settings = {"sinks": 4, "window": 32, **given}
    made = KvSpec(layers=(LayerSpec(key=key, value=value, **settings),) * layers)
    made.rotation(64)
    return made


@pytest.fixture(scope="module")
def model(tinylm):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    loaded, _ = load_model(tinylm)
    loaded.set_dtype(mx.float32)
    return loaded


@pytest.fixture(scope="module")
def prompt(tinylm, model):
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(tinylm).encode((tinylm / "eval.txt").read_text())[:400]


def run(model, cache, ids, chunk=64):
    """Logits of the last chunk, fed chunk by chunk."""
    import mlx.core as mx

    for start in range(0, len(ids), chunk):
        out = model(mx.array([ids[start : start + chunk]]), cache=cache)
        mx.eval(out)
    return np.array(out[0].astype(mx.float32))


def stock_caches(model):
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def kl(wanted, found):
    def log_softmax(x):
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    a, b = log_softmax(wanted.astype(np.float64)), log_softmax(found.astype(np.float64))
    return float((np.exp(a) * (a - b)).sum(axis=-1).mean())


# Attention


@pytest.mark.parametrize("chunk", [16, 400])
def test_float_codes_compute_what_the_stock_cache_does(model, prompt, chunk):
    """Keys and values kept as they are, and yet through every run of tokens: exact attention."""
    layers = len(model.layers)
    kept = TensorSpec(scheme="uniform", bits=8, group=32)
    exact = run(model, stock_caches(model), prompt, chunk)
    settings = spec_of(layers, key=FLOAT, value=kept, window=400)
    assert kl(exact, run(model, caches(model, settings), prompt, chunk)) < 1e-9
    # With a short window the values are coded, the keys' side stays exact.
    coded = run(model, caches(model, spec_of(layers, key=FLOAT, value=kept)), prompt, chunk)
    assert kl(exact, coded) < 1e-4


@pytest.mark.parametrize("name", SCHEMES)
def test_loss_is_small_and_memory_shrinks(model, prompt, name):
    layers, tensor = len(model.layers), SCHEMES[name]
    stock = stock_caches(model)
    exact = run(model, stock, prompt)
    made = caches(model, spec_of(layers, key=tensor, value=tensor))
    assert kl(exact, run(model, made, prompt)) < 2e-3
    run(model, made, prompt[:1])  # what left the window is encoded with the next token
    full = sum(cache.nbytes for cache in stock)
    assert sum(cache.nbytes for cache in made) < 0.45 * full


def test_attention_equals_numpy_with_groups_masks_and_a_mean():
    import mlx.core as mx

    draw = np.random.default_rng(0)
    heads, kv_heads, tokens, dim, length = 6, 2, 300, 64, 5
    k, v = (draw.standard_normal((2, kv_heads, tokens, dim)).astype(np.float32) for _ in "kv")
    q = draw.standard_normal((2, heads, length, dim)).astype(np.float32)
    spec = spec_of(1, TensorSpec(scheme="uniform", bits=8, group=32), FLOAT, window=16)
    cache = QuantizedStateCache(spec.layers[0], spec.rotations)
    for start in range(0, tokens, 50):
        part = slice(start, start + 50)
        cache.update_and_fetch(mx.array(k[:, :, part]), mx.array(v[:, :, part]))
    assert cache.mean is not None
    assert [part.tokens for part in cache.parts()] == [4, 192, 104]
    seen = np.where(draw.random((2, 1, length, tokens)) < 0.5, 0, -np.inf).astype(np.float32)
    seen[..., 0] = 0
    causal = np.arange(tokens)[None] <= np.arange(tokens - length, tokens)[:, None]
    for mask, added in (
        (None, 0.0),
        ("causal", np.where(causal, 0, -np.inf)),
        (mx.array(seen), seen),
        (mx.array(np.isfinite(seen)), seen),
    ):
        kk, vv = (np.repeat(a, heads // kv_heads, axis=1).astype(np.float64) for a in (k, v))
        scores = q @ kk.swapaxes(-1, -2) * 0.2 + added
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        wanted = weights / weights.sum(axis=-1, keepdims=True) @ vv
        found = np.array(cache.attend(mx.array(q), scale=0.2, mask=mask))
        np.testing.assert_allclose(found, wanted, atol=0.02)


def test_nothing_is_encoded_before_the_start(model, prompt):
    made = caches(model, spec_of(len(model.layers), start=250))
    run(model, made, prompt[:200])
    run(model, made, prompt[200:210])
    assert all(cache.stores is None for cache in made)
    run(model, made, prompt[210:300])
    run(model, made, prompt[300:310])
    assert all(cache.stores[0].count > 100 for cache in made)


# What people do with a prompt cache


def test_stock_generate_takes_the_caches(model, tinylm, prompt):
    from mlx_lm import generate
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(tinylm)
    asked = {"prompt": prompt[:200], "max_tokens": 24}
    stock = generate(model, tokenizer, **asked)
    eight = TensorSpec(scheme="turboquant", bits=8, tries=5)
    made = caches(model, spec_of(len(model.layers), eight, eight))
    assert generate(model, tokenizer, prompt_cache=made, **asked) == stock
    assert made[0].stores[0].count > 100


def test_saved_and_loaded_it_goes_on_as_before(model, prompt, tmp_path):
    from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

    made = caches(model, spec_of(len(model.layers)))
    run(model, made, prompt[:300])
    save_prompt_cache(str(tmp_path / "cache.safetensors"), made)
    again = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert [cache.offset for cache in again] == [300] * len(made)
    np.testing.assert_array_equal(run(model, again, prompt[300:]), run(model, made, prompt[300:]))


@pytest.mark.parametrize("count", [7, 90])
def test_trimmed_it_goes_on_as_before(model, prompt, count):
    """Within the window bit for bit; further back the same tokens, from codes."""
    from mlx_lm.models.cache import trim_prompt_cache

    layers = len(model.layers)
    straight, cut = caches(model, spec_of(layers)), caches(model, spec_of(layers))
    run(model, straight, prompt[:200])
    run(model, cut, prompt[:200])
    run(model, cut, prompt[5 : 5 + count])
    assert trim_prompt_cache(cut, count) == count
    a, b = run(model, straight, prompt[200:260]), run(model, cut, prompt[200:260])
    assert kl(a, b) < 1e-3
    assert (a.argmax(axis=-1) == b.argmax(axis=-1)).mean() > 0.95


def test_trimmed_to_nothing_it_starts_again(model, prompt):
    made = caches(model, spec_of(len(model.layers)))
    run(model, made, prompt[:200])
    assert [cache.trim(1000) for cache in made] == [200] * len(made)
    assert all(cache.empty() for cache in made)
    fresh = caches(model, spec_of(len(model.layers)))
    again = run(model, made, prompt[:60])
    np.testing.assert_allclose(again, run(model, fresh, prompt[:60]), atol=1e-4)


def test_a_batch_is_its_rows(model, prompt):
    import mlx.core as mx

    rows = [prompt[:150], prompt[150:300]]
    layers = len(model.layers)
    both, alone = caches(model, spec_of(layers)), []
    for row in rows:
        cache = caches(model, spec_of(layers))
        run(model, cache, row[:100])
        alone.append(run(model, cache, row[100:]))
    model(mx.array([row[:100] for row in rows]), cache=both)
    out = np.array(model(mx.array([row[100:] for row in rows]), cache=both))
    for found, wanted in zip(out, alone, strict=True):
        assert kl(wanted, found) < 1e-3


# Refusals


def test_layers_that_do_not_grow_stay_as_they_are():
    class RotatingKVCache: ...

    class KVCache: ...

    assert takes_quantized(KVCache())
    assert not takes_quantized(RotatingKVCache())


def test_settings_of_another_model_are_refused(model):
    with pytest.raises(KvError, match=r"the model has \d caches, the settings 3 layers"):
        caches(model, spec_of(3))
    with pytest.raises(KvError, match="a model of neither"):
        caches(object(), spec_of(3))


def test_settings_survive_json():
    import json

    spec = spec_of(2, SCHEMES["uniform"], SCHEMES["fraction"], subtract_mean=False)
    again = KvSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again.layers == spec.layers
    assert again.to_json() == spec.to_json()
    with pytest.raises(KvError, match="schema 2, not 1"):
        KvSpec.from_json({**spec.to_json(), "schema": 2})
