"""KV settings of an output: written, measured, vouched for, refused, and whole after a kill."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from quant.kv.measure import forward_of
from quant.kv.runtime import own_caches
from quant.kv.spec import BASES, KvSpec

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.usefixtures("runtimes")


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


@pytest.fixture
def output(tinylm_output):
    return tinylm_output


@pytest.fixture
def brief(monkeypatch):
    """Texts of a few chunks, so that the study of a whole model takes seconds."""
    import quant.kv.study as module

    monkeypatch.setattr(module, "LONG", 512)
    monkeypatch.setattr(module, "STEPS", 8)


def test_stock_loaders_fetch_the_bases_and_take_none_for_weights(monkeypatch):
    """What each asks the hub for has the file; loading is seen where settings are written."""
    import mlx_lm.utils
    import mlx_vlm.utils
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def snapshot(*given, allow_patterns, **more):
        asked.append(allow_patterns)
        return "."

    for module in (mlx_lm.utils, mlx_vlm.utils):
        monkeypatch.setattr(module, "snapshot_download", snapshot)
    mlx_lm.utils._download("somebody/model")
    mlx_vlm.utils.get_model_path("somebody/model")
    files = ["model.safetensors", BASES, "kv_cache.npz", "other/bases.bin"]
    for patterns in asked:
        assert list(filter_repo_objects(files, allow_patterns=patterns)) == files[:2]
    assert len(asked) == 2


def test_killed_anywhere_a_study_leaves_all_or_nothing(output, tmp_path, monkeypatch):
    """At every step of the file system; the next run goes on, and finds what was there or all."""
    import os

    from converter import renewal
    from converter.earlier import complete
    from converter.manifest import renewed, verify
    from converter.renewal import renew

    class Killed(BaseException):
        pass

    more = {"kv_cache.json": b"{}", BASES: b"bases", "config.json": b'{"new": 1}'}
    less = {"kv_cache.json": b"[]", BASES: None}
    first = tmp_path / "first"
    shutil.copytree(output, first)
    renew(first, {**more, "conversion.json": renewed(first, more)})
    verify(first)
    for files, start in ((more, output), (less, first)):
        before = (start / "conversion.json").read_bytes()
        unchanged: set[bool] = set()
        killed, step = True, 0
        while killed:
            out = tmp_path / f"{start.name}-{step}"
            shutil.copytree(start, out)
            left = [step]

            def counted(call, left=left):
                def checked(*given, **more):
                    if str(given[0]).endswith(".lock"):  # which dies with its process
                        return call(*given, **more)
                    left[0] -= 1
                    if left[0] < 0:
                        raise Killed
                    return call(*given, **more)

                return checked

            with monkeypatch.context() as patched:
                patched.setattr(renewal, "write_atomic", counted(renewal.write_atomic))
                patched.setattr(os, "replace", counted(os.replace))
                for name in ("rename", "unlink", "rmdir", "mkdir"):
                    patched.setattr(Path, name, counted(getattr(Path, name)))
                try:
                    renew(out, {**files, "conversion.json": renewed(out, files)})
                    killed = False
                except Killed:
                    pass
            complete(out)
            verify(out)
            assert not list(out.glob(".renewal*"))
            same = (out / "conversion.json").read_bytes() == before
            assert (out / BASES).exists() == ((start is first) == same)
            unchanged.add(same)
            shutil.rmtree(out)
            step += 1
        assert unchanged == {True, False}
        assert step > 8


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
        jsonschema.validate({**config, "schema": 3}, schema)
    spec = KvSpec.from_json(config)
    # Norms of 8 bits leave 8 for the codes: as many bytes as four bits and a norm of 16.
    assert {layer.key.bits for layer in spec.layers} == {4.125}
    assert all(layer.key.top > 0 for layer in spec.layers)
    assert config["effective_bits"] == 4.25
    assert json.loads((out / "kv_cache.json").read_text()) == report
    chosen = report["chosen"]["long"]
    for part in ("prefill", "decode"):
        assert chosen[part]["all"]["kl_mean"] < 2e-3
        assert chosen[part]["keys only"]["kl_mean"] + chosen[part]["values only"]["kl_mean"] > 0
    assert chosen["decode"]["all"]["positions"] == 8
    measured = {row["flags"]: row for row in report["stock"] if "error" not in row}
    # mlx-vlm's turboquant leaves the last of three or more layers as it was.
    last, turbo = len(spec.layers) - 1, "--kv-bits 4 --kv-quant-scheme turboquant"
    left = next(row for flags, row in measured.items() if flags.startswith(turbo))
    assert left["in_float"] == [last]
    assert left["effective_bits"] == round((last * 4.25 + 16) / (last + 1), 4)
    assert not measured["--kv-bits 4 --kv-group-size 64 --quantized-kv-start 0"]["in_float"]
    assert report["flags"][0]["kl_mean"] == min(
        row["long"]["decode"]["all"]["kl_mean"] for row in measured.values()
    )
    assert f"{turbo} --quantized-kv-start 0; layer {last} in float" in summary_text(report)
    card = write_card(out).read_text()
    assert f"--quantized-kv-start 0`; layer {last} in float |" in card
    assert "## KV cache" in card
    assert "--kv-bits 4 --kv-group-size 64" in card
    # The stock runtimes still load it: they do not read the new key.
    from validate.runtime import MlxRuntime

    for runtime in ("mlx_lm", "mlx_vlm"):
        MlxRuntime.load(out, runtime=runtime)


@pytest.mark.usefixtures("brief")
def test_learned_bases_are_written_and_taken_away_again(output, tmp_path, monkeypatch):
    """With `auto`, on a text of a few chunks, the settings name bases, which the file holds."""
    import quant.kv.study as module
    from converter.kv import study_output
    from converter.manifest import verify
    from converter.ui import Console
    from validate.runtime import MlxRuntime

    every = module.stock_settings
    monkeypatch.setattr(module, "stock_settings", lambda *given: every(*given)[1:2])
    out = tmp_path / "out"
    shutil.copytree(output, out)
    given = {"group": None, "text": None, "console": Console(quiet=True)}
    report = study_output(out, scheme="auto", bits=3, **given)
    verify(out)
    config = json.loads((out / "config.json").read_text())["kv_cache_quantization"]
    schema = json.loads((DOCS / "kv_cache_quantization.schema.json").read_text())
    jsonschema.validate(config, schema)
    spec = KvSpec.load(out)
    assert spec.bases
    assert json.loads(json.dumps(spec.to_json()))["layers"] == config["layers"]
    assert config["effective_bits"] <= 3
    stock = [row for row in report["stock"] if row["flags"].startswith("--kv-bits 4 --kv-group")]
    kls = [row["long"]["prefill"]["all"]["kl_mean"] for row in (report["chosen"], *stock)]
    assert kls[0] < kls[1]
    for runtime in ("mlx_lm", "mlx_vlm"):  # neither takes the file for weights
        MlxRuntime.load(out, runtime=runtime)
    study_output(out, scheme="uniform", bits=4, **given)
    verify(out)
    assert not (out / BASES).parent.exists()
    assert not KvSpec.load(out).bases


def test_a_text_too_short_to_tell_is_refused_and_nothing_changes(output, tmp_path):
    from converter.errors import ConvertError
    from converter.kv import study_output
    from converter.ui import Console

    text = tmp_path / "short.txt"
    text.write_text("Too short to tell.")
    before = (output / "config.json").read_bytes()
    with pytest.raises(ConvertError, match="tokens of text: a KV study needs 512"):
        study_output(
            output, scheme="auto", bits=4, group=None, text=text, console=Console(quiet=True)
        )
    assert (output / "config.json").read_bytes() == before
    assert not (output / "kv_cache.json").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"scheme": "turboquant", "bits": 3.3}, r"layer 0, keys: 3\.3 bits do not split 64 chan"),
        ({"scheme": "uniform", "bits": 4, "group": 128}, "groups of 128 do not divide 64 channels"),
    ],
)
def test_a_study_refuses_what_a_plan_does(output, asked, message):
    from converter.errors import ConvertError
    from converter.kv import study_output
    from converter.ui import Console

    given = {"group": None, "text": None, "console": Console(quiet=True), **asked}
    with pytest.raises(ConvertError, match=message):
        study_output(output, **given)


def test_what_stops_the_end_of_a_study_is_told_before_it(output, tmp_path, monkeypatch):
    """A folder that nothing can be written into, and a text that cannot be read."""
    import errno

    from converter.errors import ConvertError, UsageError
    from converter.execute import folder
    from converter.kv import study_output
    from converter.ui import Console
    from validate.runtime import MlxRuntime

    def load(*given, **more):
        raise AssertionError("the model was loaded")

    def refused(*given, **more):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(MlxRuntime, "load", load)
    given = {"scheme": "auto", "bits": 4, "group": None, "console": Console(quiet=True)}
    with pytest.raises(UsageError, match=r"--calibration-data .*none\.txt: no such file"):
        study_output(output, text=tmp_path / "none.txt", **given)
    monkeypatch.setattr(folder, "lock", refused)
    with pytest.raises(ConvertError, match="no permission to write here"):
        study_output(output, text=None, **given)


def test_a_context_too_short_to_study_is_told_from_the_config(twin_of, tmp_path):
    from converter.errors import PlanError
    from converter.kv import KvAsked
    from converter.pipeline import Request, plan_request

    short = tmp_path / "short"
    shutil.copytree(twin_of("qwen2"), short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    with pytest.raises(PlanError, match="a context of 256 tokens is too short to study: 512"):
        plan_request(Request(hf_path=str(short), kv=KvAsked(scheme="auto")))


@pytest.mark.parametrize(("text", "status"), [("some.txt", 0), ("none.txt", 2)])
def test_convert_takes_a_text_to_measure_on(twin_of, tmp_path, capfd, text, status):
    from converter.cli.app import cli
    from converter.cli.errors import run

    (tmp_path / "some.txt").write_text("Some text.")
    arguments = ["plan", "--hf-path", str(twin_of("qwen2")), "--kv-quant-scheme", "auto"]
    arguments += ["--calibration-data", str(tmp_path / text)]
    assert run(lambda: cli.main(arguments, standalone_mode=False)) == status
    assert ("no such file" in capfd.readouterr().err) == bool(status)


def test_the_study_has_the_fast_blas(output):
    """Whether MLX was first imported after the fast BLAS is seen in a process of its own only."""
    code = f"""
import quant.kv.study as module
from pathlib import Path
from converter.kv import study_output
from converter.ui import Console
from quant.kv.turbo import KvError
from validate.runtime import prepare_mlx

def stopped(*given, **named):
    raise KvError("prepared" if prepare_mlx() else "MLX came first")

module.study = stopped
study_output(Path({str(output)!r}), scheme="auto", bits=4, group=None, text=None,
             console=Console(quiet=True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "cannot be quantized as asked: prepared" in done.stderr


@pytest.mark.parametrize(
    ("model_type", "asked", "message"),
    [
        ("qwen2", {"scheme": "uniform"}, "layer 0, keys: groups of 64 do not divide 32 channels"),
        ("qwen2", {"scheme": "turboquant", "bits": 3.3}, r"3\.3 bits do not split 32 channels"),
        ("deepseek_v3", {"scheme": "auto"}, "4 layers stay in float: .* reads keys and values"),
        ("gpt_oss", {"scheme": "auto"}, "2 layers stay in float: its cache is a RotatingKVCache"),
        ("bert", {"scheme": "auto"}, "no stock runtime generates text with bert"),
        ("gemma3n", {"scheme": "auto"}, "1 layer stays in float: .* reads keys and values itself"),
        ("florence2", {"scheme": "auto"}, "layers stay in float: its cache is a CacheList"),
        ("qwen3_dflash", {"scheme": "auto"}, "does not run its DFlashDraftModel on a text alone"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_converted(twin_of, model_type, asked, message):
    from converter.errors import PlanError
    from converter.kv import KvAsked
    from converter.pipeline import Request, plan_request

    request = Request(hf_path=str(twin_of(model_type)), kv=KvAsked(**asked))
    with pytest.raises(PlanError, match=f"--kv-quant-scheme.*{message}"):
        plan_request(request)


def test_the_plan_says_which_layers_stay_in_float(twin_of, capfd):
    from converter.cli.app import cli
    from converter.cli.errors import run

    arguments = ["plan", "--hf-path", str(twin_of("minicpmv4_6")), "--kv-quant-scheme", "auto"]
    assert run(lambda: cli.main(arguments, standalone_mode=False)) == 0
    shown = capfd.readouterr().out
    assert "KV cache: 2 of 6 layers can be quantized" in shown
    assert "4 layers stay in float: its cache is an ArraysCache" in shown


def test_layers_that_read_the_keys_of_another_are_served(twin_of):
    """Gemma 4: three caches for six layers, the last of which take an earlier one's keys."""
    from converter.kv import KvAsked
    from converter.pipeline import Request, plan_request

    told = plan_request(Request(hf_path=str(twin_of("gemma4")), kv=KvAsked(scheme="auto"))).kv
    assert told[0] == "KV cache: 1 of 3 layers can be quantized"


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
