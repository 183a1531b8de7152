"""Parity block by block: the whole model's numbers, one block's weights in memory at a time."""

import json
from collections import Counter

import numpy as np
import pytest

from benchmarks.checkpoint import Shape, make_release
from converter.blockwise import blockwise
from converter.errors import ConvertError, UsageError
from converter.memory import _vm_stat, available_memory, group_room, size_of
from converter.pipeline import Request, convert
from converter.plan import Options
from converter.proof import prove
from converter.source import open_folder
from converter.ui import Console
from converter.written import PlannedReader, unwritten_weights, written_weights
from quant.recipe import QuantSpec
from validate.answers import Question
from validate.cases import Case
from validate.metrics import relative_error
from validate.reference import ReferenceError, TorchReference
from validate.runtime import MlxRuntime, RuntimeRefusal, runtimes_for
from validate.streamed.reference import GREEDY_TOKENS, StreamedReference
from validate.streamed.runtime import StreamedRuntime
from validate.streamed.tensors import Tensors, whole_run_bytes

QUIET = Console(quiet=True)
ROUNDING = 3e-6
# Dense, experts, windows, shared keys and values behind towers, a hybrid, latent attention, mamba.
FAMILIES = ("qwen3", "qwen3_moe", "gemma3", "gemma4", "qwen3_5", "deepseek_v3", "falcon_h1")
FOUR_BIT = Options(quant=QuantSpec.make("affine", 4, 32))


@pytest.fixture(autouse=True)
def _small_tables(monkeypatch, runtimes):
    for side in ("tables", "slices"):
        monkeypatch.setattr(f"validate.streamed.{side}.TABLE_BYTES", 0)
        monkeypatch.setattr(f"validate.streamed.{side}.SLICE_BYTES", 1 << 14)


def questions():
    cases = (Case("one", "text"), Case("two", "code"))
    ids = (tuple(range(5, 29)), (7, 300, 8, 9, 7, 120, 33))
    return [Question(case, row) for case, row in zip(cases, ids, strict=True)]


def tensors_of(folder, reader):
    found = open_folder(folder).tensors
    return Tensors(
        folder=folder,
        reader=reader,
        shapes={name: info.shape for name, info in found.items()},
        dtypes={name: info.dtype for name, info in found.items()},
    )


def ask(folder, reader, **options):
    model = StreamedReference.open(tensors_of(folder, reader), **options)
    return model.answers(questions(), lambda text: None)


def converted(source, out, options=FOUR_BIT):
    return convert(Request(hf_path=str(source), mlx_path=out, recipes=(options,)), QUIET)[0]


class Counting:
    """Counts the rows that are read of each tensor."""

    def __init__(self, reader):
        self.reader = reader
        self.rows = Counter()

    def read_rows(self, name, start, stop):
        self.rows[name] += stop - start
        return self.reader.read_rows(name, start, stop)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_both_sides_give_the_whole_models_numbers(twin_of, tmp_path, model_type):
    twin = twin_of(model_type, "bfloat16")
    whole = TorchReference.load(twin)
    with open_folder(twin).open() as reader:
        found = ask(twin, reader)
    for question, answer in zip(questions(), found, strict=True):
        greedy = whole.greedy(question.ids, GREEDY_TOKENS)
        assert answer.greedy.tokens == greedy.tokens
        assert relative_error(whole.logits(question.ids), answer.logits) < ROUNDING
        assert relative_error(greedy.logits, answer.greedy.logits) < ROUNDING

    converted(twin, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in runtimes_for(config):
        models = [
            kind.load(tmp_path / "out", runtime=name) for kind in (MlxRuntime, StreamedRuntime)
        ]
        results = []
        for model in models:
            model.to_float32(dense=True)
            asked = [(model.text_inputs(a.question.ids), a.greedy.tokens) for a in found]
            results.append(model.runs(asked))
        for a, b in zip(*results, strict=True):
            assert relative_error(a.prefill, b.prefill) < ROUNDING
            assert relative_error(a.steps, b.steps) < ROUNDING


def made(root, **sizes):
    """A release, its 4-bit output, and what made that."""
    shape = Shape(**sizes)
    make_release(root / "release", shape.config(), list(shape.tensors()))
    done = converted(root / "release", root / "out")
    return root / "release", root / "out", done


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Twelve blocks."""
    sizes = {"hidden": 256, "intermediate": 768, "head_dim": 64, "kv": 128, "layers": 12}
    return made(tmp_path_factory.mktemp("deep"), **sizes, tied=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three blocks."""
    sizes = {"hidden": 64, "intermediate": 96, "head_dim": 32, "kv": 32, "layers": 3}
    return made(tmp_path_factory.mktemp("small"), **sizes, tied=False)


def test_every_weight_is_read_once_in_a_pass(small):
    source, _, _ = small
    with open_folder(source).open() as reader:
        counting = Counting(reader)
        ask(source, counting)
    shapes = {name: info.shape for name, info in open_folder(source).tensors.items()}
    table = "model.embed_tokens.weight"
    for name, shape in shapes.items():
        if name != table:
            assert counting.rows[name] == GREEDY_TOKENS * shape[0]
    read, all_rows = counting.rows[table], GREEDY_TOKENS * shapes[table][0]
    assert 0 < read < all_rows / 4, "of the vocabulary only the rows of tokens that occur"


def test_the_runtime_holds_one_block(deep):
    import mlx.core as mx

    _, out, _ = deep
    model = StreamedRuntime.load(out, runtime="mlx_lm")
    whole = whole_run_bytes({k: i.shape for k, i in open_folder(deep[0]).tensors.items()})
    for dense, share in ((True, 4), (False, 4)):
        model.to_float32(dense=dense)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        model.runs([(model.text_inputs((5, 6, 7)), (1, 2, 3))])
        assert mx.get_peak_memory() - before < whole / share
        assert mx.get_active_memory() - before < 1 << 20


def test_a_model_that_holds_its_weights_is_refused(small, monkeypatch):
    import mlx.core as mx
    from mlx_lm.models import qwen3

    stock = qwen3.MLP.__call__

    def hasty(self, x):
        mx.eval(self.gate_proj.weight)
        return stock(self, x)

    monkeypatch.setattr(qwen3.MLP, "__call__", hasty)
    monkeypatch.setattr("validate.streamed.runtime._HELD", 1 << 12)
    model = StreamedRuntime.load(small[1], runtime="mlx_lm")
    model.to_float32(dense=True)
    with pytest.raises(RuntimeRefusal, match="computes values while it is being called"):
        model.run(model.text_inputs((5, 6, 7)))


def test_a_fault_in_one_block_fails_the_report(small):
    source, out, done = small
    good = prove(out, source=source, console=QUIET, plan=done.plan, memory_limit=0)
    assert good["verdict"] == "pass"
    row = next(check for check in good["checks"] if check["name"] == "streamed")
    assert "block by block" in row["note"]
    names = {(check["name"], check["modality"]) for check in good["checks"]}
    assert {
        ("logits", "unicode"),
        ("decode", "text"),
        ("greedy", "code"),
        ("loss", "text"),
    } <= names
    assert ("batch", "text") not in names, "a batch takes the whole model"
    assert "texts in one batch" in row["note"]
    reader = PlannedReader.read_rows

    def planted(self, name, start, stop):
        rows = reader(self, name, start, stop)
        return rows * 1.01 if name == "model.layers.1.mlp.down_proj.weight" else rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlannedReader, "read_rows", planted)
        bad = prove(out, source=source, console=QUIET, plan=done.plan, memory_limit=0)
    assert bad["verdict"] == "fail"
    failed = {(c["name"], c["runtime"]) for c in bad["checks"] if c["verdict"] == "fail"}
    assert failed >= {("logits", "mlx_vlm"), ("logits", "mlx_lm"), ("decode", "mlx_lm")}


def test_weights_need_not_be_written_to_be_read(small):
    source, out, _ = small
    with written_weights(out, source) as folder, unwritten_weights(out, source) as (other, planned):
        written = open_folder(folder)
        assert planned.shapes == {name: info.shape for name, info in written.tensors.items()}
        assert planned.dtypes == {name: info.dtype for name, info in written.tensors.items()}
        assert json.loads((other / "config.json").read_text()) == written.config
        with written.open() as reader:
            for name, shape in planned.shapes.items():
                expected = reader.read_rows(name, 0, shape[0])
                assert np.array_equal(planned.read_rows(name, 0, shape[0]), expected)
                part = planned.read_rows(name, 1, 3)
                assert np.array_equal(part, expected[1:3])


def test_rounding_goes_to_parameters_alone(twin_of):
    twin = twin_of("qwen3", "float32")
    whole = TorchReference.load(twin)
    whole.round_to("bfloat16")
    with open_folder(twin).open() as reader:
        found = ask(twin, reader, round_to="bfloat16")
    for question, answer in zip(questions(), found, strict=True):
        assert relative_error(whole.logits(question.ids), answer.logits) < ROUNDING


def test_what_fits_is_not_streamed(small):
    source, out, done = small
    needed = whole_run_bytes({k: i.shape for k, i in open_folder(source).tensors.items()})
    with blockwise(out, source, plan=done.plan, limit=needed) as streaming:
        assert streaming is None
    with blockwise(out, source, plan=done.plan) as streaming:
        assert streaming is None
    with blockwise(out, source, plan=done.plan, limit=needed - 1) as streaming:
        assert streaming is not None
        assert streaming.exact is not None


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("bert", "only models that write text"),
        ("florence2", "has an encoder beside its decoder"),
    ],
)
def test_what_cannot_be_streamed_says_why(twin_of, tmp_path, model_type, why):
    twin = twin_of(model_type)
    done = converted(twin, tmp_path / "out", Options())
    with pytest.raises(ConvertError, match=f"block by block: .*{why}"):
        prove(tmp_path / "out", source=twin, console=QUIET, plan=done.plan, memory_limit=0)


def test_a_tensor_that_is_not_there_is_named(twin_of):
    twin = twin_of("qwen3", "bfloat16")
    with open_folder(twin).open() as reader:
        tensors = tensors_of(twin, reader)
        lost = "model.layers.1.mlp.up_proj.weight"
        shapes = {name: shape for name, shape in tensors.shapes.items() if name != lost}
        short = Tensors(folder=twin, reader=reader, shapes=shapes, dtypes=tensors.dtypes)
        with pytest.raises(ReferenceError, match=f"1 parameters .* no weights .*: {lost}"):
            StreamedReference.open(short)


def test_memory_is_what_the_system_and_its_groups_leave(tmp_path):
    assert 0 < available_memory() < 1 << 50
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, most, used in ((inner, "max", 5), (inner.parent, "1000", 900)):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 1\nactive_file 30\ninactive_file 20\n")
    assert list(group_room(tmp_path, "0::/outer/inner\n")) == [150]
    assert list(group_room(tmp_path, "1:cpu:/x\n")) == []
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10.\n"
        "Pages active:                            500.\n"
        "Pages inactive:                           20.\n"
        "Pages speculative:                         3.\n"
        "Pages purgeable:                           4.\n"
        "File-backed pages:                        23.\n"
    )
    assert _vm_stat(text) == 37 * 16384
    assert size_of("6GiB", "--memory-limit") == 6 << 30
    with pytest.raises(UsageError, match="--memory-limit six: give a size such as"):
        size_of("six", "--memory-limit")


def test_the_flag_is_checked_before_anything_is_read(program, tmp_path):
    import subprocess

    words = ["--hf-path", str(tmp_path), "--memory-limit", "much"]
    done = subprocess.run([*program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--memory-limit much: give a size" in done.stderr
