"""Quantized caches of unequal lengths in one batch, in both stock runtimes' batch generation."""

import copy

import numpy as np
import pytest

from quant.kv.batch import BatchQuantizedStateCache
from quant.kv.cache import QuantizedStateCache
from quant.kv.runtime import caches, use
from quant.kv.spec import KvSpec, LayerSpec, TensorSpec
from quant.kv.turbo import KvError

pytestmark = pytest.mark.usefixtures("runtimes")

KEY = TensorSpec(scheme="turboquant", bits=4, tries=5)
VALUE = TensorSpec(scheme="uniform", bits=4, group=32)
LENGTHS = (110, 70, 3, 140)


def spec_of(model):
    """Every layer but the first, whose own cache then states the masks."""
    made = KvSpec(layers=(None, *[LayerSpec(key=KEY, value=VALUE, window=32)] * 5)[:6])
    made.rotation(64)
    count = len(model.layers)
    return KvSpec(layers=made.layers[:count], rotations=made.rotations)


@pytest.fixture(scope="module")
def tokenizer(tinylm):
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(tinylm)


@pytest.fixture(scope="module")
def model(tinylm):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    loaded, _ = load_model(tinylm)
    loaded.set_dtype(mx.float32)
    return loaded


@pytest.fixture(scope="module")
def prompts(tinylm, tokenizer):
    ids = tokenizer.encode((tinylm / "eval.txt").read_text())
    ends = np.cumsum(LENGTHS)
    return [ids[end - n : end] for end, n in zip(ends, LENGTHS, strict=True)]


def forward(model, cache, rows):
    import mlx.core as mx

    out = model(mx.array(rows), cache=cache)
    mx.eval(out)
    return np.array(out.astype(mx.float32))


def alone(model, spec, prompt, after=()):
    """Logits of the last token of a prompt, and of each token after it."""
    cache = caches(model, spec)
    last = [forward(model, cache, [prompt])[0, -1]]
    return np.stack(last + [forward(model, cache, [[token]])[0, -1] for token in after])


def merged(model, spec, count):
    single = [caches(model, spec) for _ in range(count)]
    return [of_layer[0].merge(list(of_layer)) for of_layer in zip(*single, strict=True)]


def near(found, wanted):
    return np.abs(found - wanted).max() < 2e-3 * np.abs(wanted).max()


# Against each row alone


@pytest.mark.parametrize("chunk", [64, 4096])
def test_padded_on_the_right_every_row_is_what_it_is_alone(model, prompts, chunk):
    """As mlx-lm's PromptProcessingBatch calls it, in one step and in several."""
    spec = spec_of(model)
    batch = merged(model, spec, len(prompts))
    longest = max(LENGTHS)
    padding = [longest - n for n in LENGTHS]
    rows = [p + [0] * pad for p, pad in zip(prompts, padding, strict=True)]
    for cache in batch:
        cache.prepare(lengths=list(LENGTHS), right_padding=padding)
    for start in range(0, longest, chunk):
        forward(model, batch, [row[start : start + chunk] for row in rows])
    for cache in batch:
        cache.finalize()
    follow = [[7, 8, 9]] * len(prompts)
    steps = [forward(model, batch, [[f[i]] for f in follow])[:, -1] for i in range(3)]
    assert batch[-1].rows[3].stores[0].count == 64
    for index, prompt in enumerate(prompts):
        single = caches(model, spec)
        for start in range(0, len(prompt), chunk):
            forward(model, single, [prompt[start : start + chunk]])
        for i, step in enumerate(steps):
            assert near(step[index], forward(model, single, [[follow[index][i]]])[0, -1])


def test_padded_on_the_left_every_row_is_what_it_is_alone(model, prompts):
    """As mlx-vlm's batch generator makes its caches: to_batch with the padding of each row."""
    from mlx_vlm.generate.ar import _make_cache

    spec = spec_of(model)
    longest = max(LENGTHS)
    padding = [longest - n for n in LENGTHS]
    made = caches(model, spec)
    own = made[0].merge([made[0]]).__class__(padding)
    batch = [own, *(cache.to_batch(padding) for cache in made[1:])]
    rows = [[0] * pad + p for p, pad in zip(prompts, padding, strict=True)]
    out = forward(model, batch, rows)
    assert np.isfinite(out).all()
    assert batch[1].offset.tolist() == list(LENGTHS)
    after = forward(model, batch, [[9]] * len(rows))
    for index, prompt in enumerate(prompts):
        wanted = alone(model, spec, prompt, [9])
        assert near(out[index, -1], wanted[0])
        assert near(after[index, -1], wanted[1])
    with pytest.raises(NotImplementedError, match="does not support quantized continuous"):
        _make_cache(type("M", (), {"make_cache": lambda _: made[1:]})(), padding, kv_bits=4)


def test_rows_come_and_go(model, prompts):
    """Merge, extend, filter, extract, trim, copy, save and load: each row stays itself."""
    spec = spec_of(model)
    single = []
    for prompt in prompts:
        cache = caches(model, spec)
        forward(model, cache, [prompt])
        single.append(cache)
    wanted = [alone(model, spec, prompt, [5, 6, 7]) for prompt in prompts]
    pairs = [[single[0], single[1]], [single[2], single[3]]]
    left, right = (
        [of_layer[0].merge(list(of_layer)) for of_layer in zip(*pair, strict=True)]
        for pair in pairs
    )
    for cache, other in zip(left, right, strict=True):
        cache.extend(other)
    first = forward(model, left, [[5]] * 4)
    assert all(near(first[i, 0], wanted[i][1]) for i in range(4))
    kept = copy.deepcopy(left)
    order = [3, 1]
    for cache in left:
        cache.filter(order)
    second = forward(model, left, [[6]] * 2)
    assert all(near(second[i, 0], wanted[row][2]) for i, row in enumerate(order))
    taken = [cache.extract(1) for cache in left]
    third = forward(model, taken, [[7]])
    assert near(third[0, 0], wanted[1][3])
    # What was merged, copied and extracted is a copy: the originals are where they were.
    assert [cache.offset for cache in single[1]] == [70] * len(single[1])
    assert near(forward(model, single[1], [[5]])[0, -1], wanted[1][1])
    again = forward(model, kept, [[6]] * 4)
    assert all(near(again[i, 0], wanted[i][2]) for i in range(4))
    for cache in kept:
        assert cache.trim(1) == 1
    again = forward(model, kept, [[6]] * 4)
    assert all(near(again[i, 0], wanted[i][2]) for i in range(4))


def test_a_saved_batch_goes_on_as_before(model, prompts, tmp_path):
    from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

    spec = KvSpec(
        layers=(LayerSpec(key=KEY, value=VALUE, window=32),) * len(model.layers),
        rotations=spec_of(model).rotations,
    )
    batch = merged(model, spec, 2)
    for cache in batch:
        cache.prepare(lengths=[70, 110], right_padding=[40, 0])
    forward(model, batch, [prompts[1] + [0] * 40, prompts[0]])
    for cache in batch:
        cache.finalize()
    save_prompt_cache(str(tmp_path / "batch.safetensors"), batch)
    again = load_prompt_cache(str(tmp_path / "batch.safetensors"))
    assert [type(cache) for cache in again] == [BatchQuantizedStateCache] * len(batch)
    np.testing.assert_array_equal(
        forward(model, again, [[5], [6]]), forward(model, batch, [[5], [6]])
    )


# The runtimes' own batch generation


def test_mlx_lm_batch_generation_gives_the_tokens_of_each_alone(model, tokenizer, prompts):
    from mlx_lm import batch_generate, generate

    spec = spec_of(model)
    wanted = [
        generate(model, tokenizer, p, max_tokens=8, prompt_cache=caches(model, spec))
        for p in prompts
    ]
    found = batch_generate(
        model,
        tokenizer,
        prompts,
        prompt_caches=[caches(model, spec) for _ in prompts],
        max_tokens=8,
        prefill_batch_size=2,  # the second pair of prompts extends the first's batch
        return_prompt_caches=True,
    )
    assert [text.strip() for text in found.texts] == [text.strip() for text in wanted]
    assert type(found.caches[0][-1]) is QuantizedStateCache
    assert found.caches[0][-1].offset == LENGTHS[0] + 8


def test_mlx_vlm_batch_generator_gives_the_tokens_of_each_alone(tinylm_output, prompts):
    import mlx.core as mx
    from mlx_vlm import load
    from mlx_vlm.generate.ar import BatchGenerator

    loaded, processor = load(str(tinylm_output))
    loaded.set_dtype(mx.float32)
    language = loaded.language_model
    use(language, spec_of(language))

    def embed(row):
        return loaded.get_input_embeddings(mx.array([row]), None).inputs_embeds

    def tokens(some):
        made = BatchGenerator(language, processor, max_tokens=5, prefill_batch_size=2)
        given = [{"inputs_embeds": embed(row)} for row in some]
        found = {uid: [] for uid in made.insert(some, prompt_kwargs=given)}
        while made.has_work:
            for response in made.next()[1]:
                found[response.uid].append(response.token)
        made.close()
        return list(found.values())

    together = tokens(prompts)
    assert [len(row) for row in together] == [5] * len(prompts)
    assert together == [tokens([prompt])[0] for prompt in prompts]


# Refusals


def test_other_caches_are_refused_in_a_batch(model):
    spec = spec_of(model)
    made = caches(model, spec)
    with pytest.raises(KvError, match="cannot take a KVCache; make the caches of every prompt"):
        made[1].merge([made[1], made[0]])
    batch = made[1].merge([made[1]])
    with pytest.raises(KvError, match="cannot take a KVCache"):
        batch.extend(made[0])


def test_padding_after_tokens_and_masks_of_other_widths_are_refused():
    import mlx.core as mx

    made = KvSpec(layers=())
    rotations = {64: made.rotation(64)}
    single = QuantizedStateCache(LayerSpec(key=KEY, value=VALUE), rotations)
    batch = single.to_batch([0, 0])
    x = mx.ones((2, 1, 5, 64))
    batch.update_and_fetch(x, x)
    with pytest.raises(KvError, match="only be added to an empty batch"):
        batch.prepare(left_padding=[1, 0])
    with pytest.raises(KvError, match="needs the prompts' lengths"):
        batch.prepare(right_padding=[1, 0])
    with pytest.raises(KvError, match="a mask of 4 columns for a batch of 5"):
        batch.attend(x, scale=1.0, mask=mx.ones((2, 1, 5, 4), dtype=mx.bool_))
    single.update_and_fetch(x[:1], x[:1])
    with pytest.raises(KvError, match=r"joins a batch by merge\(\)"):
        single.to_batch([0])
