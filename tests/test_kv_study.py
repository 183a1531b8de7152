"""The KV study: allocation, what it writes, and what it refuses."""

import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from quant.kv.measure import baseline, forward_of, loss
from quant.kv.runtime import caches, own_caches
from quant.kv.scan import (
    LayerFacts,
    Sensitivity,
    allocate,
    allocated_spec,
    effective_bits,
    static_scan,
)
from quant.kv.spec import KvSpec
from quant.kv.turbo import KvError

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.usefixtures("runtimes")


def layers(count, dim=128, **given):
    return [
        LayerFacts(index=i, cache="KVCache", key_dim=dim, value_dim=dim, **given)
        for i in range(count)
    ]


def curves(facts, weight):
    """Losses that fall fourfold a bit, as rate-distortion has it, scaled by ``weight``."""
    found = Sensitivity("turboquant")
    for fact in facts:
        for role in ("key", "value"):
            for bits in (2, 3, 4, 5, 6, 8):
                found.kl[fact.index, role, bits] = weight(fact.index, role) * 4.0**-bits
    return found


def test_equal_layers_get_equal_bits_within_the_budget():
    facts = layers(4)
    chosen = allocate(facts, curves(facts, lambda *_: 1.0), bits=4.125)
    assert set(chosen.values()) == {4}
    assert effective_bits(allocated_spec(facts, chosen), facts) == pytest.approx(4.125)


def test_allocation_is_the_best_of_all():
    """Against every combination of widths for two layers."""
    from itertools import product

    facts = layers(2)
    weight = {(0, "key"): 900.0, (0, "value"): 1.0, (1, "key"): 30.0, (1, "value"): 4.0}
    measured = curves(facts, lambda layer, role: weight[layer, role])
    for budget in (2.625, 3.375, 4.125, 5.125):
        chosen = allocate(facts, measured, bits=budget)
        paid = sum(bits + 0.125 if bits < 16 else 16 for bits in chosen.values()) / 4
        assert paid <= budget
        found = sum(measured.kl.get((*place, bits), 0.0) for place, bits in chosen.items())
        best = min(
            sum(
                measured.kl.get((*place, bits), 0.0)
                for place, bits in zip(weight, widths, strict=True)
            )
            for widths in product((2, 3, 4, 5, 6, 8, 16), repeat=4)
            if sum(bits + 0.125 if bits < 16 else 16 for bits in widths) / 4 <= paid
        )
        # Greedy on the hull is the best for what it spends.
        assert found == pytest.approx(best)


def test_a_layer_that_minds_gets_more():
    facts = layers(3)
    chosen = allocate(
        facts, curves(facts, lambda i, r: 1e4 if (i, r) == (1, "key") else 1.0), bits=4
    )
    assert chosen[1, "key"] > max(bits for place, bits in chosen.items() if place != (1, "key"))


def test_too_few_bits_are_refused():
    facts = layers(2)
    with pytest.raises(KvError, match=r"2 bits are too few: the narrowest choice has 2\.125"):
        allocate(facts, curves(facts, lambda *_: 1.0), bits=2)


@pytest.fixture(scope="module")
def spiked(twin_of):
    """A Qwen2 twin with the massive key bias that its releases have in a layer."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(twin_of("qwen2"))
    model.set_dtype(mx.float32)
    projection = model.layers[1].self_attn.k_proj
    bias = np.zeros(projection.bias.shape, np.float32)
    bias[[7, 11]] = 700.0, -560.0
    projection.bias = mx.array(bias)
    return model


def test_a_planted_spike_is_seen_and_survived(spiked):
    facts = static_scan(spiked)
    assert [fact.spike for fact in facts].index(True) == 1
    assert facts[1].key_bias == pytest.approx(np.hypot(700, 560), rel=1e-4)
    from quant.kv.scan import sensitivity, spec_for
    from quant.kv.spec import TensorSpec

    ids = [int(i) for i in np.random.default_rng(0).integers(5, 500, 320)]
    measured = sensitivity(spiked, facts, ids[:192])
    auto = allocated_spec(facts, allocate(facts, measured, bits=4.0))
    forward = forward_of(spiked)
    exact = baseline(forward, own_caches(spiked), ids, chunk=64, start=64)
    plain = TensorSpec(scheme="uniform", bits=4, group=32)
    uniform = spec_for(facts, lambda _: (plain, plain), subtract_mean=False)
    assert effective_bits(auto, facts) <= 4.0 < effective_bits(uniform, facts)
    ours, stock = (
        loss(forward, caches(spiked, spec), exact)["prefill"] for spec in (auto, uniform)
    )
    assert ours.kl_mean < stock.kl_mean
    assert ours.kl_mean < 0.1


def test_sliding_layers_stay_as_they_are(twin_of):
    from mlx_lm.utils import load_model

    model, _ = load_model(twin_of("gemma3_text"))
    facts = static_scan(model)
    reasons = {fact.cache: fact.reason for fact in facts}
    assert "stays as it is" in reasons["RotatingKVCache"]
    assert reasons["KVCache"] == ""


def test_attention_with_sinks_stays_in_float(twin_of, tmp_path):
    """Its runtime refuses quantized caches, which the scan finds by asking."""
    from mlx_lm.utils import load_model

    from converter.pipeline import Request, convert
    from converter.ui import Console

    out = tmp_path / "out"
    convert(Request(hf_path=str(twin_of("gpt_oss")), mlx_path=out), Console(quiet=True))
    model, _ = load_model(out)
    assert not any(fact.quantizable for fact in static_scan(model))


@pytest.mark.parametrize("runtime", ["mlx_lm", "mlx_vlm"])
def test_stock_caches_unpacked_compute_what_their_kernel_does(runtime, output):
    import mlx.core as mx

    from quant.kv.runtime import dense_on_cpu
    from validate.runtime import MlxRuntime

    model = MlxRuntime.load(output, runtime=runtime)
    model.to_float32(dense=True)
    language = getattr(model.model, "language_model", model.model)
    forward, made = forward_of(language), []
    for dense in (False, True):
        caches_of = own_caches(language)
        forward(mx.array([list(range(5, 69))]), caches_of)
        caches_of = [cache.to_quantized(group_size=64, bits=4) for cache in caches_of]
        if dense:
            with dense_on_cpu(runtime):
                made.append(np.array(forward(mx.array([[7, 8, 9]]), caches_of)))
        else:
            made.append(np.array(forward(mx.array([[7, 8, 9]]), caches_of)))
    assert np.abs(made[0] - made[1]).max() < 1e-4 * np.abs(made[0]).max()


# The command


@pytest.fixture
def output(tinylm_output):
    return tinylm_output


@pytest.fixture
def brief(monkeypatch):
    """Texts of a few chunks, so that the study of a whole model takes seconds."""
    import quant.kv.study as module

    monkeypatch.setattr(module, "SHORT", 128)
    monkeypatch.setattr(module, "LONG", 320)


@pytest.mark.usefixtures("brief")
def test_settings_are_written_measured_and_vouched_for(output, tmp_path):
    from converter.kv import study_output, summary_text
    from converter.manifest import verify
    from converter.publish import write_card
    from converter.ui import Console

    out = tmp_path / "out"
    shutil.copytree(output, out)
    report = study_output(
        out, scheme="turboquant", bits=4, group=None, text=None, console=Console(quiet=True)
    )
    verify(out)
    config = json.loads((out / "config.json").read_text())["kv_cache_quantization"]
    schema = json.loads((DOCS / "kv_cache_quantization.schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "schema": 2}, schema)
    spec = KvSpec.from_json(config)
    assert {layer.key.bits for layer in spec.layers} == {4}
    assert config["effective_bits"] == 4.25
    assert json.loads((out / "kv_cache.json").read_text()) == report
    chosen = report["chosen"]["long"]
    for part in ("prefill", "decode"):
        assert chosen[part]["all"]["kl_mean"] < 2e-3
        assert chosen[part]["keys only"]["kl_mean"] + chosen[part]["values only"]["kl_mean"] > 0
    assert chosen["decode"]["all"]["positions"] == 32
    measured = {row["flags"]: row for row in report["stock"] if "error" not in row}
    assert any("turboquant" in flags for flags in measured)
    assert report["flags"][0]["kl_mean"] == min(
        row["long"]["decode"]["all"]["kl_mean"] for row in measured.values()
    )
    assert "turboquant" in summary_text(report)
    card = write_card(out).read_text()
    assert "## KV cache" in card
    assert "--kv-bits 4 --kv-group-size 64" in card
    # The stock runtimes still load it: they do not read the new key.
    from validate.runtime import MlxRuntime

    for runtime in ("mlx_lm", "mlx_vlm"):
        MlxRuntime.load(out, runtime=runtime)


def test_a_text_too_short_to_tell_is_refused_and_nothing_changes(output, tmp_path):
    from converter.errors import ConvertError
    from converter.kv import study_output
    from converter.ui import Console

    text = tmp_path / "short.txt"
    text.write_text("Too short to tell.")
    before = (output / "config.json").read_bytes()
    with pytest.raises(ConvertError, match="tokens of text: a KV study needs 256"):
        study_output(
            output, scheme="auto", bits=4, group=None, text=text, console=Console(quiet=True)
        )
    assert (output / "config.json").read_bytes() == before
    assert not (output / "kv_cache.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-bits", "4"], "--kv-bits without --kv-quant-scheme"),
        (["--kv-quant-scheme", "auto", "--kv-bits", "9"], "--kv-bits 9: 1 to 8"),
        (["--kv-quant-scheme", "uniform", "--kv-bits", "3.5"], "uniform caches have 2, 3, 4"),
        (["--kv-quant-scheme", "turboquant", "--kv-group-size", "64"], "has no groups"),
    ],
)
def test_contradictory_flags_are_usage_errors(flags, message, tinylm, tmp_path, capfd):
    from converter.cli.app import cli
    from converter.cli.errors import run

    arguments = ["--hf-path", str(tinylm), "--mlx-path", str(tmp_path / "out"), *flags]
    assert run(lambda: cli.main(arguments, standalone_mode=False)) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
