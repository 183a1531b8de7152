"""What stock modules do whatever the checkpoint is: those that none runs in, those that speak."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from validate.answers import Question
from validate.cases import Case
from validate.judgement import Found, compare_tokens
from validate.runtime import MlxRuntime, RuntimeRefusal, runtimes_for

pytestmark = pytest.mark.usefixtures("runtimes")


def test_a_module_that_no_checkpoint_runs_in_is_no_runtime_of_its_type():
    assert runtimes_for({"model_type": "kimi_vl", "architectures": ["XForCausalLM"]}) == (
        "mlx_vlm",
    )
    llama = {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    assert runtimes_for(llama) == ("mlx_lm",)


def test_mlx_lm_loads_no_kimi_vl(twin_of):
    """Neither the release's keys and values nor what its own loader would make of them."""
    from mlx_lm.utils import load_model

    with pytest.raises(ValueError, match="kv_b_proj"):
        load_model(twin_of("kimi_vl"), lazy=True)


def test_mlx_vlm_makes_bare_arrays_of_llama4_text(twin_of):
    import mlx.core as mx
    from mlx_vlm.utils import load_model

    model = load_model(twin_of("llama4_text"), lazy=True)
    output = model.language_model(mx.array([[1, 2, 3]]))
    assert isinstance(output, mx.array)


def _questions():
    said = Case(name="said", modality="text", text="a")
    asked = Case(name="asked", modality="chat", messages=(("user", "b"),))
    return [Question(said, (1,), tokenized=(1,)), Question(asked, (2, 3), tokenized=(2, 3))]


def _model(model_type):
    def tokenize(case):
        return [9, 9] if case.messages else [1]

    return SimpleNamespace(name="mlx_vlm", config={"model_type": model_type}, tokenize=tokenize)


def test_conversations_that_a_runtime_writes_its_own_way_are_a_row_of_their_own():
    found = Found("mlx_vlm", description={})
    compare_tokens(found, _model("internvl_chat"), _questions())
    spoken, tokens = found.checks
    assert (spoken.name, spoken.verdict, spoken.value) == ("deviation", "info", 2.0)
    assert "template of its own" in spoken.note
    assert (tokens.name, tokens.verdict, tokens.value) == ("tokens", "pass", 0.0)
    assert "left out" in tokens.note


@pytest.mark.parametrize(("model_type", "verdict"), [("moondream3", "info"), ("qwen3", "fail")])
def test_a_runtime_that_cannot_write_conversations_is_told_where_that_is_known(model_type, verdict):
    def tokenize(case):
        if case.messages:
            raise RuntimeRefusal("messages should be dicts")
        return [1]

    found = Found("mlx_vlm", description={})
    model = SimpleNamespace(name="mlx_vlm", config={"model_type": model_type}, tokenize=tokenize)
    compare_tokens(found, model, _questions())
    first, *rest = found.checks
    assert first.verdict == verdict
    assert [check.verdict for check in rest] == (["pass"] if verdict == "info" else [])


def test_conversations_of_other_types_count():
    found = Found("mlx_vlm", description={})
    compare_tokens(found, _model("qwen3"), _questions())
    (tokens,) = found.checks
    assert (tokens.verdict, tokens.value) == ("fail", 2.0)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4", "affine"])
def test_packed_embeddings_look_up_in_float32(mode):
    import mlx.core as mx
    import mlx.nn as nn

    table = nn.Embedding(8, 64)
    sizes = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    model = nn.Sequential(nn.QuantizedEmbedding.from_embedding(table, *sizes, mode=mode))
    runtime = MlxRuntime("mlx_lm", model, {}, Path())
    runtime.to_float32(dense=False)
    packed = model(mx.arange(8))
    assert packed.dtype == mx.float32
    runtime.to_float32(dense=True)
    assert mx.array_equal(packed, model(mx.arange(8)))
