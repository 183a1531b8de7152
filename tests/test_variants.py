"""Quantized outputs: several from one read, as mx.quantize and mlx_lm make them, and loadable."""

import json

import numpy as np
import pytest
from release_helpers import (
    FOUR_BIT,
    LLAMA,
    hashes,
    llama_tensors,
    make,
    same_bits,
    status,
    stored,
    write_release,
)

from arch_maps.facts import MAX_LAYERS
from converter.errors import UsageError
from converter.plan import Options
from quant.recipe import AFFINE_BITS, AFFINE_GROUP_SIZES, QuantSpec

MODES = ("mxfp4", "mxfp8", "nvfp4")
AFFINE = [(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES]
RECIPES = [("affine", *pair) for pair in AFFINE] + [(mode, None, None) for mode in MODES]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def lm_outputs(twin_of, runtimes, tmp_path_factory):
    """What mlx_lm.convert makes of a twin, by type and recipe."""
    root = tmp_path_factory.mktemp("mlx-lm")

    def get(model_type, mode, bits, group):
        from mlx_lm.convert import convert

        spec = QuantSpec.make(mode, bits, group)
        out = root / f"{model_type}-{mode}-{spec.bits}-{spec.group_size}"
        if not out.exists():
            convert(
                str(twin_of(model_type)),
                mlx_path=str(out),
                quantize=True,
                q_group_size=spec.group_size,
                q_bits=spec.bits,
                q_mode=mode,
            )
        return out

    return get


@pytest.fixture(scope="module")
def ours(twin_of, tmp_path_factory):
    """Our outputs of a twin for all recipes, from one read of it."""
    root = tmp_path_factory.mktemp("ours")
    made = {}

    def get(model_type, recipe):
        if model_type not in made:
            made[model_type] = {}
            for one in RECIPES:
                options = Options(quant=QuantSpec.make(*one, "mlx"))
                name = f"{model_type}-{'-'.join(map(str, one))}"
                [made[model_type][one]] = make(twin_of(model_type), root / name, options)
        return made[model_type][recipe]

    return get


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_method_mlx_gives_the_bits_of_mlx_lm(model_type, recipe, lm_outputs, ours):
    import mlx.core as mx

    theirs = mx.load(str(lm_outputs(model_type, *recipe) / "model.safetensors"))
    mine = mx.load(str(ours(model_type, recipe) / "model.safetensors"))
    assert mine.keys() == theirs.keys()
    assert sum(name.endswith(".scales") for name in mine) >= 8
    different = [
        name
        for name, x in theirs.items()
        if x.dtype != mine[name].dtype or not mx.array_equal(x, mine[name])
    ]
    assert different == []


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_stock_mlx_lm_loads_what_was_written(recipe, ours, runtimes):
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    out = ours("qwen3", recipe)
    model, config = load_model(out)
    written = mx.load(str(out / "model.safetensors"))
    loaded = dict(tree_flatten(model.parameters()))
    assert loaded.keys() == written.keys()
    assert all(mx.array_equal(loaded[name], x) for name, x in written.items())
    assert config["quantization"] == config["quantization_config"]
    spec = QuantSpec.make(*recipe)
    assert config["quantization"] == spec.to_config()
    assert list(config_of(out)["quantization"]) == ["group_size", "bits", "mode"]


def test_mixed_shapes_load_in_both_runtimes(twin_of, tmp_path, runtimes):
    """Groups of 32 beside rows that some groups do not divide, in mlx_lm.load and mlx_vlm."""
    from mlx_lm import load
    from mlx_vlm.utils import load as load_vlm

    [out] = make(twin_of("qwen3"), tmp_path / "out", FOUR_BIT)
    assert config_of(out)["quantization"] == config_of(out)["quantization_config"]
    model, tokenizer = load(str(out))
    ids = tokenizer.encode("hello")
    import mlx.core as mx

    logits = model(mx.array([ids]))
    assert np.isfinite(np.array(logits)).all()
    vlm, _ = load_vlm(str(out))
    again = vlm(mx.array([ids]))
    again = getattr(again, "logits", again)
    assert np.abs(np.array(again) - np.array(logits)).max() < 1e-4


def test_mixed_recipe_has_an_entry_for_each_module_that_differs(tinylm, tmp_path, runtimes):
    from mlx_lm.utils import load_model

    recipe = Options(quant=QuantSpec.make("affine", 4, 64), predicate="mixed_4_6")
    [out] = make(tinylm, tmp_path / "out", recipe)
    config = config_of(out)
    assert config["quantization"] == config["quantization_config"]
    tensors = stored(out)
    sixes = 0
    for name, scales in tensors.items():
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            entry = {**config["quantization"], **config["quantization"].get(module, {})}
            weight = tensors[f"{module}.weight"]
            assert weight.shape[-1] * 32 == scales.shape[-1] * 64 * entry["bits"]
            assert entry["mode"] == "affine"
            sixes += entry["bits"] == 6
    assert 0 < sixes < 42
    model, _ = load_model(out)
    assert model.model.layers[0].mlp.down_proj.bits in (4, 6)


def test_variants_are_the_single_runs_byte_for_byte(tmp_path, monkeypatch):
    source = write_release(tmp_path / "in" / "m", LLAMA)
    names = ["bf16", "fp16", "fp32", "8bit", "4bit", "3bit", *MODES]
    common = ("--no-validate", "--quiet")
    monkeypatch.setattr("sys.argv", ["convert"])
    many = tmp_path / "many"
    flags = ("--hf-path", source, "--mlx-path", many, "--variants", ",".join(names))
    assert status(*flags, *common) == 0
    assert sorted(p.name for p in many.iterdir()) == sorted(f"m-{name}" for name in names)
    dtypes = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    for name in names:
        single = ("--dtype", dtypes[name]) if name in dtypes else ("-q", "--q-mode", name)
        if name.endswith("bit"):
            single = ("-q", "--q-bits", name[0])
        out = tmp_path / f"single-{name}"
        assert status("--hf-path", source, "--mlx-path", out, *single, *common) == 0
        assert hashes(out) == hashes(many / f"m-{name}"), name


def test_source_is_read_once_for_all_variants(tmp_path, monkeypatch):
    from converter.source import Reader

    read = []
    original = Reader.read_rows
    monkeypatch.setattr(
        Reader, "read_rows", lambda self, *rows: read.append(rows) or original(self, *rows)
    )
    source = write_release(tmp_path / "in")
    make(source, tmp_path / "out", Options(), FOUR_BIT, Options(dtype="float32"))
    assert len(read) == len(set(read)) == len(llama_tensors(LLAMA))


def test_same_variant_twice(tmp_path, capsys):
    source = write_release(tmp_path / "in")
    flags = ("--hf-path", source, "--mlx-path", tmp_path / "out", "--no-validate")
    assert status(*flags, "--variants", "4bit,4bit") == 2
    assert "two of them are the same" in capsys.readouterr().err
    with pytest.raises(UsageError):
        make(source, tmp_path / "out", FOUR_BIT, FOUR_BIT)


def test_pickles_give_the_same_weights(tmp_path):
    import torch

    tensors = llama_tensors(LLAMA)
    safe = write_release(tmp_path / "in" / "safe")
    pickled = write_release(tmp_path / "in" / "pickled")
    (pickled / "model.safetensors").unlink()
    state = {
        name: torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16)
        for name, x in tensors.items()
    }
    torch.save(state, pickled / "pytorch_model.bin")
    for recipe in (Options(), FOUR_BIT):
        name = recipe.suffix
        [one] = make(safe, tmp_path / f"one-{name}", recipe)
        [two] = make(pickled, tmp_path / f"two-{name}", recipe)
        a, b = hashes(one), hashes(two)
        a.pop("conversion.json")
        b.pop("conversion.json")
        assert a == b


def test_dtype_casts_as_torch_does(tmp_path):
    import torch

    tensors = llama_tensors(LLAMA, np.float32)
    source = write_release(tmp_path / "in", LLAMA | {"dtype": "float32"}, tensors)
    for name, code in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        [out] = make(source, tmp_path / name, Options(dtype=name))
        config = config_of(out)
        assert (config["dtype"], config["torch_dtype"]) == (name, name)
        for key, x in stored(out).items():
            expected = torch.from_numpy(tensors[key]).to(code).view(torch.uint16).numpy()
            assert same_bits(x.view(np.uint16), expected), key


def test_plan_of_the_largest_model_takes_seconds():
    """37 thousand tensors: a bound that only something quadratic breaks, not a benchmark."""
    import time

    from release_plans import plan_llama

    plan_llama(4)
    started = time.process_time()
    plan = plan_llama(MAX_LAYERS)
    assert len(plan.outputs) == 9 * MAX_LAYERS + 3
    assert plan.hash
    assert time.process_time() - started < 5
