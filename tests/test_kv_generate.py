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
