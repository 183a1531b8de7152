"""Quality statistics against their formulas written out, and outputs set side by side."""

import json
import math

import numpy as np
import pytest
from release_helpers import make, status, write_release

from converter.comparing import Comparison, compare
from converter.errors import ConvertError, UsageError
from converter.plan import Options
from converter.ui import Console
from quant.recipe import QuantSpec
from validate.charts import BOTTOM, HEIGHT, TOP, layer_chart, pareto_chart
from validate.compare_report import comparison_html, layer_errors
from validate.evaluation import default_text, windows_of
from validate.quality import joined, score, sqnr, statistics
from validate.reference import ReferenceError

QUIET = Console(quiet=True)


def distribution(logits):
    """Probabilities, one plain number at a time."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


@pytest.fixture(scope="module")
def scored():
    """Random logits of two models, and the figures of each token written out in plain Python."""
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((40, 7)) * 2
    logits = reference + rng.standard_normal((40, 7)) * 0.5
    targets = rng.integers(0, 7, 40)
    rows = []
    for a, b, target in zip(reference.tolist(), logits.tolist(), targets.tolist(), strict=True):
        p, q = distribution(a), distribution(b)
        rows.append(
            {
                "base": -math.log(p[target]),
                "nll": -math.log(q[target]),
                "kl": sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)),
                "agree": a.index(max(a)) == b.index(max(b)),
                "moved": q[target] - p[target],
            }
        )
    halves = [
        score(reference[i : i + 20], logits[i : i + 20], targets[i : i + 20]) for i in (0, 20)
    ]
    return joined(halves), {key: [row[key] for row in rows] for key in rows[0]}


def mean(values):
    return sum(values) / len(values)


def standard_error(values):
    """llama.cpp's mean_and_uncertainty: sqrt((E[x^2] - E[x]^2) / (n - 1))."""
    n = len(values)
    return math.sqrt((mean([v * v for v in values]) - mean(values) ** 2) / (n - 1))


def test_figures_of_each_token(scored):
    tokens, rows = scored
    for name, values in rows.items():
        assert np.allclose(getattr(tokens, name), values, atol=1e-12), name


def test_perplexity_and_its_ratio(scored):
    tokens, rows = scored
    found, nll, base = statistics(tokens), rows["nll"], rows["base"]
    n = len(nll)
    assert found["perplexity"] == pytest.approx(math.exp(mean(nll)))
    expected = math.exp(mean(nll)) * standard_error(nll)
    assert found["perplexity_error"] == pytest.approx(expected)
    # llama.cpp: ln(PPL(Q)/PPL(base)), its covariance mean_x_y - mean_x * mean_y over n - 1.
    covariance = (
        mean([x * y for x, y in zip(nll, base, strict=True)]) - mean(nll) * mean(base)
    ) / (n - 1)
    error = math.sqrt(standard_error(nll) ** 2 + standard_error(base) ** 2 - 2 * covariance)
    ratio = math.exp(mean(nll) - mean(base))
    assert found["perplexity_ratio"] == pytest.approx(ratio)
    assert found["perplexity_ratio_error"] == pytest.approx(ratio * error)


def test_divergences_and_probabilities(scored):
    tokens, rows = scored
    found, kl = statistics(tokens), sorted(rows["kl"])
    assert found["kl_mean"] == pytest.approx(mean(kl))
    assert found["kl_mean_error"] == pytest.approx(standard_error(kl))
    assert found["kl_max"] == pytest.approx(kl[-1])
    for name, share in (("kl_median", 0.5), ("kl_p90", 0.9), ("kl_p99", 0.99), ("kl_p999", 0.999)):
        at = share * (len(kl) - 1)  # llama.cpp's percentile: linear between neighbours
        low = int(at)
        between = (1 - (at - low)) * kl[low] + (at - low) * kl[min(low + 1, len(kl) - 1)]
        assert found[name] == pytest.approx(between), name
    same = mean([float(v) for v in rows["agree"]])
    assert found["top1"] == pytest.approx(same)
    assert found["top1_error"] == pytest.approx(math.sqrt(same * (1 - same) / (len(kl) - 1)))
    squares = [v * v for v in rows["moved"]]
    rms = math.sqrt(mean(squares))
    assert found["moved_rms"] == pytest.approx(rms)
    assert found["moved_rms_error"] == pytest.approx(0.5 / rms * standard_error(squares))


def test_the_same_model_loses_nothing():
    logits = np.random.default_rng(1).standard_normal((9, 5))
    found = statistics(score(logits, logits, np.zeros(9, int)))
    assert (found["kl_max"], found["perplexity_ratio"], found["top1"]) == (0, 1, 1)
    assert (found["perplexity_ratio_error"], found["moved_rms_error"]) == (0, 0)
    with pytest.raises(ValueError, match="two scored tokens"):
        statistics(score(logits[:1], logits[:1], [0]))


def test_noise_in_decibels():
    assert sqnr(100.0, 1.0) == pytest.approx(20)
    assert sqnr(1.0, 0.0) == math.inf


def test_windows_are_spread_over_the_text():
    ids = list(range(1000))
    assert [w[0] for w in windows_of(ids, length=100, count=4)] == [0, 200, 500, 700]
    assert windows_of(ids[:70], length=100) == [ids[:70]]
    with pytest.raises(ReferenceError, match="at least 64"):
        windows_of(ids[:63])
    from quant.calibrate.text import read_text

    shared = set(default_text().splitlines()) & set(read_text(None).splitlines())
    assert shared <= {""} | {line for line in shared if len(line) < 25}


def test_front_of_the_best():
    points = [("a", 2.0, 0.1, False), ("b", 3.0, 0.2, True), ("c", 4.0, 0.001, False)]
    chart = pareto_chart([*points, ("zero", 16.0, 0.0, False)], title="t", x_label="x")
    assert [(dot.name, dot.colour, dot.hollow) for dot in chart.dots] == [
        ("a", 0, False),
        ("b", 1, True),
        ("c", 2, False),
    ]
    corners = [tuple(map(float, point.split(","))) for point in chart.front.split()]
    a, _, c = chart.dots
    assert corners == [(a.x, a.y), (c.x, a.y), (c.x, c.y)]
    assert TOP <= c.y <= HEIGHT - BOTTOM
    assert a.y < c.y  # less loss lies lower
    assert pareto_chart([("zero", 1.0, 0.0, False)], title="t", x_label="x") is None


def test_errors_add_up_by_layer():
    tensors = {
        "model.layers.0.a.weight": {"signal": 3.0, "noise": 1.0},
        "model.layers.0.b.weight": {"signal": 1.0, "noise": 1.0},
        "model.layers.2.a.weight": {"signal": 8.0, "noise": 2.0},
        "head.weight": {"signal": 1.0, "noise": 1.0},
    }
    assert layer_errors(tensors) == [0.5, 0.0, 0.25]
    chart = layer_chart([("x", layer_errors(tensors)), ("y", [])], title="t", x_label="layer")
    assert [line.name for line in chart.lines] == ["x"]


@pytest.fixture(scope="module")
def outputs(tinylm, tmp_path_factory):
    """tinylm in one stock recipe and in uniform 4 bits."""
    root = tmp_path_factory.mktemp("compared")
    mixed = Options(quant=QuantSpec.make("affine", 4), predicate="mixed_3_6")
    return (
        make(tinylm, root / "mixed", mixed)[0],
        make(tinylm, root / "uniform", Options(quant=QuantSpec.make("affine", 4, 64)))[0],
    )


@pytest.fixture(scope="module")
def report(outputs, tinylm, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "eval.txt"
    text.write_text((tinylm / "eval.txt").read_text()[:3000])
    given = Comparison(outputs=outputs, hf_path=str(tinylm), text=text, length=128, windows=4)
    return compare(given, QUIET)


def test_outputs_stand_beside_plain_rounding_of_their_size(report, outputs):
    by_name = {row["name"]: row for row in report["rows"]}
    assert list(by_name) == sorted(by_name, key=lambda name: by_name[name]["bytes"])
    assert by_name["uniform"]["control_name"] == "uniform"  # it is plain rounding itself
    assert by_name["uniform"]["kl_of_control"] == 1
    control = by_name[by_name["mixed"]["control_name"]]
    assert control["control"]
    assert abs(control["bytes"] / by_name["mixed"]["bytes"] - 1) < 0.1
    for out, name in zip(outputs, ("mixed", "uniform"), strict=True):
        manifest = json.loads((out / "conversion.json").read_text())
        assert round(by_name[name]["bits_per_weight"], 4) == manifest["bits_per_weight"]


def test_rows_hold_what_the_stock_runtime_computes(report, outputs, tinylm, runtimes, tmp_path):
    """torch for the release, stock mlx-lm on the packed file, unpacked to float32."""
    import torch
    from mlx_lm.utils import compute_bits_per_weight
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from validate.runtime import MlxRuntime

    ids = AutoTokenizer.from_pretrained(tinylm)((tinylm / "eval.txt").read_text()[:3000])
    windows = windows_of(ids["input_ids"], length=128, count=4)
    model = AutoModelForCausalLM.from_pretrained(tinylm, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(windows)).logits[:, 64:-1]
    packed = MlxRuntime.load(outputs[0], runtime="mlx_lm")
    bits = compute_bits_per_weight(packed.model)
    packed.to_float32(dense=True)
    other = np.stack([packed.logits(window)[64:-1] for window in windows])
    p, q = (x.double().log_softmax(-1) for x in (logits, torch.from_numpy(other)))
    kl = (p.exp() * (p - q)).sum(-1)
    row = next(row for row in report["rows"] if row["name"] == "mixed")
    assert row["bits_per_weight"] == pytest.approx(bits, rel=1e-9)
    assert row["tokens"] == kl.numel() == 4 * 63
    assert row["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-4)
    targets = torch.tensor(windows)[:, 65:, None]
    for key, logs in (("perplexity_base", p), ("perplexity", q)):
        expected = float(-logs.gather(-1, targets).mean())
        assert math.log(row[key]) == pytest.approx(expected, rel=1e-5)
    name = "model.layers.2.mlp.down_proj"
    signal = load_file(tinylm / "model.safetensors")[f"{name}.weight"].double()
    written = torch.from_numpy(np.array(packed.parameters()[f"{name}.weight"])).double()
    expected = 10 * math.log10(float(signal.square().sum() / (signal - written).square().sum()))
    assert row["tensors"][f"{name}.weight"]["sqnr"] == pytest.approx(expected, abs=1e-3)


def test_the_page_is_whole_and_escapes_what_it_shows(report):
    rows = [dict(row) for row in report["rows"]]
    rows[0]["name"] = "<script>alert(1)</script>"
    page = comparison_html({**report, "rows": rows})
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "prefers-color-scheme: dark" in page
    assert page.count('role="img"') == 2
    assert "http" not in page


def test_command_prints_tables_and_writes_the_page(
    report, outputs, tinylm, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("converter.comparing.compare", lambda given, console: report)
    html = tmp_path / "page.html"
    assert status("compare", *outputs, "--hf-path", tinylm, "--html", html) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert all(word in shown for word in ("mixed", "RTN 4-bit", "KL mean", "±", "p99.9"))
    assert html.read_text().startswith("<!DOCTYPE html>")
    assert status("compare", *outputs, "--hf-path", tinylm, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["kl_mean"] > 0


def test_what_cannot_be_compared(outputs, tinylm, tmp_path):
    def attempt(*folders, **settings):
        given = {"hf_path": str(tinylm), "length": 64, "windows": 1} | settings
        compare(Comparison(outputs=folders, **given), QUIET)

    with pytest.raises(UsageError, match="no checkpoint"):
        attempt(tmp_path)
    with pytest.raises(UsageError, match="say what it is"):
        attempt(*outputs, hf_path=None)
    with pytest.raises(UsageError, match="--text"):
        attempt(outputs[0], text=tmp_path / "absent")
    other = write_release(tmp_path / "other")
    with pytest.raises(UsageError, match="from other files"):
        attempt(outputs[0], hf_path=str(other))
    short = tmp_path / "short.txt"
    short.write_text("few words")
    with pytest.raises(ConvertError, match="at least 64 are needed"):
        attempt(outputs[0], text=short)
    with pytest.raises(UsageError, match="given twice"):
        attempt(outputs[0], outputs[0])
