"""Allocation: the knapsack against brute force, the losses against the model, real checkpoints."""

import itertools
import json

import numpy as np
import pytest
from release_helpers import make, status, stored

from converter.errors import UsageError
from converter.manifest import Manifest
from converter.pipeline import Request, plan_request
from converter.plan import Options
from converter.ui import quantization_text, recipe_facts
from quant.allocate import Choice, candidates, prior, solve
from quant.calibrate.text import calibration_of
from quant.recipe import QuantSpec


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def target(bits, method="rtn", **settings):
    return Options(quant=QuantSpec.make("affine", method=method), target_bits=bits, **settings)


def choices(rng, count, width):
    specs = candidates("rtn")[:width]
    return [
        Choice(
            name=str(i),
            elements=64,
            specs=specs,
            bytes=tuple(int(v) for v in rng.integers(1, 60, width)),
            losses=tuple(float(v) for v in rng.integers(0, 50, width)),
        )
        for i in range(count)
    ]


def brute_force(given, budget):
    """Least loss of any choice within the budget."""
    ways = itertools.product(*(range(len(c.specs)) for c in given))
    totals = (
        (
            sum(c.bytes[i] for c, i in zip(given, way, strict=True)),
            sum(c.losses[i] for c, i in zip(given, way, strict=True)),
        )
        for way in ways
    )
    return min(loss for size, loss in totals if size <= budget)


@pytest.mark.parametrize("seed", range(25))
def test_knapsack_finds_what_trying_everything_finds(seed):
    rng = np.random.default_rng(seed)
    given = choices(rng, 5, 5)
    least = sum(min(c.bytes) for c in given)
    for budget in (least, least + 20, least + 70, 10**6):
        picked = solve(given, budget)
        assert sum(c.bytes[i] for c, i in zip(given, picked, strict=True)) <= budget
        found = sum(c.losses[i] for c, i in zip(given, picked, strict=True))
        assert found == brute_force(given, budget)
    with pytest.raises(ValueError, match="at least"):
        solve(given, least - 1)


def test_large_knapsack_stays_near_its_bound(monkeypatch):
    """Rounded bytes cost little: never above the budget, close to the relaxed optimum."""
    rng = np.random.default_rng(0)
    given = []
    for i in range(200):
        size = int(rng.integers(1000, 100_000)) | 1
        specs = candidates("rtn")[:6]
        sizes = tuple(size * bits for bits in range(2, 8))
        loss = float(rng.lognormal(0, 2))
        losses = tuple(loss * 4.0**-bits for bits in range(2, 8))
        given.append(Choice(name=str(i), elements=size, specs=specs, bytes=sizes, losses=losses))
    budget = sum(c.bytes[2] for c in given)
    exact = solve(given, budget)
    monkeypatch.setattr("quant.allocate._COLUMNS", 500)
    coarse = solve(given, budget)

    def loss(picked):
        return sum(c.losses[i] for c, i in zip(given, picked, strict=True))

    for picked in (exact, coarse):
        used = sum(c.bytes[i] for c, i in zip(given, picked, strict=True))
        assert 0.999 * budget < used <= budget
    uniform = loss([2] * len(given))
    assert loss(exact) <= loss(coarse) <= 1.2 * loss(exact) < uniform


def test_equals_fall_to_the_smaller_spec_of_the_later_choice():
    specs = candidates("rtn")[:3]
    same = [
        Choice(name=n, elements=1, specs=specs, bytes=(10, 20, 30), losses=(5.0, 5.0, 1.0))
        for n in "ab"
    ]
    assert solve(same, 40) == solve(same[::-1], 40) == [2, 0]
    assert solve(same, 30) == [0, 0]


def test_sensitivities_predict_the_loss_of_a_whole_recipe(tinylm, cache):
    """The sum of Fisher losses against the KL that torch measures, for noise and for RTN."""
    import torch
    from transformers import AutoModelForCausalLM

    from arch_maps.ops import Source
    from converter.source import open_folder
    from quant.calibrate.fisher import sensitivities
    from quant.calibrate.links import Task
    from quant.calibrate.text import read_text, tokenized

    data = tinylm / "calibration.txt"
    calibration = calibration_of(data, sequences=6, length=128)
    model = AutoModelForCausalLM.from_pretrained(tinylm, dtype=torch.float32).eval()
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2}
    tasks = [
        Task(
            module=n,
            expr=Source(n, tuple(matrices[n].shape)),
            dtype="BF16",
            spec=QuantSpec.make("affine"),
            table="embed" in n,
        )
        for n in matrices
    ]
    checkpoint = open_folder(tinylm)
    with checkpoint.open() as reader:
        found = sensitivities(
            tinylm,
            tasks,
            reader=reader,
            shapes={name: info.shape for name, info in checkpoint.tensors.items()},
            text=read_text(data),
            calibration=calibration,
            source={},
            say=str,
        )
    ids = torch.tensor(tokenized(read_text(data), tinylm, calibration))
    rng = np.random.default_rng(0)
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        predicted = {"table": 0.0, "layers": 0.0}
        measured = {}
        for group in predicted:
            kept = {n: p.clone() for n, p in matrices.items()}
            for name, weight in matrices.items():
                if ("embed" in name) != (group == "table"):
                    continue
                noise = rng.standard_normal(weight.shape) * 0.03 * float(weight.std())
                for use in ("", "looked_up:"):
                    if f"{use}rows:{name}" in found:
                        r, c = (found[f"{use}{part}:{name}"] for part in ("rows", "columns"))
                        predicted[group] += 0.5 * float((r[:, None] * c * noise**2).sum())
                weight += torch.from_numpy(noise).float()
            after = model(ids).logits.log_softmax(-1)
            measured[group] = float((before.exp() * (before - after)).sum(-1).mean())
            for name, weight in matrices.items():
                weight.copy_(kept[name])
    for group in predicted:
        assert 0.7 < predicted[group] / measured[group] < 1.4, (group, predicted, measured)


@pytest.fixture(scope="module")
def allocated(tinylm, cache, tmp_path_factory):
    """tinylm at 4.5 bits per weight, chosen by activations."""
    text = tmp_path_factory.mktemp("text") / "calibration.txt"
    text.write_text((tinylm / "calibration.txt").read_text()[:40_000])
    recipe = target(4.5, calibration=calibration_of(text, sequences=8, length=128))
    out = tmp_path_factory.mktemp("allocated") / "out"
    return make(tinylm, out, recipe, calibration_data=text)[0], recipe, text


def test_target_is_met_from_below_and_recorded(allocated, tinylm):
    out, recipe, text = allocated
    manifest = json.loads((out / "conversion.json").read_text())
    size = sum(a.nbytes for a in stored(out).values())
    assert 0.99 * 4.5 < 8 * size / manifest["parameters"] <= 4.5
    assert manifest["recipe"]["target_size"] == {"bits": 4.5, "bytes": None}
    assert manifest["recipe"]["allocation"]["basis"] == "activations"
    request = Request(hf_path=str(tinylm), recipes=(recipe,), calibration_data=text)
    plan = plan_request(request).plans[0]
    assert plan.hash == manifest["plan"]
    draft = plan_request(request, measure=False).plans[0].hash  # what is known without weights
    assert manifest["plan"] != draft == manifest["draft"]
    assert Manifest(manifest).answers(draft)
    assert Manifest(manifest).answers(plan.hash)
    assert quantization_text(manifest) == (
        f"formats chosen for each matrix by activations, {manifest['bits_per_weight']:.2f} bits "
        "per weight"
    )
    assert recipe_facts(manifest) == {"method": "rtn", "bits": 4.5, "chosen by": "activations"}
    quantization = json.loads((out / "config.json").read_text())["quantization"]
    assert quantization["model.embed_tokens"]["bits"] >= 5
    assert len({(o.quant.bits, o.quant.group_size) for o in plan.outputs if o.quant}) > 3


def test_chosen_formats_lose_less_than_one_for_all(allocated, tinylm, tmp_path):
    """The bar is 0.8 of uniform 4 bits on held-out text (benchmarks.quality)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _, _ = allocated
    uniform = make(tinylm, tmp_path / "uniform", Options(quant=QuantSpec.make("affine", 4)))[0]
    data_free = make(tinylm, tmp_path / "weights", target(4.5))[0]
    tokenizer = AutoTokenizer.from_pretrained(tinylm)
    ids = tokenizer((tinylm / "eval.txt").read_text()[:20_000], verbose=False)["input_ids"]
    rows = torch.tensor(ids[: 6 * 256]).reshape(6, 256)

    def logs(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(rows).logits.log_softmax(-1)

    reference = logs(tinylm)
    kl = {}
    for name, folder in {"uniform": uniform, "activations": out, "weights": data_free}.items():
        back = make(folder, tmp_path / f"{name}-back", Options(target="torch", dtype="float32"))[0]
        kl[name] = float((reference.exp() * (reference - logs(back))).sum(-1).mean())
    assert kl["activations"] < 0.6 * kl["uniform"]
    assert kl["weights"] < 0.7 * kl["uniform"]
    sizes = [(f / "model.safetensors").stat().st_size for f in (out, data_free, uniform)]
    assert max(sizes[:2]) <= sizes[2]


@pytest.mark.parametrize("runtime", ["mlx_lm", "mlx_vlm"])
def test_stock_runtimes_load_every_format_in_one_file(
    runtimes, runtime, twin_of, cache, tmp_path, monkeypatch
):
    """A mix of modes, bits, groups and plain matrices is loaded module by module as written."""
    import mlx.core as mx

    from validate.runtime import MlxRuntime

    wanted = [*candidates("rtn"), None]
    monkeypatch.setattr(
        "converter.allocate.solve",
        lambda given, budget: [
            c.specs.index(spec) if (spec := wanted[i % len(wanted)]) in c.specs else 0
            for i, c in enumerate(given)
        ],
    )
    monkeypatch.setattr("converter.allocate._TOLERANCE", 1.0)
    source = twin_of("qwen3", "bfloat16")
    out = make(source, tmp_path / "out", target(12.0))[0]
    model = MlxRuntime.load(out, runtime=runtime)
    written = stored(out)
    loaded = {n.removeprefix("language_model."): v for n, v in model.parameters().items()}
    assert loaded.keys() == written.keys()
    for name, value in written.items():
        assert np.array_equal(np.array(loaded[name].view(mx.uint8)), value.view(np.uint8)), name
    assert np.isfinite(model.logits(range(1, 20))).all()


def test_experts_and_state_follow_the_map(twin_of, cache):
    """Routers stay plain, a stack has one format, heads and recurrent projections keep 4 bits."""
    for model_type in ("qwen3_moe", "qwen3_5", "mamba2"):
        source = twin_of(model_type, "bfloat16")
        ranges = {}
        with pytest.raises(UsageError, match=r"can have (\S+) to (\S+) bits") as caught:
            plan_request(Request(hf_path=str(source), recipes=(target(1.0),)))
        low = float(str(caught.value).split("can have ")[1].split()[0])
        plan = plan_request(Request(hf_path=str(source), recipes=(target(low * 1.02),))).plans[0]
        by_name = {out.rule.target: out for out in plan.outputs}
        assert plan.bits_per_weight <= low * 1.02
        for name, out in by_name.items():
            if name.endswith(("mlp.gate.weight", "A_log", "norm.weight")):
                assert out.quant is None
            if out.quant and ("embed" in name or "lm_head" in name or "linear_attn" in name):
                assert out.quant.bits >= 4, name
            ranges.setdefault(out.quant and out.quant.bits, []).append(name)
        assert min(bits for bits in ranges if bits) == (4 if model_type == "mamba2" else 2)


@pytest.mark.parametrize(("model_type", "method"), [("gpt_oss", "imatrix"), ("gemma3_text", "rtn")])
def test_biases_copied_heads_and_stacks_count(twin_of, cache, model_type, method, monkeypatch):
    """Biases of chosen modules count, and text serves stacked experts and copied heads as well."""
    monkeypatch.setattr("converter.losses.SAMPLE", 1 << 14)
    source = twin_of(model_type, "bfloat16")
    text = calibration_of(None, sequences=2, length=16)
    recipe = target(8.0, method, calibration=text)
    plan = plan_request(Request(hf_path=str(source), recipes=(recipe,))).plans[0]
    assert 0.99 * 8 < plan.bits_per_weight <= 8
    assert plan.options.allocation.expected > 0


def test_sizes_in_bytes_bound_the_files(tinylm, cache, tmp_path):
    recipe = Options(quant=QuantSpec.make("affine"), target_bytes=3_000_000)
    out = make(tinylm, tmp_path / "out", recipe)[0]
    size = (out / "model.safetensors").stat().st_size
    assert 0.985 * 3_000_000 < size <= 3_000_000
    plan = plan_request(Request(hf_path=str(tinylm), recipes=(recipe,))).plans[0]
    assert plan.options.suffix == "0.003GB"
    grouped = Options(quant=recipe.quant, target_bits=4.5, target_group_size=64)
    plan = plan_request(Request(hf_path=str(tinylm), recipes=(grouped,))).plans[0]
    assert {out.quant.group_size for out in plan.outputs if out.quant} == {64}


def test_losses_are_measured_once(tinylm, cache, monkeypatch):
    plan_request(Request(hf_path=str(tinylm), recipes=(target(4.5),)))

    def forbidden(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr("converter.allocating.measure", forbidden)
    first = plan_request(Request(hf_path=str(tinylm), recipes=(target(3.9),))).plans[0]
    again = plan_request(Request(hf_path=str(tinylm), recipes=(target(3.9),), workers=3)).plans[0]
    assert first.hash == again.hash
    other = Options(quant=QuantSpec.make("affine", method="search"), target_bits=3.9)
    with pytest.raises(AssertionError, match="again"):
        plan_request(Request(hf_path=str(tinylm), recipes=(other,)))


def test_plan_shows_the_allocation(tinylm, cache, capsys):
    assert status("plan", "--hf-path", tinylm, "--q-target-bpw", "4.5") == 0
    shown = capsys.readouterr()
    assert "formats chosen for --q-target-bpw 4.5 by the weights alone" in shown.out
    assert "affine 6-bit g128" in shown.out
    assert "allocation: " in shown.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--q-target-bpw", "17"], r"can have 2\.\d+ to 16\.000 bits per weight"),
        (["--q-target-size", "1MB"], "--q-target-size 1000000: cannot be reached"),
        (["--q-target-size", "much"], "give a size such as 4.2GB"),
        (["--q-target-bpw", "4", "--q-target-size", "3MB"], "two targets"),
        (["--q-target-bpw", "4", "--q-bits", "4"], "--q-bits: --q-target-bpw"),
        (["--q-target-bpw", "4", "--q-mode", "mxfp4"], "--q-mode: --q-target-bpw"),
        (["--q-target-bpw", "4", "--quant-predicate", "mixed_4_6"], "choose it themselves"),
        (["--q-target-bpw", "4", "--variants", "4bit"], "leave --q-target-bpw out"),
        (["--q-target-bpw", "4", "-d"], "-q and -d"),
        (["--q-target-bpw", "4", "--to", "torch"], "--to torch"),
    ],
)
def test_contradictions_are_usage_errors(tinylm, cache, flags, message, capsys):
    assert status("plan", "--hf-path", tinylm, *flags) == 2
    import re

    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("bits", [1.5, 17.0])
def test_sizes_out_of_reach_are_refused_before_weights_are_read(twin_of, bits, monkeypatch):
    for name in ("allocated", "fetch"):
        monkeypatch.setattr(f"converter.pipeline.{name}", None)
    source = str(twin_of("qwen3_moe", "bfloat16"))
    request = Request(hf_path=source, recipes=(target(bits),))
    for measure in (True, False):
        with pytest.raises(UsageError, match=r"this release can have 2\.\d+ to 16\.000 bits"):
            plan_request(request, measure=measure)


def test_prior_puts_the_head_first():
    middle = prior(head=False, table=False, layer=3, layers=8)
    last = prior(head=False, table=False, layer=7, layers=8)
    first = prior(head=False, table=False, layer=0, layers=8)
    assert prior(head=True, table=True, layer=None, layers=8) > first > last > middle


@pytest.mark.parametrize(
    ("model_type", "head", "looked_up"),
    [
        ("gemma4_text", "model.embed_tokens", {"model.embed_tokens_per_layer"}),
        ("bert", None, {"embeddings.word_embeddings"}),
        ("qwen3_moe", "lm_head", {"model.embed_tokens"}),
    ],
)
def test_only_what_makes_the_logits_counts_as_a_head(
    twin_of, cache, model_type, head, looked_up, monkeypatch
):
    """Neither a table of the layers' own inputs nor one that an encoder looks up in."""
    source = twin_of(model_type, "bfloat16")
    asked = {}

    def spying(**given):
        asked.setdefault((given["head"], given["table"]), []).append(given)
        return prior(**given)

    monkeypatch.setattr("converter.losses.prior", spying)
    plan_request(Request(hf_path=str(source), recipes=(target(6.0, "search"),)))
    assert sum(len(asked.get((True, table), ())) for table in (False, True)) == bool(head)
    assert len(asked.get((False, True), ())) == len(looked_up)


def test_an_unchanged_rerun_neither_measures_nor_asks_for_memory(
    tinylm, cache, tmp_path, monkeypatch, capsys
):
    """What is finished needs no memory and no measuring, even where no losses are cached."""
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text((tinylm / "calibration.txt").read_text()[:8_000])
    flags = ["--hf-path", tinylm, "--mlx-path", out, "--q-target-bpw", "4.5", "--no-validate"]
    flags += ["--calibration-data", text, "--calibration-sequences", 2, "--calibration-length", 32]
    assert status(*flags) == 0
    before = json.loads((out / "conversion.json").read_text())
    capsys.readouterr()

    def forbidden(*_, **__):
        raise AssertionError("worked again")

    for name in ("allocated", "statistics_of", "execute"):
        monkeypatch.setattr(f"converter.pipeline.{name}", forbidden)
    monkeypatch.setattr("converter.refusals.installed_memory", lambda: 1)
    assert status(*flags) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "has the formats for this target already" in said
    assert "is finished already, by the same plan" in said
    assert json.loads((out / "conversion.json").read_text()) == before

    other = ["4.6" if flag == "4.5" else flag for flag in flags]
    assert status(*other) == 2  # in the way, which is said before anything is measured
    assert "holds a finished conversion" in capsys.readouterr().err
    assert status(*other, "--overwrite") == 3
    assert "of memory, and this machine has" in " ".join(capsys.readouterr().err.split())


def test_a_finished_calibrated_output_needs_no_memory(
    twin_of, cache, tmp_path, monkeypatch, capsys
):
    out, source = tmp_path / "out", twin_of("llama", "bfloat16")
    flags = ["--hf-path", source, "--mlx-path", out, "-q", "--q-method", "imatrix"]
    flags += ["--calibration-sequences", 1, "--calibration-length", 16, "--no-validate"]
    assert status(*flags) == 0
    monkeypatch.setattr("converter.refusals.installed_memory", lambda: 1)
    assert status(*flags) == 0
    assert "is finished already, by the same plan" in capsys.readouterr().err
    (out / "conversion.json").unlink()
    assert status(*flags, "--overwrite") == 3
