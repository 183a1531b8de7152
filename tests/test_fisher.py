"""Sensitivities, block by block, are those of one backward pass through the whole model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from test_calibrate_stream import rows_of, shapes_of, streamed

from arch_maps.ops import Source
from converter.source import open_folder
from quant.calibrate.fisher import COLUMNS, LOOKED_UP, ROWS, fisher
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
        found = fisher(streamed(folder, reader), matrices(folder), rows)
    expected = whole(folder, rows)
    compared = {n for n in found if ".layers." in n and n in expected}
    assert len(compared) > 20
    for name in compared:
        scale = np.abs(expected[name]).max()
        assert np.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4 * scale), name
    assert f"{LOOKED_UP}{COLUMNS}model.embed_tokens" in found


def test_what_no_layer_stands_for_is_refused(twin_of):
    folder = twin_of("llama", "bfloat16")
    other = replace(matrices(folder)[0], expr=Source("x", (4, 32)), table=False)
    with (
        open_folder(folder).open() as reader,
        pytest.raises(CalibrationError, match="none of the 1 matrices is a dense layer"),
    ):
        fisher(streamed(folder, reader), [other], rows_of(1, 8))
