"""Quantized caches in mlx-vlm's own generation, with text and with a picture."""

import pytest
from PIL import Image, ImageDraw

from quant.kv.runtime import caches, own_caches, use
from quant.kv.scan import spec_for, static_scan
from quant.kv.spec import TensorSpec

pytestmark = pytest.mark.usefixtures("runtimes")

EIGHT = TensorSpec(scheme="turboquant", bits=8, tries=5)


def loaded(folder):
    import mlx.core as mx
    from mlx_vlm import load

    model, processor = load(str(folder))
    model.set_dtype(mx.float32)
    return model, processor


def spec_of(model, window=8):
    facts = static_scan(model.language_model)
    return spec_for(facts, lambda _: (EIGHT, EIGHT), window=window)


def said(model, processor, prompt, cache, **given):
    """The tokens that the runtime's own generation gives."""
    from mlx_vlm.generate import stream_generate

    steps = stream_generate(
        model, processor, prompt, max_tokens=12, temperature=0.0, prompt_cache=cache, **given
    )
    return [step.token for step in steps]


def test_text(tinylm_output, tinylm):
    model, processor = loaded(tinylm_output)
    prompt = (tinylm / "eval.txt").read_text()[:400]
    wanted = said(model, processor, prompt, own_caches(model.language_model))
    made = caches(model.language_model, spec_of(model))
    assert said(model, processor, prompt, made) == wanted
    assert all(cache.stores[0].count >= 64 for cache in made)
    # Saved by the runtime's protocol of states, it goes on as the same cache.
    again = [type(cache).from_state(cache.state, cache.meta_state) for cache in made]
    more = said(model, processor, " and", again)
    assert more == said(model, processor, " and", made)


@pytest.fixture(scope="module")
def seeing(twin_of, tmp_path_factory):
    from converter.pipeline import Request, convert
    from converter.ui import Console

    out = tmp_path_factory.mktemp("seeing") / "out"
    convert(Request(hf_path=str(twin_of("minicpmv4_6")), mlx_path=out), Console(quiet=True))
    return loaded(out)


def test_a_picture(seeing):
    from mlx_vlm.prompt_utils import apply_chat_template

    model, processor = seeing
    picture = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(picture).ellipse((20, 10, 70, 54), fill="red")
    prompt = apply_chat_template(processor, model.config, "What is this?", num_images=1)
    own = own_caches(model.language_model)
    wanted = said(model, processor, prompt, own, image=[picture])
    made = caches(model.language_model, spec_of(model, window=0))
    assert said(model, processor, prompt, made, image=[picture]) == wanted
    packed = [cache for cache in made if hasattr(cache, "stores")]
    assert len(packed) == 2
    seen = [cache.offset for cache in own if type(cache).__name__ == "KVCache"]
    assert [cache.offset for cache in packed] == seen
    assert all(cache.stores[0].count == cache.offset - 4 for cache in packed)


def test_a_model_that_makes_its_own_caches_makes_quantized_ones(tinylm_output, tinylm):
    model, processor = loaded(tinylm_output)
    prompt = (tinylm / "eval.txt").read_text()[:300]
    spec = spec_of(model)
    wanted = said(model, processor, prompt, caches(model.language_model, spec))
    use(model.language_model, spec)
    kept = [type(cache).__name__ for cache in own_caches(model.language_model)]
    assert set(kept) == {"QuantizedStateCache"}
    assert said(model, processor, prompt, own_caches(model.language_model)) == wanted


def test_models_that_measure_keys_and_remember_positions(twin_of, tmp_path):
    """Qwen2-VL's kin cut masks by the length of the keys, and keep a prompt's positions."""
    import mlx.core as mx
    import numpy as np

    from converter.pipeline import Request, convert
    from converter.ui import Console
    from quant.kv.measure import forward_of

    convert(
        Request(hf_path=str(twin_of("qwen2_vl")), mlx_path=tmp_path / "out"), Console(quiet=True)
    )
    language = loaded(tmp_path / "out")[0].language_model
    forward, ids = forward_of(language), mx.array([[7 + 3 * i for i in range(40)]])
    own = own_caches(language)
    wanted = forward(ids, own)
    forward(ids[:, :4], own_caches(language))  # a prompt of another length
    rows = [caches(language, spec_of(loaded(tmp_path / "out")[0], window=0)) for _ in range(2)]
    for made in rows:
        found = forward(ids, made)
        assert np.allclose(found, wanted, atol=0.1), np.abs(np.array(found - wanted)).max()
    batch = [type(one).merge([one, other]) for one, other in zip(*rows, strict=True)]
    single, both = forward(mx.array([[5]]), own), forward(mx.array([[5], [5]]), batch)
    assert np.allclose(both[0], single[0], atol=0.1), np.abs(np.array(both[0] - single[0])).max()
