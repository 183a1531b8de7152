"""Grouped gated norms as transformers computes them, and the ways of pooling a sentence."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from validate.encoder import pool, pooling_mode
from validate.runtime import prepare_mlx

prepare_mlx()


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_mamba2s_norm_by_group_is_the_references(groups):
    import mlx.core as mx
    import torch
    from mlx_lm.models.mamba2 import MambaRMSNormGated
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated as Reference

    from validate.norm_faults import grouped_mamba2

    rng = np.random.default_rng(0)
    x, gate = (rng.normal(size=(1, 5, 64)).astype(np.float32) for _ in range(2))
    weight = rng.normal(size=64).astype(np.float32)
    stock = MambaRMSNormGated(64, eps=1e-3)
    stock.weight = mx.array(weight)
    mixer = SimpleNamespace(norm=stock)
    model = SimpleNamespace(backbone=SimpleNamespace(layers=[SimpleNamespace(mixer=mixer)]))
    [(patched, attribute, norm)] = grouped_mamba2(model, {"n_groups": groups})
    reference = Reference(64, group_size=64 // groups, eps=1e-3)
    reference.weight.data = torch.from_numpy(weight)
    wanted = reference(torch.from_numpy(x), torch.from_numpy(gate)).detach().numpy()
    assert (patched, attribute) == (mixer, "norm")
    np.testing.assert_allclose(np.array(norm(mx.array(x), mx.array(gate))), wanted, atol=1e-5)
    whole = np.array(stock(mx.array(x), mx.array(gate)))
    assert np.allclose(whole, wanted, atol=1e-4) == (groups == 1)


@pytest.mark.parametrize(
    ("mode", "wanted"), [("mean", [2, 3]), ("cls", [1, 0]), ("max", [3, 6]), ("lasttoken", [2, 3])]
)
def test_pooling_is_of_unit_length(mode, wanted):
    hidden = np.array([[1, 0], [3, 6], [2, 3]], np.float32)
    unit = np.array(wanted, np.float32) / np.linalg.norm(wanted)
    np.testing.assert_allclose(pool(hidden, mode), unit, rtol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "settings", "mode"),
    [
        ("bert", None, "mean"),
        ("qwen3", None, "lasttoken"),
        ("qwen3", {"pooling_mode_mean_tokens": True}, "mean"),
        ("bert", {"pooling_mode_lasttoken": True}, "lasttoken"),
    ],
)
def test_pooling_mode_is_stated_or_the_runtimes(tmp_path, model_type, settings, mode):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert pooling_mode(tmp_path) == mode
