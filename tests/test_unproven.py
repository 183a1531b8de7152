"""Releases that no torch class here computes: their twins, reports, gate, cards and matrix row."""

import importlib
import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from release_helpers import same_bits, status, stored
from safetensors.numpy import save_file

from arch_maps import registry
from arch_maps.models import llama
from benchmarks.matrix import row_of, table
from benchmarks.matrix_stock import loaded_equal, tensors_equal, under_own_name
from converter.errors import GateError
from converter.manifest import read_manifest, verify
from converter.proof import prove, require_proof
from converter.ui import Console
from validate.alone import _seen_once
from validate.checks import NOT_COMPARED, Check, Report
from validate.loaded import compare_loaded
from validate.parity import run_parity
from validate.reference import lacks_class
from validate.runtime import prepare_mlx
from validate.twin import TwinError, examples, load_example, make_twin

prepare_mlx()
# transformers, reading the config of a type that it does not know to find the tokenizer's class.
pytestmark = pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")

CODE = """
from dataclasses import replace
from arch_maps.models import llama
MAP = replace(llama.MAP, model_type="fleece")
"""


def fleece_config() -> dict:
    named = {"model_type": "fleece", "architectures": ["FleeceForCausalLM"]}
    return {**load_example("llama"), "rope_scaling": None, **named}


@pytest.fixture(scope="module", autouse=True)
def fleece(tmp_path_factory):
    """A type that has a map and runs in both runtimes as llama, and that transformers lacks."""
    package = tmp_path_factory.mktemp("models")
    (package / "fleece.py").write_text(CODE)
    models = importlib.import_module("arch_maps.models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "__path__", [*models.__path__, str(package)])
        for name in ("mlx_vlm.utils", "mlx_lm.utils"):
            patch.setitem(import_module(name).MODEL_REMAPPING, "fleece", "llama")
        registry.model_types.cache_clear()
        registry.find.cache_clear()
        yield
    registry.model_types.cache_clear()
    registry.find.cache_clear()


@pytest.fixture(scope="module")
def twin(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fleece") / "twin"
    info = make_twin(fleece_config(), folder)
    assert info.from_map
    assert info.tensors == len(stored(folder))
    assert info.parameters == sum(t.size for t in stored(folder).values())
    return folder


@pytest.fixture(scope="module")
def output(twin, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    assert status("--hf-path", twin, "--mlx-path", out, "--quiet") == 0
    return out


@pytest.fixture
def copied(output, tmp_path) -> Path:
    shutil.copytree(output, tmp_path / "out")
    return tmp_path / "out"


def rows(report) -> dict[str, str]:
    return {c["name"]: c["verdict"] for c in report["checks"] if c["runtime"] in ("", "mlx_vlm")}


class TestTwin:
    def test_has_the_names_and_shapes_of_the_map(self, twin):
        from arch_maps.facts import Facts
        from arch_maps.ops import sources

        config = json.loads((twin / "config.json").read_text())
        tensors = llama.MAP.expand(Facts(config), llama.MAP.layouts[0])
        wanted = {
            leaf.name: tuple(map(int, leaf.shape))
            for rule in tensors.rules
            for leaf in sources(rule.expr)
        }
        assert {name: t.shape for name, t in stored(twin).items()} == wanted

    def test_has_values_no_wrong_map_can_hide_behind(self, twin):
        tensors = stored(twin)
        for name, tensor in tensors.items():
            assert np.isfinite(tensor).all()
            assert np.unique(tensor).size > tensor.size // 2, name
            if tensor.ndim == 1:
                assert 0.69 < tensor.min() < tensor.max() < 1.31, name
            else:
                spread = tensor.std() * tensor.shape[-1] ** 0.5
                assert 0.9 < spread < 1.1, name
        first, second = (tensors[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
        assert not np.array_equal(first, second)

    def test_is_the_same_again_and_another_with_another_seed(self, twin, tmp_path):
        make_twin(fleece_config(), tmp_path / "again")
        make_twin(fleece_config(), tmp_path / "other", seed=1)
        again, other, first = (stored(p) for p in (tmp_path / "again", tmp_path / "other", twin))
        assert all(same_bits(again[name], first[name]) for name in first)
        assert not any(same_bits(other[name], first[name]) for name in first)

    def test_keeps_its_dtype_and_shards(self, tmp_path):
        make_twin(fleece_config(), tmp_path / "t", dtype="bfloat16", max_shard_size="300KB")
        assert {str(t.dtype) for t in stored(tmp_path / "t").values()} == {"bfloat16"}
        assert (tmp_path / "t" / "model.safetensors.index.json").exists()
        assert len(list((tmp_path / "t").glob("*.safetensors"))) > 1

    def test_a_known_class_is_still_made_by_transformers(self, tmp_path):
        assert not make_twin(load_example("llama"), tmp_path / "t").from_map

    def test_a_type_without_class_or_map_is_an_error(self, tmp_path):
        config = {**fleece_config(), "model_type": "wool"}
        with pytest.raises(TwinError, match=r"no FleeceForCausalLM.*'wool' has no map"):
            make_twin(config, tmp_path / "t")
        assert not (tmp_path / "t").exists()

    def test_a_config_that_the_map_refuses_is_named(self, tmp_path):
        config = fleece_config()
        del config["vocab_size"]
        with pytest.raises(TwinError, match=r"family must adjust.*does not state vocab_size"):
            make_twin(config, tmp_path / "t")

    def test_norms_that_add_one_lie_around_zero(self):
        from arch_maps.ops import Affine, Source
        from arch_maps.rules import Drop, Kind, Rule, Tensors
        from validate.twin.mapped import _levels

        def rule(name, expr, kind):
            return Rule(name, expr, kind, "text")

        tensors = Tensors(
            rules=[
                rule("a", Source("plain.weight", (4,)), Kind.NORM),
                rule("b", Affine(Source("plus.weight", (4,)), offset=1.0), Kind.NORM),
                rule("c", Source("mixer.D", (4,)), Kind.STATE),
                rule("d", Source("mixer.dt_bias", (4,)), Kind.STATE),
                rule("e", Source("o.bias", (4,)), Kind.BIAS),
            ],
            drops=[
                Drop("needed", "why", (2, 3), required=True),
                Drop("optional", "why", (2, 3)),
            ],
        )
        assert _levels(tensors) == {
            "plain.weight": ((4,), 1.0),
            "plus.weight": ((4,), 0.0),
            "mixer.D": ((4,), 1.0),
            "mixer.dt_bias": ((4,), 0.0),
            "o.bias": ((4,), 0.0),
            "needed": ((2, 3), 0.0),
        }

    def test_command_says_where_the_names_come_from(self, twin, tmp_path, capsys):
        assert status("twin", twin, tmp_path / "t") == 0
        assert "transformers has no class of it" in capsys.readouterr().out
        assert status("twin", "llama", tmp_path / "u") == 0
        assert "no class" not in capsys.readouterr().out


class TestReport:
    def test_is_unproven_and_says_why(self, output):
        report = json.loads((output / "parity.json").read_text())
        assert report["verdict"] == "unproven"
        assert rows(report) == {
            "reference": "info",
            "load": "pass",
            "weights": "pass",
            "tokens": "pass",
            "finite": "pass",
            "prefill = decode": "pass",
        }
        assert {c["runtime"] for c in report["checks"]} == {"", "mlx_vlm", "mlx_lm"}
        note = report["checks"][0]["note"]
        assert NOT_COMPARED in note
        assert "has no FleeceForCausalLM, and the release brings no model code" in note
        html = (output / "parity.html").read_text()
        assert "Parity is unproven" in html
        assert note in html

    def test_own_code_is_asked_for_by_its_flag(self, twin, tmp_path):
        shutil.copytree(twin, tmp_path / "t")
        path = tmp_path / "t" / "config.json"
        auto = {"AutoModelForCausalLM": "modeling_fleece.FleeceForCausalLM"}
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto}))
        why = lacks_class(tmp_path / "t", trust_remote_code=False)
        assert "--trust-remote-code" in why
        assert lacks_class(tmp_path / "t", trust_remote_code=True) == ""

    def test_a_known_class_has_nothing_lacking(self, twin_of):
        assert lacks_class(twin_of("llama"), trust_remote_code=False) == ""

    def test_quantized_output_runs_its_packed_kernel(self, twin, tmp_path):
        out = tmp_path / "q"
        assert status("--hf-path", twin, "--mlx-path", out, "-q", "--quiet") == 0
        report = json.loads((out / "parity.json").read_text())
        assert report["verdict"] == "unproven"
        assert rows(report)["packed kernel"] == "pass"

    def test_weights_that_load_otherwise_fail(self, twin, copied):
        tensors = stored(copied)
        tensors["model.layers.0.surplus.weight"] = np.ones((4, 4), np.float32)
        save_file(tensors, copied / "model.safetensors", metadata={"format": "mlx"})
        report = run_parity(source=twin, mlx_path=copied, plan=None)
        assert report.verdict == "fail"

    def test_numbers_that_are_not_finite_fail(self, twin, copied):
        tensors = stored(copied)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32("inf")
        save_file(tensors, copied / "model.safetensors", metadata={"format": "mlx"})
        report = run_parity(source=twin, mlx_path=copied, plan=None)
        failed = {c.name for c in report.checks if c.verdict == "fail"}
        assert report.verdict == "fail"
        assert "finite" in failed

    def test_decode_that_leaves_prefill_fails(self, twin, output, monkeypatch):
        """A cache that forgets its offset: right in one go, wrong token by token."""
        rope = import_module("mlx.nn").RoPE
        whole = rope.__call__
        monkeypatch.setattr(
            rope, "__call__", lambda self, x, offset=0: whole(self, x, offset=offset // 2)
        )
        report = run_parity(source=twin, mlx_path=output, plan=None)
        check = next(c for c in report.checks if c.name == "prefill = decode")
        assert check.verdict == "fail"
        assert check.value > 1e-2
        assert report.verdict == "fail"

    def test_other_token_ids_fail(self, twin, output, tmp_path):
        shutil.copytree(output, tmp_path / "out")
        path = tmp_path / "out" / "tokenizer.json"
        data = json.loads(path.read_text())
        data["normalizer"] = {"type": "Lowercase"}
        path.write_text(json.dumps(data))
        report = run_parity(source=twin, mlx_path=tmp_path / "out", plan=None)
        assert {c.name for c in report.checks if c.verdict == "fail"} == {"tokens"}

    def test_a_tokenizer_that_does_not_load_fails(self, twin, output, tmp_path):
        """transformers reads scaled positions of a type that it does not know, and stumbles."""
        shutil.copytree(twin, tmp_path / "t")
        path = tmp_path / "t" / "config.json"
        scaling = {"rope_type": "yarn", "factor": 4.0}
        path.write_text(json.dumps({**json.loads(path.read_text()), "rope_scaling": scaling}))
        report = run_parity(source=tmp_path / "t", mlx_path=output, plan=None)
        failed = [c for c in report.checks if c.verdict == "fail"]
        assert {c.name for c in failed} == {"tokens"}
        assert "cannot load its tokenizer" in failed[0].note

    def test_verdicts(self):
        def verdict(*checks):
            return Report(plan=None, reference={}, runtime={}, checks=checks).verdict

        reference = Check("reference", "text", "info")
        passed, failed = Check("logits", "text", "pass"), Check("finite", "text", "fail")
        assert verdict(reference) == "unproven"
        assert verdict(reference, failed) == "fail"
        assert verdict(passed) == "pass"
        assert verdict(Check("weights", "weights", "pass")) == "fail"
        assert verdict() == "fail"


class TestGate:
    @pytest.fixture
    def hub(self, monkeypatch):
        """What would be uploaded, without a hub."""
        sent = []

        def upload(out, repo_id, **settings):
            sent.append((repo_id, sorted(settings["paths"])))
            return f"https://hub/{repo_id}"

        monkeypatch.setattr("converter.hub.upload", upload)
        monkeypatch.setattr("converter.hub.writer", lambda named: "me")
        return sent

    def test_converting_alone_is_done_and_says_so(self, twin, tmp_path, capsys):
        assert status("--hf-path", twin, "--mlx-path", tmp_path / "o", "--quiet") == 0
        assert f"parity: unproven ({NOT_COMPARED})" in capsys.readouterr().out

    def test_validate_is_done_and_says_so(self, twin, copied, capsys):
        assert status("validate", "--hf-path", twin, "--mlx-path", copied) == 0
        assert f"unproven ({NOT_COMPARED})" in capsys.readouterr().out

    def test_upload_with_converting_needs_the_flag(self, twin, tmp_path, hub, capsys):
        words = ["--hf-path", twin, "--mlx-path", tmp_path / "o", "--upload-repo", "me/x"]
        assert status(*words, "--quiet") == 4
        error = capsys.readouterr().err
        assert "--allow-unproven" in error
        assert "has no FleeceForCausalLM" in error
        assert hub == []
        assert status(*words, "--quiet", "--overwrite", "--allow-unproven") == 0
        assert [repo for repo, _ in hub] == ["me/x"]

    def test_upload_alone_needs_the_flag(self, copied, hub, capsys):
        assert status("upload", copied, "--upload-repo", "me/x") == 4
        assert "--allow-unproven" in capsys.readouterr().err
        assert status("upload", copied, "--upload-repo", "me/x", "--allow-unproven") == 0
        assert {"README.md", "conversion.json", "parity.json"} <= set(hub[0][1])

    def test_the_flag_lets_no_failed_report_through(self, copied):
        path = copied / "parity.json"
        report = json.loads(path.read_text())
        report["checks"][1]["verdict"] = report["verdict"] = "fail"
        path.write_text(json.dumps(report))
        with pytest.raises(GateError, match="says fail"):
            require_proof(copied, allow_unproven=True)

    def test_card_and_manifest_say_so(self, output):
        card = (output / "README.md").read_text()
        assert "**Verdict: unproven.**" in card
        assert NOT_COMPARED in card
        assert "was compared with the source in PyTorch" not in card
        assert read_manifest(output).data["reference"] == NOT_COMPARED
        verify(output)

    def test_the_manifest_forgets_it_once_there_is_a_reference(self, twin, copied, monkeypatch):
        """The same folder, judged when the class has come to transformers."""
        import transformers

        class Fleece(transformers.LlamaForCausalLM):
            pass

        monkeypatch.setattr(transformers, "FleeceForCausalLM", Fleece, raising=False)
        report = prove(copied, source=twin, console=Console(quiet=True))
        assert report["verdict"] == "pass"
        assert "reference" not in read_manifest(copied).data
        verify(copied)


class TestMatrix:
    def test_equal_tensors_are_said_to_be(self, twin, output, tmp_path):
        assert tensors_equal(output, output) == "equal bit for bit"
        assert loaded_equal(output, twin, runtime="mlx_vlm") == "equal bit for bit"

    @pytest.mark.parametrize("fault", ["value", "shape", "missing", "surplus"])
    def test_every_difference_is_named(self, twin, output, copied, fault):
        tensors = stored(copied)
        name = "model.layers.1.mlp.up_proj.weight"
        if fault == "value":
            tensors[name][0, 0] += 1
        elif fault == "shape":
            tensors[name] = tensors[name].T.copy()
        elif fault == "missing":
            del tensors[name]
        else:
            tensors[name.replace("up", "side")] = tensors[name]
        save_file(tensors, copied / "model.safetensors")
        text = tensors_equal(copied, output)
        assert text.startswith("1 of")
        assert "model.layers.1.mlp." in text
        assert loaded_equal(copied, twin, runtime="mlx_vlm").startswith("1 of")

    def test_row_is_unproven_beside_the_stock_tensors(self, monkeypatch):
        monkeypatch.setattr(examples, "load_example", lambda name: fleece_config())
        monkeypatch.setattr("validate.twin.load_example", lambda name: fleece_config())
        row = row_of("fleece")
        assert row.get("error") is None
        assert row["published"]["verdict"] == "unproven"
        assert row["transformers"] == {"verdict": "no class"}
        assert row["stock"]["tensors"] == "equal bit for bit"
        assert row["restored"].startswith("bit for bit")
        line = next(x for x in table([row]).splitlines() if x.startswith("| fleece"))
        assert "unproven" in line
        assert "equal bit for bit" in line

    def test_a_failing_stock_converter_says_its_error(self, monkeypatch):
        def stock(*args, **settings):
            raise ValueError("no such luck")

        monkeypatch.setattr("validate.twin.load_example", lambda name: fleece_config())
        monkeypatch.setattr("benchmarks.matrix.run_stock", stock)
        row = row_of("fleece")
        assert row["stock"]["tensors"] == (
            "ValueError: no such luck (its loader alone: equal bit for bit)"
        )


class TestNames:
    """Releases that share a model_type are told apart by the class that they name."""

    @pytest.mark.parametrize("name", ["deepseekocr", "deepseekocr_2"])
    def test_both_type_strings_take_the_same_map_and_make_the_same_config(self, name):
        from arch_maps.facts import Facts

        published = load_example(name)
        assert published["model_type"] == "deepseek_vl_v2"
        assert registry.map_name(published) == name
        renamed = {**published, "model_type": name}
        arch = registry.find(registry.map_name(renamed))
        made = [arch.config(json.loads(json.dumps(c)), Facts(c)) for c in (published, renamed)]
        assert made[0] == made[1]
        assert made[0]["model_type"] == name

    def test_another_class_of_that_type_keeps_its_own_map(self):
        assert registry.map_name(load_example("deepseek_vl_v2")) == "deepseek_vl_v2"

    def test_stock_is_tried_under_the_name_that_the_runtime_knows(self, twin, tmp_path):
        assert under_own_name(twin, tmp_path / "same") is None
        source = tmp_path / "source"
        shutil.copytree(twin, source)
        published = {"model_type": "deepseek_vl_v2", "architectures": ["DeepseekOCRForCausalLM"]}
        (source / "config.json").write_text(json.dumps(published))
        found = under_own_name(source, tmp_path / "renamed")
        assert json.loads((found / "config.json").read_text())["model_type"] == "deepseekocr"
        assert json.loads((source / "config.json").read_text()) == published
        assert stored(found).keys() == stored(source).keys()


class TestLoaderHabits:
    """What a loader does to a type's weights on every load is expected, and nothing else is."""

    @pytest.fixture
    def falcon(self, tmp_path) -> Path:
        rows = np.arange(12, dtype=np.float32).reshape(6, 2)
        save_file({"a.w13.weight": rows, "a.w2.weight": rows}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "falcon_ocr"}))
        return tmp_path

    def test_rows_that_the_loader_parts_and_tables_that_it_computes(self, falcon):
        mx = import_module("mlx.core")
        rows = mx.arange(12, dtype=mx.float32).reshape(6, 2)
        parted = mx.concatenate([rows[0::2], rows[1::2]])
        loaded = {"a.w13.weight": parted, "a.w2.weight": rows, "m.cos_1d": rows}
        assert compare_loaded(falcon, loaded).problems == ()
        assert len(compare_loaded(falcon, {**loaded, "a.w13.weight": rows}).problems) == 1
        assert len(compare_loaded(falcon, {**loaded, "a.w2.weight": parted}).problems) == 1
        (falcon / "config.json").write_text(json.dumps({"model_type": "llama"}))
        assert len(compare_loaded(falcon, loaded).problems) == 2


class TestPictures:
    def test_a_part_of_a_prompt_takes_its_part_of_what_the_tower_saw(self):
        from mlx_vlm.models.base import InputEmbeddingsFeatures

        mx = import_module("mlx.core")

        class Model:
            runs = 0
            positions = None

            def get_input_embeddings(self, ids, pixels=None, **settings):
                self.runs += 1
                embedded = mx.ones((1, ids.shape[1], 2)) * self.runs
                return InputEmbeddingsFeatures(embedded, position_ids=self.positions)

        model, ids = Model(), mx.zeros((1, 6), dtype=mx.int32)
        with _seen_once(model):
            model.get_input_embeddings(ids)
            part = model.get_input_embeddings(ids[:, :4])
        assert model.runs == 1
        assert part.inputs_embeds.shape == (1, 4, 2)
        model.positions = mx.zeros((1, 6))  # these are not cut, so the tower runs again
        with _seen_once(model):
            model.get_input_embeddings(ids)
            model.get_input_embeddings(ids[:, :4])
        assert model.runs == 3

    def test_pictures_that_the_runtime_gets_wrong_are_said_not_to_be_judged(self, tmp_path):
        from validate.parity import _wants_images

        (tmp_path / "config.json").write_text(json.dumps(load_example("unlimited_ocr")))
        checks: list[Check] = []
        assert not _wants_images(tmp_path, None, checks)
        assert [(c.name, c.verdict) for c in checks] == [("image/logits", "info")]
        assert "not judged" in checks[0].note
