import pytest

from arch_maps.dtypes import CODES
from quant.mixed import MIXED_RECIPES, MLX_LM_RECIPES, mixed_recipe
from quant.recipe import QuantSpec


def test_defaults_are_filled_in_by_the_mode():
    assert QuantSpec.make("affine") == QuantSpec("affine", 4, 64, "rtn")
    assert QuantSpec.make("affine", 3, 128, "mlx") == QuantSpec("affine", 3, 128, "mlx")
    assert QuantSpec.make("mxfp4") == QuantSpec("mxfp4", 4, 32)
    assert QuantSpec.make("mxfp8") == QuantSpec("mxfp8", 8, 32)
    assert QuantSpec.make("nvfp4") == QuantSpec("nvfp4", 4, 16)
    assert QuantSpec.make("mxfp8").to_config() == {"group_size": 32, "bits": 8, "mode": "mxfp8"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mxfp4", 8), "--q-bits 8 contradicts --q-mode mxfp4, which takes 4"),
        (("nvfp4", 4, 32), "--q-group-size 32 contradicts --q-mode nvfp4, which takes 16"),
        (("affine", 7), "--q-bits 7 contradicts --q-mode affine, which takes 2, 3, 4, 5, 6 or 8"),
        (("affine", 4, 16), "--q-group-size 16 contradicts --q-mode affine, which takes 32, 64 or"),
        (("int4",), "--q-mode int4 is unknown; choose one of affine, mxfp4, mxfp8, nvfp4"),
        (("affine", 4, 64, "awq"), "--q-method awq is unknown here; choose one of rtn, mlx"),
    ],
)
def test_contradictions_name_the_flag(arguments, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        QuantSpec.make(*arguments)


@pytest.mark.parametrize(
    ("spec", "dtype", "expected"),
    [
        (QuantSpec.make("affine", 4, 64), "BF16", 4.5),
        (QuantSpec.make("affine", 4, 64), "F32", 5.0),
        (QuantSpec.make("affine", 3, 32), "F16", 4.0),
        (QuantSpec.make("affine", 8, 128), "BF16", 8.25),
        (QuantSpec.make("mxfp4"), "BF16", 4.25),
        (QuantSpec.make("mxfp8"), "F32", 8.25),
        (QuantSpec.make("nvfp4"), "BF16", 4.5),
    ],
)
def test_bits_per_weight_counts_scales_and_biases(spec, dtype, expected):
    assert spec.bits_per_weight(dtype) == expected


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("shape", [(8, 128), (3, 8, 128)])
def test_output_tensors_are_what_mlx_returns(mode, shape):
    import mlx.core as mx
    import numpy as np

    spec = QuantSpec.make(mode)
    stock = mx.quantize(mx.zeros(shape, mx.float16), mode=mode)
    got = spec.output_tensors(shape, "F16")
    assert list(got) == ["weight", "scales", "biases"][: len(stock)]
    assert list(got.values()) == [(CODES[np.array(x).dtype], x.shape) for x in stock]
    stored = sum(np.array(x).nbytes for x in stock)
    assert stored * 8 / np.prod(shape) == spec.bits_per_weight("F16")


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="a row of 96 does not divide into groups of 64; choose"):
        QuantSpec.make("affine").output_tensors((4, 96), "BF16")


class Tiny:
    """A tiny stock model of 11 layers: every branch of the recipes at some layer."""

    def __init__(self, package: str, model_type: str = "llama") -> None:
        config = {
            "model_type": model_type,
            "hidden_size": 64,
            "num_hidden_layers": 11,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "vocab_size": 64,
            "tie_word_embeddings": False,
        }
        import importlib

        module = importlib.import_module(f"{package}.models.{model_type}")
        if hasattr(module, "ModelArgs"):
            self.model = module.Model(module.ModelArgs.from_dict(config))
        else:
            self.model = module.Model(module.ModelConfig.from_dict(config))
        self.modules = [(p, m) for p, m in self.model.named_modules() if hasattr(m, "to_quantized")]
        self.paths = [path for path, _ in self.model.named_modules()]


@pytest.mark.parametrize("name", sorted(MLX_LM_RECIPES))
@pytest.mark.parametrize("group_size", [32, 64])
def test_mixed_recipes_equal_stock_mlx_lm(name, group_size):
    from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

    assert sorted(MLX_LM_RECIPES) == sorted(QUANT_RECIPES)
    tiny = Tiny("mlx_lm")
    stock = mixed_quant_predicate_builder(name, tiny.model, group_size)
    ours = mixed_recipe(
        name, module_paths=tiny.paths, num_layers=11, group_size=group_size, runtime="mlx-lm"
    )
    got = {path: ours(path).to_config() for path, _ in tiny.modules}
    assert got == {path: stock(path, module) for path, module in tiny.modules}
    assert len({config["bits"] for config in got.values()}) == 2
    assert len(got) == 11 * 7 + 2


@pytest.mark.parametrize("name", sorted(MIXED_RECIPES))
def test_mixed_recipes_equal_stock_mlx_vlm(name):
    from mlx_vlm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

    assert sorted(MIXED_RECIPES) == sorted(QUANT_RECIPES)
    tiny = Tiny("mlx_lm")
    stock = mixed_quant_predicate_builder(name, tiny.model)
    ours = mixed_recipe(name, module_paths=tiny.paths, num_layers=11)
    got = {path: ours(path).to_config() for path, _ in tiny.modules}
    expected = {path: stock(path, module) | {"mode": "affine"} for path, module in tiny.modules}
    assert got == expected
    assert got["model.embed_tokens"]["bits"] == got["lm_head"]["bits"] == MIXED_RECIPES[name][1]


def test_mixed_recipes_refuse_what_stock_refuses():
    with pytest.raises(ValueError, match="mixed_3_5 is not a recipe of mlx-lm; choose one of mi"):
        mixed_recipe("mixed_3_5", module_paths=[], num_layers=2, runtime="mlx-lm")
    with pytest.raises(ValueError, match="--quant-predicate mixed_3_6 contradicts --q-mode mxfp4"):
        mixed_recipe("mixed_3_6", module_paths=[], num_layers=2, mode="mxfp4")
    with pytest.raises(ValueError, match=r"needs down projections .* and the model has none"):
        mixed_recipe("mixed_3_6", module_paths=["encoder.0.fc2"], num_layers=2)
