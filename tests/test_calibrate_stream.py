"""Streamed models: the whole model's numbers, one block in memory; and whose input is whose."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
import transformers

from converter.pipeline import Request, plan_request
from converter.plan import Options
from converter.source import open_folder
from quant.calibrate.coding import FEW_TOKENS, TOKENS
from quant.calibrate.gather import Gathering
from quant.calibrate.links import Task
from quant.calibrate.products import Moments, watching
from quant.calibrate.store import Store
from quant.calibrate.stream import StreamedModel
from quant.calibrate.text import CalibrationError
from quant.moments import diagonal_blocks
from quant.recipe import QuantSpec

FAMILIES = ("llama", "qwen3", "qwen3_moe", "gemma3", "qwen3_5", "deepseek_v3")


def rows_of(count=2, length=24):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 200, (1, length + n), generator=generator) for n in range(count)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def streamed(folder, reader):
    return StreamedModel(folder, reader, shapes_of(folder))


def shapes_of(folder):
    return {name: info.shape for name, info in open_folder(folder).tensors.items()}


def whole(folder):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_numbers_are_those_of_the_whole_model(twin_of, model_type, monkeypatch):
    folder = twin_of(model_type, "bfloat16")
    monkeypatch.setattr("quant.calibrate.passes.SPILL_BYTES", 0)
    with open_folder(folder).open() as reader:
        model = streamed(folder, reader)
        with model.run(rows_of()) as run:
            for index in range(len(model.blocks)):
                with model.loaded(index):
                    run.forward(index, keep=False)
                    run.forward(index, keep=True)
                here = {n for n, p in model.model.named_parameters() if not p.is_meta}
                assert not [n for n in here if n.startswith(f"{model.path}.")]
            found = [out["logits"] for out in run.results()]
    reference = whole(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        expected = [reference(**row).logits for row in rows_of()]
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_large_tables_in_blocks_are_read_by_rows(twin_of, monkeypatch):
    """The numbers are those of the whole table, of which a row is read at a time."""
    folder, rows, most = twin_of("qwen4_exp", "bfloat16"), rows_of(), {}
    monkeypatch.setattr("quant.calibrate.stream.TABLE_BYTES", 0)
    with open_folder(folder).open() as reader:
        own = reader.read_rows

        def counting(name, start, stop):
            most[name] = max(most.get(name, 0), stop - start)
            return own(name, start, stop)

        monkeypatch.setattr(reader, "read_rows", counting)
        model = streamed(folder, reader)
        with model.run(rows) as run:
            for index in range(len(model.blocks)):
                with model.loaded(index):
                    run.forward(index, keep=True)
            found = [out["logits"] for out in run.results()]
    assert {rows for name, rows in most.items() if "ngram_embedding.shard" in name} == {1}
    reference, threads = whole(folder), torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        expected = [reference(**row).logits for row in rows]
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_pass_is_taken_up_where_it_was(twin_of):
    folder = twin_of("qwen3_5", "bfloat16")
    with open_folder(folder).open() as reader:
        model = streamed(folder, reader)
        results, hidden = [], []
        for first in (0, 2):
            with model.run(rows_of()) as run:
                if first:
                    run.resume(first, hidden)
                for index in range(first, len(model.blocks)):
                    if index == 2:
                        assert run.plain
                        hidden = [{n: t.clone() for n, t in s.items()} for s in run.states(2)]
                    with model.loaded(index):
                        run.forward(index, keep=True)
                results.append([out["logits"] for out in run.results()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_errors_name_what_is_missing(twin_of):
    folder = twin_of("llama", "bfloat16")
    shapes = shapes_of(folder)
    lost = "model.layers.1.mlp.up_proj.weight"
    with open_folder(folder).open() as reader:
        del shapes[lost]
        model = StreamedModel(folder, reader, shapes)
        with pytest.raises(CalibrationError, match=f"{lost}: the release has no tensor"):
            model.weights.load(model.parameters(1))
        with (
            model.run(rows_of()) as run,
            pytest.raises(CalibrationError, match="does not call its blocks one after another"),
        ):
            run.forward(1, keep=True)


def tasks_of(folder, method="imatrix"):
    recipe = Options(quant=QuantSpec.make("affine", 4, 32))
    plan = plan_request(Request(hf_path=str(folder), recipes=(recipe,))).plans[0]
    spec = QuantSpec.make("affine", 4, 32, method)
    return [
        Task(module=o.rule.module, expr=o.expr, dtype=o.dtype, spec=spec)
        for o in plan.outputs
        if o.quant and "embed_tokens" not in o.rule.module
    ]


def gathered(folder, store, tasks, rows, kind="moments"):
    with open_folder(folder).open() as reader:
        model = streamed(folder, reader)
        gathering = Gathering(model, tasks, rows, reader, shapes_of(folder))
        if kind == "moments":
            return gathering.moments(store, width=32)
        return gathering.codes(store, None)


def test_what_was_watched_goes_without_the_collector():
    weight, seen = torch.ones(4, 8), Moments(width=None)
    gone = [weakref.ref(weight), weakref.ref(seen)]
    gc.disable()
    try:
        with watching({"w": weight}, seen.add):
            torch.nn.functional.linear(torch.ones(2, 8), weight)
        assert seen.tokens == {("w", None): 2}
        del weight, seen
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_sums_become_means_where_they_lie():
    rng = np.random.default_rng(0)
    rows = [torch.from_numpy(rng.standard_normal((n, 8), np.float32)) for n in (3, 5, 7)]
    apart, together = Moments(width=None), Moments(width=None)
    for seen in (apart, together):
        with torch.inference_mode():
            for row in rows:
                seen.add(("w", None), 1, row)
                seen.forget()
    expected = sum((row.T @ row).double() for row in rows) / 15
    together.divide()
    means = [seen.mean(("w", None)) for seen in (apart, together)]
    assert [mean.tobytes() for mean in means] == [expected.numpy().tobytes()] * 2
    assert np.shares_memory(means[1], together.mean(("w", None)))


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Store("moments", {"of": "a test"})


def test_every_expert_is_weighed_by_its_own_tokens(twin_of, store):
    folder = twin_of("qwen3_moe", "bfloat16")
    rows = rows_of(4, 60)
    found = gathered(folder, store, tasks_of(folder), rows)
    model = whole(folder)
    layer = model.model.layers[1].mlp
    seen = {}

    def experts(module, given):
        hidden, chosen, _ = given
        for expert in range(module.num_experts):
            mine = hidden[(chosen == expert).any(-1)].double()
            seen.setdefault(expert, []).append(mine)

    layer.experts.register_forward_pre_hook(experts)
    with torch.no_grad():
        for row in rows:
            model(**row)
    name = "model.layers.1.mlp.switch_mlp.gate_proj"
    inputs = {expert: torch.cat(parts).numpy() for expert, parts in seen.items()}
    tokens = found[TOKENS + name]
    assert tokens.tolist() == [len(x) for _, x in sorted(inputs.items())]
    assert (tokens >= FEW_TOKENS).any()
    assert (tokens < FEW_TOKENS).any()
    together = np.concatenate([x for _, x in sorted(inputs.items())])
    for expert, x in inputs.items():
        own = x if len(x) >= FEW_TOKENS else together
        expected = diagonal_blocks(own.T @ own / len(own), 32)
        assert np.allclose(found[name][expert], expected, rtol=1e-3, atol=1e-5 * expected.max())


@pytest.mark.parametrize(
    ("model_type", "fused"),
    [("phi3", ("qkv_proj", "gate_up_proj")), ("deepseek_v3", ("unembed_out", "shared_experts"))],
)
def test_fused_and_split_matrices_are_calibrated(twin_of, store, model_type, fused):
    folder = twin_of(model_type, "bfloat16")
    tasks = tasks_of(folder)
    found = gathered(folder, store, tasks, rows_of())
    lost = {task.module for task in tasks if task.module not in found}
    # The absorbed key projection multiplies queries, which the reference never does.
    assert all(name.endswith("embed_q") for name in lost)
    for word in fused:
        assert any(word in name for name in found.names)


def test_gptq_of_stacked_experts_goes_on_from_quantized_blocks(twin_of, store):
    folder = twin_of("qwen3_moe", "bfloat16")
    tasks = tasks_of(folder, "gptq")
    found = gathered(folder, store, tasks, rows_of(3, 40), "gptq")
    for task in tasks:
        shape = task.expr.shape
        packed = found[f"{task.module}.weight"]
        assert packed.shape == (*shape[:-1], shape[-1] * 4 // 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quant.calibrate.coding.HESSIAN_BYTES", 1)  # a pass for each matrix
        again = gathered(folder, Store("gptq", {"of": "more"}), tasks, rows_of(3, 40), "gptq")
    assert again.digest == found.digest


@pytest.mark.parametrize("kind", ["moments", "gptq"])
def test_an_interrupted_calibration_goes_on(twin_of, store, kind, monkeypatch):
    folder = twin_of("qwen3_moe", "bfloat16")
    tasks, rows = tasks_of(folder, "gptq" if kind == "gptq" else "imatrix"), rows_of(2, 40)
    expected = gathered(folder, Store("moments", {"of": "a whole run"}), tasks, rows, kind)
    put, loaded = Store.put, []

    def failing(self, part, *given):
        put(self, part, *given)
        if part == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", failing)
        with pytest.raises(KeyboardInterrupt):
            gathered(folder, store, tasks, rows, kind)
    assert store.finished(print) is None
    load = StreamedModel.loaded
    monkeypatch.setattr(
        StreamedModel, "loaded", lambda self, index: loaded.append(index) or load(self, index)
    )
    assert gathered(folder, store, tasks, rows, kind).digest == expected.digest
    assert loaded[0] == 2
