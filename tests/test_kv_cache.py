"""Quantized caches inside the stock runtimes' own generation, saving and trimming."""

import json

import numpy as np
import pytest

from quant.kv.cache import QuantizedStateCache
from quant.kv.learned import learn, packed
from quant.kv.runtime import caches, takes_quantized
from quant.kv.spec import BASES, FLOAT, SCHEMA, KvSpec, LayerSpec, TensorSpec
from quant.kv.turbo import KvError

pytestmark = pytest.mark.usefixtures("runtimes")

TURBO = TensorSpec(scheme="turboquant", bits=4, tries=5)


def learned(widths=(5, 5, 4, 4, 4, 4, 3, 3), mean=None):
    """In directions of two heads' own, which matter about as much, about a mean."""
    turns = np.linalg.qr(np.random.default_rng(8).standard_normal((2, 64, 64)))[0]
    basis, _ = learn((turns * np.geomspace(1, 0.2, 64)) @ turns.swapaxes(-1, -2), mean)
    bits = sum(widths) / len(widths)
    return TensorSpec(scheme="turboquant", bits=bits, tries=5, basis=basis, widths=widths)


SCHEMES = {
    "uniform": TensorSpec(scheme="uniform", bits=4, group=64),
    "rotated": TensorSpec(scheme="rotated", bits=4, group=64),
    "turboquant": TURBO,
    "fraction": TensorSpec(scheme="turboquant", bits=3.5),
    "aside": TensorSpec(scheme="turboquant", bits=3.5, aside=((3, 40), (0, 63)), top=200.0),
    "learned": learned(),
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


@pytest.mark.parametrize("held", [None, 1500], ids=["at once", "in runs"])
def test_attention_equals_numpy_with_groups_masks_and_a_mean(held, monkeypatch):
    import mlx.core as mx

    if held:  # one query of six heads and two sequences over 192 tokens has 2,304 scores
        monkeypatch.setattr("quant.kv.attention._HELD", held)
        monkeypatch.setattr("quant.kv.attention.CHUNK", 100)
        monkeypatch.setattr("quant.kv.attention._NUMBERS", 1)
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


def test_a_long_prompt_takes_bounded_memory(monkeypatch):
    """Queries go in runs, so that scores of all of them with all tokens are never there at once."""
    import mlx.core as mx

    monkeypatch.setattr("quant.kv.attention._HELD", 1 << 20)
    tensor = TensorSpec(scheme="turboquant", bits=3)
    spec = spec_of(1, tensor, tensor)
    cache = QuantizedStateCache(spec.layers[0], spec.rotations)
    x = mx.random.normal((1, 2, 4096, 64), key=mx.random.key(0))
    q = mx.random.normal((1, 16, 512, 64), key=mx.random.key(1))
    cache.update_and_fetch(x, x)
    cache.update_and_fetch(x[:, :, :512], x[:, :, :512])
    mx.eval(q, [store.kept() for store in cache.stores])
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(cache.attend(q, scale=0.125, mask="causal"))
    whole = 4 * 16 * 512 * 4608  # bytes of all scores, of which there are several arrays
    assert mx.get_peak_memory() - before < whole / 3


def test_massive_channels_aside_equal_an_oracle_in_float64():
    """Scores and sums of what is stored, the rest rotated and the channels aside, by numpy."""
    import mlx.core as mx

    draw = np.random.default_rng(3)
    heads, tokens, dim, sizes = 2, 100, 64, {(0, 5): 30.0, (0, 37): -20.0, (1, 60): 50.0}
    k, v = (draw.standard_normal((1, heads, tokens, dim)).astype(np.float32) for _ in "kv")
    for (head, channel), size in sizes.items():
        k[:, head, :, channel] += size
        v[:, head, :, channel] += size * draw.standard_normal(tokens)
    q = draw.standard_normal((1, 4, 3, dim)).astype(np.float32)
    aside = ((5, 37), (9, 60))
    tensor = TensorSpec(scheme="turboquant", bits=4, tries=5, aside=aside)
    spec = spec_of(1, tensor, tensor, window=0, sinks=0, subtract_mean=False)
    cache = QuantizedStateCache(spec.layers[0], spec.rotations)
    cache.update_and_fetch(mx.array(k), mx.array(v))
    assert cache.stores[0].arrays[-1].dtype == mx.float16
    turn = np.array(spec.rotations[64].forward(mx.eye(dim)), np.float64)

    def oracle(x, store):
        """What is stored of x: its channels aside in float16, the rest by the store's codes."""
        coded, beside = (np.array(part, np.float64) for part in store.decoded(0, tokens))
        plain = coded @ turn.T
        for head, places in enumerate(aside):
            plain[:, head][..., places] = x[:, head][..., places].astype(np.float16)
            np.testing.assert_array_equal(beside[:, head], plain[:, head][..., places])
        return plain

    kk, vv = (oracle(x, store) for x, store in zip((k, v), cache.stores, strict=True))
    for found, x in ((kk, k), (vv, v)):  # 4 bits of vectors of norm 8, and half precision beside
        assert ((found - x) ** 2).sum(axis=-1).mean() == pytest.approx(62 * 0.0075, rel=0.15)
    kk, vv = (np.repeat(x, 2, axis=1) for x in (kk, vv))
    scores = q.astype(np.float64) @ kk.swapaxes(-1, -2) * 0.05
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    wanted = weights / weights.sum(axis=-1, keepdims=True) @ vv
    found = np.array(cache.attend(mx.array(q), scale=0.05))
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(vv).max())


def test_a_learned_basis_equals_an_oracle_in_float64():
    """Scores and sums by numpy of what is stored, of which some coordinates have no bits."""
    import mlx.core as mx

    draw = np.random.default_rng(4)
    k, v = (draw.standard_normal((1, 2, 100, 64)).astype(np.float32) for _ in "kv")
    q = draw.standard_normal((1, 4, 3, 64)).astype(np.float32)
    mean = np.full((2, 64), 0.75)
    mean[1] *= -2
    k += mean[:, None].astype(np.float32)
    v += mean[:, None].astype(np.float32)
    tensors = learned(mean=mean), learned((7, 6, 6, 4, 4, 2, 0, 0), mean)
    spec = spec_of(1, *tensors, window=0, sinks=0, subtract_mean=False)
    cache = QuantizedStateCache(spec.layers[0], spec.rotations)
    cache.update_and_fetch(mx.array(k), mx.array(v))
    stored = []
    for x, store, tensor in zip((k, v), cache.stores, tensors, strict=True):
        coded, ones = (np.array(part, np.float64) for part in store.decoded(0, 100))
        assert store.codec.effective_bits == tensor.bits + 16 / 64
        out = tensor.basis.out.astype(np.float64)
        stored.append(np.repeat(coded @ out + ones * mean[:, None], 2, axis=1))
        assert (ones == 1).all()
        along = (x - mean[:, None]) @ np.linalg.inv(out)
        held = 8 * sum(width > 0 for width in tensor.widths)
        assert not coded[..., held:].any()
        error = ((coded - along)[..., :held] ** 2).sum() / (along[..., :held] ** 2).sum()
        assert error < 0.04
    kk, vv = stored
    scores = q.astype(np.float64) @ kk.swapaxes(-1, -2) * 0.1
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    wanted = weights / weights.sum(axis=-1, keepdims=True) @ vv
    found = np.array(cache.attend(mx.array(q), scale=0.1))
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(vv).max())


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


@pytest.mark.parametrize("name", ["turboquant", "aside", "learned"])
def test_saved_and_loaded_it_goes_on_as_before(model, prompt, tmp_path, name):
    from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

    made = caches(model, spec_of(len(model.layers), SCHEMES[name], SCHEMES[name]))
    run(model, made, prompt[:300])
    save_prompt_cache(str(tmp_path / "cache.safetensors"), made)
    again = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert [cache.offset for cache in again] == [300] * len(made)
    assert [cache.exact_trim for cache in again] == [cache.exact_trim for cache in made]
    np.testing.assert_array_equal(run(model, again, prompt[300:]), run(model, made, prompt[300:]))
    about, *rest = made[0].state
    old = [about.replace('"version": 4', '"version": 3'), *rest]
    with pytest.raises(KvError, match="a saved cache of version 3, not 4: run the prompt again"):
        QuantizedStateCache.from_state(old)


@pytest.mark.parametrize(("length", "count"), [(200, 7), (200, 64), (197, 64), (260, 200)])
def test_trimmed_it_is_as_if_the_tokens_had_never_been(model, prompt, length, count):
    """Bit for bit, as far back as the cache says, over every place where a block is encoded."""
    from mlx_lm.models.cache import trim_prompt_cache

    layers = len(model.layers)
    straight, cut = caches(model, spec_of(layers)), caches(model, spec_of(layers))
    kept = prompt[: length - count]
    run(model, straight, kept)
    run(model, cut, kept)
    run(model, cut, prompt[5 : 5 + count], chunk=16)
    assert all(cache.exact_trim >= 64 for cache in cut)
    exact = cut[0].exact_trim >= count
    assert exact == (count <= 64)
    assert trim_prompt_cache(cut, count) == count
    for start in range(200, 330, 26):
        a, b = (run(model, cache, prompt[start : start + 26]) for cache in (straight, cut))
        if exact:
            np.testing.assert_array_equal(a, b)
        else:  # what came back into the window is codes
            assert kl(a, b) < 1e-3


@pytest.mark.parametrize("count", [1, 50, 129])
def test_without_a_window_every_trim_is_exact(model, prompt, count):
    """But for one that cuts into the tokens that the keys' mean is of."""
    layers = len(model.layers)
    straight, cut = (caches(model, spec_of(layers, window=0)) for _ in "ab")
    for cache in (straight, cut):
        run(model, cache, prompt[: 200 - count], chunk=400)
    run(model, cut, prompt[5 : 5 + count], chunk=400)
    assert cut[0].exact_trim == 200 - 4 - 64
    assert [cache.trim(count) for cache in cut] == [count] * layers
    np.testing.assert_array_equal(
        run(model, straight, prompt[200:230]), run(model, cut, prompt[200:230])
    )


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


def test_settings_survive_json(tmp_path):
    spec = spec_of(2, SCHEMES["aside"], SCHEMES["fraction"], subtract_mean=False)
    again = KvSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again.layers == spec.layers
    assert again.to_json() == spec.to_json()
    kept = spec_of(2, learned(), SCHEMES["aside"])
    assert list(kept.bases) == [learned().basis.name]
    (tmp_path / "config.json").write_text(json.dumps({"kv_cache_quantization": kept.to_json()}))
    with pytest.raises(KvError, match=r"the basis \w{12}, which is not in the model_kv_cache"):
        KvSpec.load(tmp_path)
    file = tmp_path / BASES
    file.parent.mkdir()
    file.write_bytes(packed(kept.bases))
    assert KvSpec.load(tmp_path).to_json() == kept.to_json()
    file.write_bytes(b"PK")
    with pytest.raises(KvError, match=r"bases\.safetensors: is no safetensors file"):
        KvSpec.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(KvError, match="has no kv_cache_quantization; `convert kv` writes it"):
        KvSpec.load(tmp_path)
    with pytest.raises(KvError, match="schema 3, not 4; `convert kv` writes it anew"):
        KvSpec.from_json({**spec.to_json(), "schema": 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json cannot be read"),
        (None, "config.json cannot be read: .*No such file"),
        ({"kv_cache_quantization": None}, "kv_cache_quantization in config.json is damaged"),
        ({"kv_cache_quantization": {"schema": SCHEMA}}, r"is damaged \(KeyError\('layers'\)\)"),
        ({}, "config.json has no kv_cache_quantization"),
    ],
)
def test_settings_that_are_damaged_are_told_as_such(tmp_path, content, message):
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(KvError, match=message):
        KvSpec.load(tmp_path)
