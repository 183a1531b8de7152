"""Method autoround: blocks that answer more like the release's own, resumed, refused, recorded."""

import gc
import json
import weakref
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from release_helpers import hashes, make, status
from safetensors.numpy import load_file
from test_calibrate_stream import rows_of, shapes_of, streamed, tasks_of
from transformers import AutoModelForCausalLM

from converter.diagnose.codes import codes_check
from converter.pipeline import Request, convert, plan_request
from converter.plan import Options
from converter.source import open_folder
from converter.ui import Console
from quant.allocate import candidates
from quant.calibrate.coding import FEW_TOKENS, TOKENS
from quant.calibrate.gather import TUNED, Gathering
from quant.calibrate.leaves import Leaves
from quant.calibrate.links import matrix_rows, places_of
from quant.calibrate.slots import Slots
from quant.calibrate.store import Store, cache_folder
from quant.calibrate.stream import StreamedModel
from quant.calibrate.text import calibration_of, model_rows, tokenized
from quant.recipe import QuantSpec
from quant.tune import Tuning


def options(path, method="autoround", bits=2, iterations=None, sequences=8, length=64):
    return Options(
        quant=QuantSpec.make("affine", bits, None, method),
        calibration=calibration_of(path, sequences=sequences, length=length),
        iterations=iterations,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of this file's own, so that nothing comes from earlier runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def outputs(tinylm, cache, tmp_path_factory):
    """tinylm at 2 bits by gptq and by autoround from the same text."""
    root, text = tmp_path_factory.mktemp("tuned"), tinylm / "calibration.txt"
    recipes = {"gptq": options(text, "gptq"), "autoround": options(text, iterations=20)}
    return {
        name: make(tinylm, root / name, recipe, calibration_data=text)[0]
        for name, recipe in recipes.items()
    }


def last_states(folder, rows):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    with torch.no_grad():
        return [model(**row).last_hidden_state for row in rows]


def error(tinylm, out, rows, tmp_path):
    """Squared distance of the last hidden states from the release's, over their energy."""
    back = make(out, tmp_path / out.name, Options(target="torch", dtype="float32"))[0]
    pairs = list(zip(last_states(tinylm, rows), last_states(back, rows), strict=True))
    return float(
        sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)
    )


def test_tuned_blocks_answer_more_like_the_release(outputs, tinylm, tmp_path):
    text = (tinylm / "calibration.txt").read_text()
    rows = model_rows(tokenized(text, tinylm, options(tinylm / "calibration.txt").calibration))
    gptq, tuned = (error(tinylm, outputs[name], rows, tmp_path) for name in ("gptq", "autoround"))
    assert tuned < 0.75 * gptq


def test_tuned_codes_count_as_those_of_the_release(outputs, tinylm):
    (row,) = codes_check(outputs["autoround"], tinylm)
    assert (row.verdict, row.value) == ("pass", 0.0)


def test_losses_are_recorded_block_by_block(outputs):
    (folder,) = cache_folder().glob("*.autoround")
    found = {n: a for file in folder.glob("part-*") for n, a in load_file(file).items()}
    losses = {n.removeprefix(TUNED): a for n, a in found.items() if n.startswith(TUNED)}
    assert sorted(losses) == [f"model.layers.{n}" for n in range(6)]
    assert all(after < before for before, after in losses.values())
    recipe = json.loads((outputs["autoround"] / "conversion.json").read_text())["recipe"]
    assert recipe["quantization"]["method"] == "autoround"
    assert recipe["tuning"] == {
        "iterations": 20,
        "sequences": 2,
        "reach": 0.5,
        "grid_reach": 0.125,
    }


def test_where_tuning_does_not_help_gptq_stays(outputs, tinylm, cache, tmp_path, capsys):
    text = tinylm / "calibration.txt"
    request = Request(
        hf_path=str(tinylm),
        mlx_path=tmp_path / "out",
        recipes=(options(text, iterations=1),),  # one step of the whole reach
        calibration_data=text,
    )
    out = convert(request, Console())[0].folder
    said = " ".join(capsys.readouterr().err.split())
    assert "6 of them keep the codes of gptq" in said
    assert hashes(out)["model.safetensors"] == hashes(outputs["gptq"])["model.safetensors"]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Store("codes", {"of": "a test"})


def tuned_twin(folder, store, rows, iterations=12):
    spec = QuantSpec.make("affine", 2, 32, "autoround")
    tasks = [replace(task, spec=spec) for task in tasks_of(folder)]
    with open_folder(folder).open() as reader:
        gathering = Gathering(streamed(folder, reader), tasks, rows, reader, shapes_of(folder))
        return tasks, gathering.codes(store, None, Tuning(iterations=iterations))


@pytest.mark.parametrize("model_type", ["gpt_oss", "phi3", "gemma4_text"])
def test_families_are_tuned(twin_of, model_type, store):
    """Stacked, transposed, interleaved and fused matrices; keys and values of earlier layers."""
    folder = twin_of(model_type, "bfloat16")
    tasks, found = tuned_twin(folder, store, rows_of(2, 40), iterations=15)
    losses = np.array([found[n] for n in found.names if n.startswith(TUNED)])
    assert (losses[:, 1] < losses[:, 0]).all(), losses
    for task in (t for t in tasks if ".layers." in t.module):
        *leading, columns = task.expr.shape
        assert found[f"{task.module}.weight"].shape == (*leading, columns * 2 // 32)


def test_experts_that_saw_little_keep_their_codes(twin_of, store):
    folder = twin_of("qwen3_moe", "bfloat16")
    rows = rows_of(4, 60)
    tasks, found = tuned_twin(folder, store, rows, iterations=15)
    with open_folder(folder).open() as reader:
        gathering = Gathering(streamed(folder, reader), tasks, rows, reader, shapes_of(folder))
        plain = gathering.codes(Store("codes", {"of": "gptq"}), None)
    first = next(t for t in tasks if t.stacked and ".layers.0." in t.module)
    few = found[TOKENS + first.module] < FEW_TOKENS
    ours, theirs = (codes[f"{first.module}.weight"] for codes in (found, plain))
    same = [a.tobytes() == b.tobytes() for a, b in zip(ours, theirs, strict=True)]
    before, after = found[f"{TUNED}model.layers.0"]
    assert after < before
    assert few.any()
    assert not few.all()
    assert same == few.tolist()


def test_a_tuned_block_is_gone_before_the_next_comes(twin_of, store, monkeypatch):
    loaded, held, alive = StreamedModel.loaded, [], []

    @contextmanager
    def watched(self, index):
        alive.append(sum(ref() is not None for ref in held))
        with loaded(self, index) as block:
            yield block
            held.extend(weakref.ref(value) for value in self.held(index).values())

    monkeypatch.setattr(StreamedModel, "loaded", watched)
    gc.disable()
    try:
        tuned_twin(twin_of("llama", "bfloat16"), store, rows_of(2, 40), iterations=2)
    finally:
        gc.enable()
    assert len(alive) > 1
    assert not any(alive)


@pytest.mark.parametrize(("model_type", "block"), [("phi3", 0), ("gemma4_text", 2)])
def test_an_interrupted_tuning_on_other_threads_gives_the_same(
    twin_of, store, monkeypatch, model_type, block
):
    folder, rows = twin_of(model_type, "bfloat16"), rows_of(2, 40)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        _, expected = tuned_twin(folder, Store("codes", {"of": "a whole run"}), rows)
    finally:
        torch.set_num_threads(threads)
    put = Store.put

    def failing(self, part, *given):
        put(self, part, *given)
        if part == block:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", failing)
        with pytest.raises(KeyboardInterrupt):
            tuned_twin(folder, store, rows)
    assert store.begun()[0] == block + 1
    assert tuned_twin(folder, store, rows)[1].digest == expected.digest


@pytest.mark.parametrize("model_type", ["gpt_oss", "dbrx", "qwen3_moe"])
def test_places_are_where_the_map_takes_elements_from(twin_of, model_type, monkeypatch):
    monkeypatch.setattr("quant.calibrate.links._BLOCK", 1000)  # several pieces of each matrix
    folder = twin_of(model_type, "bfloat16")
    shapes = shapes_of(folder)
    with open_folder(folder).open() as reader:
        weights = streamed(folder, reader).weights
        for task in tasks_of(folder)[:14]:
            for index in {0, task.count - 1}:
                expected = matrix_rows(task, reader, index).astype(np.float32)
                found, places = np.empty(expected.shape), places_of(task, index, shapes)
                for place in places:
                    place.get(weights.read(place.name), found)
                assert np.array_equal(found, expected)
                tensors = {place.name: weights.read(place.name) for place in places}
                for place in places:
                    place.put(tensors[place.name], np.ascontiguousarray(2 * expected))
                    place.get(tensors[place.name], found)
                assert np.array_equal(found, 2 * expected)


@pytest.mark.parametrize("model_type", ["gpt_oss", "dbrx", "qwen3_moe", "phi3"])
def test_slots_are_where_torch_takes_elements_from(twin_of, model_type):
    """Values go from each matrix to the parameters that transformers' conversion makes of them."""
    folder = twin_of(model_type, "bfloat16")
    shapes = shapes_of(folder)
    with open_folder(folder).open() as reader:
        model = streamed(folder, reader)
        slots = Slots(model.weights, shapes)
        with model.loaded(1):
            leaves = Leaves(model.weights, model.parameters(1))
            for task in [t for t in tasks_of(folder) if ".layers.1." in t.module][:9]:
                for index in {0, task.count - 1}:
                    expected = matrix_rows(task, reader, index).astype(np.float32)
                    found = np.zeros(expected.shape, np.float32)
                    own = slots.of(places_of(task, index, shapes))
                    for slot in own:
                        slot.get(leaves[slot.leaf], found)
                    assert np.array_equal(found, expected)
                    for slot in own:
                        slot.put(leaves[slot.leaf], 2 * expected)
                        slot.get(leaves[slot.leaf], found)
                    assert np.array_equal(found, 2 * expected)


def test_neither_bounds_on_gradients_nor_cores_change_codes(twin_of, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, rows = twin_of("qwen3_moe", "bfloat16"), rows_of(2, 50)
    found = []
    for most, cores in ((2 << 30, 1), (300_000, 2)):
        monkeypatch.setattr("quant.calibrate.tuning.GRADIENT_BYTES", most)
        monkeypatch.setattr("quant.calibrate.tuning.cores", lambda cores=cores: cores)
        store = Store("codes", {"of": str(most)})
        found.append(tuned_twin(folder, store, rows, iterations=10)[1])
    losses = np.array([found[0][n] for n in found[0].names if n.startswith(TUNED)])
    assert (losses[:, 1] < losses[:, 0]).any()  # else all would keep gptq's
    assert found[0].digest == found[1].digest


def test_plan_hash_follows_the_settings(twin_of, tinylm):
    source, text = str(twin_of("llama", "bfloat16")), tinylm / "calibration.txt"

    def planned(recipe):
        return plan_request(Request(hf_path=source, recipes=(recipe,))).plans[0].hash

    default = planned(options(text))
    assert default == planned(options(text, iterations=200))
    others = [options(text, "gptq"), options(text, iterations=9), options(text, iterations=8)]
    assert len({default, *map(planned, others)}) == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-q", "--q-method", "autoround", "--q-mode", "mxfp4"], "contradicts --q-mode mxfp4"),
        (["--variants", "bf16,nvfp4", "--q-method", "autoround"], "contradicts --q-mode nvfp4"),
        (["-q", "--tuning-iterations", "9"], "no effect with --q-method rtn"),
        (
            ["-q", "--q-method", "gptq", "--tuning-iterations", "9"],
            "effect with --q-method gptq",
        ),
        (["--tuning-iterations", "9"], "no effect without -q"),
        (["--variants", "bf16", "--tuning-iterations", "9"], "without --q-method autoround"),
        (["--variants", "4bit", "--tuning-iterations", "9"], "no effect with --q-method rtn"),
    ],
)
def test_contradictions_are_usage_errors(twin_of, flags, said, tmp_path, capsys):
    source, out = twin_of("llama", "bfloat16"), tmp_path / "out"
    assert status("--hf-path", source, "--mlx-path", out, "--no-validate", *flags) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_targets_choose_affine_formats(twin_of, cache, tinylm, tmp_path):
    assert {spec.mode for spec in candidates("autoround")} == {"affine"}
    text, source = tinylm / "calibration.txt", twin_of("llama", "bfloat16")
    base = options(text, bits=4, iterations=1, sequences=2, length=16)
    out = make(source, tmp_path / "out", replace(base, target_bits=5.0), calibration_data=text)[0]
    recipe = json.loads((out / "conversion.json").read_text())["recipe"]
    assert recipe["quantization"]["method"] == "autoround"
    assert recipe["tuning"]["iterations"] == 1
    assert recipe["allocation"]["basis"] == "activations"
