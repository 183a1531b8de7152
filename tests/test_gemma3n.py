"""Gemma 3n: layers that share keys, two runtimes' names, and pictures that stock mlx-vlm turns."""

from types import SimpleNamespace

import numpy as np
import pytest
from header_fixtures import fixtures, source_of

from arch_maps.ops import Constant
from arch_maps.registry import find
from converter.errors import PlanError
from converter.plan import Options, build_plan
from converter.plan.match import match_release
from quant.recipe import QuantSpec
from validate.torch_faults import mend, unbuilt

SHARED = tuple(f"model.language_model.layers.{index}.self_attn." for index in range(20, 30))
KEYS = ("k_proj.weight", "v_proj.weight", "k_norm.weight")


@pytest.fixture(scope="module")
def release():
    return next(fixture for fixture in fixtures() if fixture.model_type == "gemma3n")


def without_shared_keys(release):
    unused = tuple(f"{layer}{name}" for layer in SHARED for name in KEYS)
    return {name: info for name, info in release.tensors.items() if name not in unused}


def test_keys_that_transformers_5_leaves_out_are_filled(release):
    saved = source_of(release.config, without_shared_keys(release))
    match = match_release(saved, find("gemma3n"))
    filled = [rule.target for rule in match.rules if isinstance(rule.expr, Constant)]
    assert match.layout.name == "transformers 5"
    assert sorted(filled) == sorted(f"{layer}{name}" for layer in SHARED for name in KEYS)
    published = match_release(release.source(), find("gemma3n"))
    assert not any(isinstance(rule.expr, Constant) for rule in published.rules)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_config", "intermediate_size", [8192] * 29 + [4096]),
        ("text_config", "num_kv_shared_layers", 26),
        ("text_config", "activation_sparsity_pattern", [1.5] * 30),
        ("vision_config", "architecture", "resnet50"),
        ("audio_config", "sscp_conv_stride_size", [[2, 2], [1, 1]]),
    ],
)
def test_what_the_runtimes_cannot_compute_is_named(release, section, key, value):
    config = {**release.config, section: {**release.config[section], key: value}}
    source = source_of(config, release.tensors)
    with pytest.raises(PlanError, match=key):
        build_plan(source, match_release(source, find("gemma3n")), Options())


def test_a_module_of_its_own_precision_has_the_name_that_each_runtime_looks_up(release):
    options = Options(quant=QuantSpec.make("affine", 4, 64), predicate="mixed_4_6")
    source = release.source()
    entries = build_plan(source, match_release(source, find("gemma3n")), options).config[
        "quantization"
    ]
    named = {name: own for name, own in entries.items() if isinstance(own, dict)}
    ours = {name for name in named if name.startswith("model.language_model.")}
    assert ours
    for name in ours:
        assert named[name.replace("model.language_model.", "model.", 1)] == named[name]
    assert len(named) == 2 * len(ours)


def test_the_class_is_built_without_the_tower_that_timm_lacks():
    import torch
    import transformers

    if not unbuilt("gemma3n"):
        return  # timm is here: the class builds its tower
    mend("gemma3n")
    text = {"num_hidden_layers": 5, "num_kv_shared_layers": 0, "hidden_size": 8}
    with torch.device("meta"):
        settings = transformers.Gemma3nConfig.from_dict({"text_config": text})
        names = transformers.Gemma3nForConditionalGeneration(settings).state_dict()
    assert not any(name.startswith(unbuilt("gemma3n")) for name in names)
    assert any(name.startswith("model.audio_tower.") for name in names)


@pytest.mark.usefixtures("runtimes")
def test_mlx_vlm_hands_pictures_over_column_by_column():
    """The fault that the map's remarks state; where it is mended, pictures can be judged."""
    import mlx.core as mx
    from mlx_vlm.models.gemma3n.gemma3n import Model
    from mlx_vlm.models.gemma3n.vision import MobileNetV5MultiScaleFusionAdapter

    adapter = MobileNetV5MultiScaleFusionAdapter([6], 4, 16)
    sizes = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=4), vision_soft_tokens_per_image=256
    )
    fine = np.ones((1, 48, 48, 4), np.float32)
    marked = fine.copy()
    marked[0, :3, 45:, 0] = 9.0  # row 0, column 15 of 16

    def tokens(pixels):
        coarse = mx.ones((1, 24, 24, 2))
        found = Model.get_image_features(
            pixels,
            lambda one, **_: adapter([mx.array(one), coarse]),
            sizes,
            lambda inputs_embeds: inputs_embeds,
        )
        return np.array(found[0])

    (where,) = np.nonzero(np.abs(tokens(fine) - tokens(marked)).max(axis=-1) > 1e-4)
    assert list(where) == [15 * 16]
