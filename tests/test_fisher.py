"""Sensitivities, block by block, are those of one backward pass through the whole model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from test_calibrate_stream import rows_of, shapes_of, streamed
from twin_helpers import torch_model

from arch_maps.ops import Source, evaluate
from converter.losses import tasks_of
from converter.pipeline import Request, plan_request
from converter.plan import Options
from converter.source import open_folder
from quant.calibrate.fisher import (
    COLUMNS,
    LOOKED_UP,
    MATRICES,
    ROWS,
    SAMPLED,
    fisher,
    sample,
)
from quant.calibrate.links import Task
from quant.calibrate.text import CalibrationError
from quant.recipe import QuantSpec


def whole(folder, rows):
    """Mean squares of every dense layer's inputs and output gradients, by its path."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    model.requires_grad_(False)
    found = {}

    def add(label, value):
        squares = value.detach().reshape(-1, value.shape[-1]).double().square().sum(0)
        found[label] = found.get(label, 0) + squares

    def watch(path):
        def hook(_, given, out):
            add(COLUMNS + path, given[0])
            if out.requires_grad:
                out.register_hook(lambda gradient: add(ROWS + path, gradient))

        return hook

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(watch(path))
    generator = torch.Generator().manual_seed(0)
    model.get_input_embeddings().register_forward_hook(lambda *given: given[-1].requires_grad_())
    for row in rows:
        logits = model(**row, use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    tokens = sum(row["input_ids"].numel() for row in rows)
    return {label: (squares / tokens).float().numpy() for label, squares in found.items()}


def matrices(folder):
    return [
        Task(
            module=name.removesuffix(".weight"),
            expr=Source(name, shape),
            dtype="BF16",
            spec=QuantSpec.make("affine"),
            table=name == "model.embed_tokens.weight",
        )
        for name, shape in shapes_of(folder).items()
        if len(shape) == 2
    ]


@pytest.mark.parametrize("model_type", ["llama", "gemma4_text"])
def test_blocks_give_what_the_whole_model_gives(twin_of, model_type):
    """Gemma 4's last layers read keys and values of earlier ones, and gradients go back there."""
    folder, rows = twin_of(model_type, "bfloat16"), rows_of(2, 24)
    with open_folder(folder).open() as reader:
        found = fisher(streamed(folder, reader), matrices(folder), rows, shapes_of(folder))
    expected = whole(folder, rows)
    compared = {n for n in found if ".layers." in n and n in expected}
    assert len(compared) > 20
    for name in compared:
        scale = np.abs(expected[name]).max()
        assert np.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4 * scale), name
    assert f"{LOOKED_UP}{COLUMNS}model.embed_tokens" in found


def test_streams_and_n_grams_are_followed_too(twin_of):
    """Blocks take several streams; what projects n-grams sees no hidden states; indexers choose."""
    folder = twin_of("qwen4_exp", "bfloat16")
    tasks = planned_tasks(folder)
    with open_folder(folder).open() as reader:
        found = fisher(streamed(folder, reader), tasks, rows_of(1, 16), shapes_of(folder))
    names = {name.rpartition(":")[2] for name in found}
    lost = {task.module for task in tasks} - names
    assert not [
        name
        for name in lost
        if not {"ngram_embedding", "hyper_connection_mixer", "indexer"} & set(name.split("."))
    ]
    width = found[f"{LOOKED_UP}{COLUMNS}language_model.model.embed_tokens"].shape
    assert width == (
        json.loads((folder / "config.json").read_text())["text_config"]["hidden_size"],
    )


def test_what_no_layer_stands_for_is_refused(twin_of):
    folder = twin_of("llama", "bfloat16")
    other = replace(matrices(folder)[0], expr=Source("x", (4, 32)), table=False)
    with (
        open_folder(folder).open() as reader,
        pytest.raises(CalibrationError, match="none of the 1 matrices stands for a product"),
    ):
        fisher(streamed(folder, reader), [other], rows_of(1, 8), shapes_of(folder))


def planned_tasks(folder):
    """All matrices of the twin's plan, as choosing formats watches them."""
    recipe = Options(quant=QuantSpec.make("affine", 4, 32))
    return tasks_of(plan_request(Request(hf_path=str(folder), recipes=(recipe,))).plans[0])


def squares(folder, rows):
    """The square of every tensor's gradient, by torch alone, summed over rows of one token each."""
    model = torch_model(folder)
    found = {}
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        model.zero_grad()
        logits = model(**row, use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for name, tensor in model.named_parameters():
            found[name] = found.get(name, 0) + tensor.grad.double().square()
    return found


def token(number):
    ids = torch.tensor([[number]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def as_release(folder, found, out):
    """A number for each of torch's parameters, moved to the release's layout as values are."""
    model = torch_model(folder)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(found[name])
    model.save_pretrained(out)
    return open_folder(out)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_one_token_s_weights_are_the_squared_gradients(twin_of, model_type, tmp_path, monkeypatch):
    """With one token rows times columns is exact: of experts, fused, split and turned matrices."""
    monkeypatch.setattr("quant.calibrate.fisher.SAMPLED", 1 << 10)
    folder = twin_of(model_type, "bfloat16")
    rows = [token(77)]
    tasks = planned_tasks(folder)
    with open_folder(folder).open() as reader:
        found = fisher(streamed(folder, reader), tasks, rows, shapes_of(folder))
    expected, stacks = as_release(folder, squares(folder, rows), tmp_path / "squares"), 0
    with expected.open() as reader:
        for task in tasks:
            if (name := f"{ROWS}{task.module}") not in found:
                continue
            made = found[name][..., :, None] * found[f"{COLUMNS}{task.module}"][..., None, :]
            whole = evaluate(task.expr, reader)
            stacks += task.stacked
            assert made.shape == whole.shape
            noise = 1e-12  # one token attends to itself alone, whatever its key
            close = np.allclose(made, whole, rtol=2e-3, atol=max(1e-5 * whole.max(), noise))
            assert close, task.module
    served = {task.module for task in tasks if f"{ROWS}{task.module}" in found}
    assert {task.module for task in tasks} - served == {"model.embed_tokens"}
    assert stacks >= 3


def test_rare_experts_count_as_often_as_tokens_come(twin_of):
    """An expert that one token of two came to: its square over both of them."""
    folder = twin_of("qwen3_moe", "bfloat16")
    rows = [token(77), token(130)]
    alone = [squares(folder, [row])["model.layers.1.mlp.experts.down_proj"] for row in rows]
    reached = torch.stack([one.sum((1, 2)) > 0 for one in alone])
    tasks = planned_tasks(folder)
    with open_folder(folder).open() as reader:
        found = fisher(streamed(folder, reader), tasks, rows, shapes_of(folder))
    name = "model.layers.1.mlp.switch_mlp.down_proj"
    made = found[f"{ROWS}{name}"][..., :, None] * found[f"{COLUMNS}{name}"][..., None, :]
    numbers = found[f"{MATRICES}{name}"]
    once = [i for i, expert in enumerate(numbers) if reached[:, expert].tolist() == [True, False]]
    assert once
    for index in once:
        assert np.allclose(made[index], alone[0][numbers[index]].numpy() / 2, rtol=2e-3)
    for index, expert in enumerate(numbers):
        assert reached[:, expert].any() == bool(made[index].any())


def test_a_sample_stands_for_the_whole():
    weights = np.random.default_rng(0).lognormal(0, 2, 256)
    numbers, times = sample(weights)
    assert len(numbers) <= SAMPLED
    assert np.argmax(weights) in numbers
    assert (times * weights[numbers]).sum() == pytest.approx(weights.sum())
    errors = weights * np.random.default_rng(1).uniform(0.9, 1.1, 256)
    assert (times * errors[numbers]).sum() == pytest.approx(errors.sum(), rel=0.05)
    assert [list(found) for found in sample(weights[:SAMPLED])] == [[*range(8)], [1.0] * 8]
