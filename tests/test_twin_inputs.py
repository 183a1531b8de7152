import importlib

import numpy as np
import pytest
from twin_helpers import (
    CHAT,
    CONVERSATION,
    TYPES,
    VISION,
    first_output,
    ids,
    picture,
    torch_inputs,
    torch_model,
)

from validate.twin import load_example, make_twin


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    root = tmp_path_factory.mktemp("twins")
    return {name: make_twin(load_example(name), root / name) for name in TYPES}


# Tokenizers and processors


@pytest.mark.parametrize("name", TYPES)
def test_tokenizer_has_exactly_the_ids_of_the_config(twins, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(twins[name].path)
    config = twins[name].config.get("text_config", twins[name].config)
    assert len(tokenizer) == config["vocab_size"] == len(set(tokenizer.get_vocab().values()))
    text = "the river and the small boat 42"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.decode(range(len(tokenizer)))
    if name != "bert":
        assert tokenizer.decode(tokenizer.encode("Grüße, 你好!\n")).endswith("Grüße, 你好!\n")
        assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("name", CHAT)
def test_chat_template_renders_turns(twins, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(twins[name].path)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == expected
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == expected + "<|im_start|>assistant\n"


@pytest.mark.parametrize("name", VISION)
def test_special_ids_of_the_config_are_those_tokens(twins, name):
    from transformers import AutoTokenizer

    config, source = twins[name].config, load_example(name)
    tokenizer = AutoTokenizer.from_pretrained(twins[name].path)
    assert tokenizer.image_token == "<|image_pad|>"
    assert tokenizer.image_token_id == config["image_token_id"] != source["image_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") == config["video_token_id"]


@pytest.mark.parametrize("name", VISION)
def test_torch_sees_the_image(twins, name):
    folder = twins[name].path
    model = torch_model(folder)
    _, inputs = torch_inputs(folder, picture(150, 90))
    output = first_output(model, **inputs)
    assert output.isfinite().all()
    inputs["pixel_values"] = -inputs["pixel_values"]
    other = first_output(model, **inputs)
    assert (other[0, -1] - output[0, -1]).abs().max() > 1e-3 * output.abs().max()


@pytest.mark.parametrize("size", [(150, 90), (60, 200), (110, 110)])
@pytest.mark.parametrize("name", VISION)
def test_both_processors_make_the_same_inputs(twins, name, size):
    from validate.runtime import prepare_mlx

    folder = twins[name].path
    prompt, expected = torch_inputs(folder, picture(*size))
    prepare_mlx()
    from mlx_vlm.utils import load_processor, prepare_inputs

    # Loading a model imports its package, which is what brings its processor.
    importlib.import_module(f"mlx_vlm.models.{name}")
    processor = load_processor(folder, add_detokenizer=False)
    assert type(processor).__module__.startswith("mlx_vlm.")
    made = prepare_inputs(processor, images=[picture(*size)], prompts=prompt)
    np.testing.assert_array_equal(np.array(made["input_ids"]), expected["input_ids"])
    pixels = made["pixel_values"]
    if name == "minicpmv4_6":
        pixels = np.concatenate([np.array(patch) for patch in pixels[0]], axis=-1)[None]
    np.testing.assert_allclose(np.array(pixels), expected["pixel_values"], atol=1e-6)


# The stock runtimes


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_stock_mlx_lm_computes_the_same(twins, name):
    from validate.runtime import prepare_mlx

    prepare_mlx()
    import mlx.core as mx
    from mlx_lm import load

    model, _ = load(str(twins[name].path))
    ours = np.array(model(mx.array(ids().numpy())))
    theirs = first_output(torch_model(twins[name].path), input_ids=ids()).numpy()
    assert abs(ours - theirs).max() < 1e-5 * abs(theirs).max()


@pytest.mark.parametrize("name", VISION)
def test_stock_mlx_vlm_answers_about_an_image(twins, name):
    from validate.runtime import prepare_mlx

    prepare_mlx()
    from mlx_vlm import generate, load

    model, processor = load(str(twins[name].path))
    prompt = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    answer = generate(model, processor, prompt, image=[picture(150, 90)], max_tokens=4)
    assert answer.generation_tokens == 4
