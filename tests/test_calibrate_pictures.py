"""Calibration sets with pictures: what they hold, and that the pictures' tokens count."""

import json
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from converter.calibrated import picture_rows
from converter.errors import PlanError
from converter.pipeline import Request, convert, plan_request
from converter.plan import Options
from converter.ui import Console
from quant.calibrate.pictures import QUESTION, digest, pictures_in
from quant.calibrate.store import Store
from quant.calibrate.text import CalibrationError, calibration_of, read_text
from quant.moments import diagonal_blocks
from quant.recipe import QuantSpec

TEXT = "One and two are three. " * 40


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "words.txt").write_text(TEXT)
    for name, colour in (("a.png", (200, 30, 60)), ("b.jpg", (10, 90, 220))):
        picture = Image.effect_noise((96, 64), 90).convert("RGB")
        picture.paste(colour, (8, 8, 40, 40))
        picture.save(folder / name)
    (folder / "a.txt").write_text("What is red?\n")
    return folder


def test_questions_belong_to_pictures_and_not_to_the_text(data):
    found = pictures_in(data)
    assert [(p.path.name, p.question) for p in found] == [
        ("a.png", "What is red?"),
        ("b.jpg", QUESTION),
    ]
    assert read_text(data) == TEXT
    planned = calibration_of(data, sequences=2, length=9)
    assert planned.pictures == digest(found)
    (data / "a.txt").write_text("What is blue?")
    assert calibration_of(data, sequences=2, length=9) != planned
    (data / "words.txt").unlink()
    assert read_text(data) == read_text(None)


def recipe(data):
    return Options(
        quant=QuantSpec.make("affine", 4, 32, "imatrix"),
        calibration=calibration_of(data, sequences=2, length=16),
    )


def test_pictures_for_a_text_model_are_refused_before_any_work(twin_of, data):
    request = Request(
        hf_path=str(twin_of("qwen3", "bfloat16")), recipes=(recipe(data),), calibration_data=data
    )
    with pytest.raises(PlanError, match="holds pictures, which qwen3 does not take"):
        plan_request(request)


def huge():
    """The head of a PNG of 400 million pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


@pytest.mark.parametrize("content", [b"not a picture", huge()], ids=["text", "huge"])
def test_a_file_that_is_no_picture_is_named(twin_of, data, content):
    (data / "b.jpg").write_bytes(content)
    with pytest.raises(CalibrationError, match=r"b\.jpg cannot be prepared"):
        picture_rows(twin_of("qwen3_vl", "bfloat16"), pictures_in(data))


@pytest.mark.parametrize("model_type", ["qwen3_vl", "gemma3", "minicpmv4_6"])
def test_moments_are_of_text_and_pictures(twin_of, data, tmp_path, monkeypatch, model_type):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = SimpleNamespace(statistics=None)
    finish = Store.finish

    def keep(self, parts):
        kept.statistics = finish(self, parts)
        return kept.statistics

    monkeypatch.setattr(Store, "finish", keep)
    folder = twin_of(model_type, "bfloat16")
    request = Request(
        hf_path=str(folder),
        mlx_path=tmp_path / "out",
        recipes=(recipe(data),),
        calibration_data=data,
    )
    done = convert(request, Console(quiet=True))[0]
    assert done.manifest.data["recipe"]["calibration"]["pictures"] == digest(pictures_in(data))

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    layer = model.get_decoder().layers[1].mlp.up_proj
    seen = []
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].double()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    windows = len(ids) // 16
    with torch.no_grad():
        for at in (0, windows // 2):
            model(input_ids=torch.tensor([ids[at * 16 : at * 16 + 16]]))
        for row in picture_rows(folder, pictures_in(data)):
            model(**row)
    assert [len(x) > 16 for x in seen] == [False, False, True, True]
    x = torch.cat(seen).numpy()
    (module,) = [n for n in kept.statistics.names if n.endswith("layers.1.mlp.up_proj")]
    found = kept.statistics[module]
    expected = diagonal_blocks(x.T @ x / len(x), found.shape[-1])
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.max())
