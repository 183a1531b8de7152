"""The command line: statuses, streams, plans as JSON, and verify."""

import json
import os
import pty
import resource
import subprocess
import termios
from contextlib import suppress
from dataclasses import replace

import pytest
from release_helpers import FOUR_BIT, LLAMA, llama_tensors, make, status, write_release

from converter.pipeline import Request, plan_request
from converter.ui import plan_tables


@pytest.fixture
def release(tmp_path):
    return write_release(tmp_path / "in" / "release")


def go(program, *arguments, **settings):
    command = [*program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **settings)


def test_help_is_instant_and_imports_nothing_heavy(program):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = go(program, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "--hf-path" in done.stdout
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 0.5
    code = program[2].replace("main()", "") + (
        "import converter.cli.app; "
        "assert not {'torch', 'mlx', 'numpy', 'transformers', 'numba'} & sys.modules.keys()"
    )
    assert go([program[0], "-c", code]).returncode == 0


@pytest.mark.parametrize("command", ["plan", "validate", "verify", "twin", "maps", "card", "hub"])
def test_every_command_explains_itself(command, program, capsys):
    assert status(command, "--help") == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frobnicate"], "No such option"),
        (["frobnicate"], "No such command"),
        (["plan"], "--hf-path"),
        (["--q-bits", "4"], "--q-bits: has no effect without -q"),
        (["--q-mode", "mxfp4"], "--q-mode: has no effect without -q"),
        (["--q-method", "mlx"], "--q-method: has no effect without -q"),
        (["-q", "--q-bits", "7"], "--q-bits 7 contradicts"),
        (["-q", "--q-mode", "mxfp4", "--q-bits", "8"], "--q-bits 8 contradicts --q-mode mxfp4"),
        (["-q", "--q-group-size", "48"], "--q-group-size 48 contradicts"),
        (["-q", "-d"], "contradict each other"),
        (["-q", "--to", "torch"], "cannot be combined with -q"),
        (["--quant-predicate", "mixed_9_9"], "mixed_9_9"),
        (["--variants", "4bit,9bit"], "--q-bits 9 contradicts"),
        (["--variants", "tiny"], "'tiny' is not one of bf16"),
        (["--variants", ""], "'' is not one of"),
        (["--variants", "4bit", "-q"], "leave -q out"),
        (["--variants", "4bit", "--to", "torch"], "leave --to out"),
        (["--variants", "4bit", "--q-mode", "mxfp4"], "leave --q-mode out"),
        (["--workers", "0"], "--workers"),
        (["--dtype", "int8"], "--dtype"),
        (["--upload-repo", "--no-validate"], "nothing is uploaded without a passing report"),
    ],
)
def test_wrong_usage_is_status_2_before_anything_happens(
    arguments, words, release, tmp_path, capsys
):
    if arguments[0].startswith("-"):
        arguments = ["--hf-path", release, "--mlx-path", tmp_path / "out", *arguments]
    assert status(*arguments) == 2
    streams = capsys.readouterr()
    assert words in streams.err
    assert streams.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-q"], "--hf-path is missing"),
        (["-q", "plan", "--hf-path", "somewhere"], "put the options after the subcommand"),
    ],
)
def test_options_at_the_wrong_place_are_not_ignored(arguments, words, capsys):
    assert status(*arguments) == 2
    assert words in capsys.readouterr().err


def test_a_real_process_end_to_end(program, release, tmp_path):
    out = tmp_path / "out"
    flags = ("--hf-path", release, "--mlx-path", out, "-q", "--q-group-size", "32")
    done = go(program, *flags, "--no-validate", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    verified = go(program, "verify", out)
    assert verified.returncode == 0
    assert "all as the manifest says" in verified.stdout
    refused = go(program, "--hf-path", out, "--mlx-path", tmp_path / "no")
    assert refused.returncode == 3
    assert refused.stdout == ""
    assert "already an MLX checkpoint" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_output_that_exists(release, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("")
    flags = ("--hf-path", release, "--mlx-path", out, "--no-validate", "--quiet")
    assert status(*flags) == 2
    assert "is not empty; use --overwrite" in capsys.readouterr().err
    assert status(*flags, "--overwrite") == 0
    assert not (out / "mine.txt").exists()


def test_overwrite_makes_it_again(release, tmp_path):
    """Even when the plan is the same: the output may be damaged."""
    flags = ("--hf-path", release, "--mlx-path", tmp_path / "out", "--no-validate", "--quiet")
    assert status(*flags) == 0
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert status(*flags, "--overwrite") == 0
    assert status("verify", tmp_path / "out") == 0


def test_other_weights_under_the_same_headers_are_not_taken_for_done(release, tmp_path):
    from release_helpers import stored

    flags = ("--hf-path", release, "--mlx-path", tmp_path / "out", "--no-validate", "--quiet")
    assert status(*flags) == 0
    tensors = {name: -x for name, x in llama_tensors(LLAMA).items()}
    write_release(release, LLAMA, tensors)
    os.utime(release / "model.safetensors", ns=(1, 1))
    code = status(*flags)
    made = stored(tmp_path / "out")
    assert (
        code != 0 or made["model.norm.weight"].tobytes() == tensors["model.norm.weight"].tobytes()
    ), "reported done, with the weights of another release"


def test_plan_as_json_is_stable_and_whole(program, release, capsys):
    flags = ("plan", "--hf-path", release, "-q", "--json")
    done = [go(program, *flags, env={**os.environ, "PYTHONHASHSEED": seed}) for seed in "12"]
    assert done[0].stdout == done[1].stdout
    assert done[0].stderr == ""
    plan = json.loads(done[0].stdout)
    assert plan["model_type"] == "llama"
    assert len(plan["hash"]) == 64
    assert {out["target"] for out in plan["outputs"]} == llama_tensors(LLAMA).keys()
    assert plan["config"]["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert status("plan", "--hf-path", release, "--json") == 0
    assert json.loads(capsys.readouterr().out)["hash"] != plan["hash"]
    assert status("plan", "--hf-path", release, "--variants", "bf16,4bit", "--json") == 0
    both = json.loads(capsys.readouterr().out)
    assert both[1]["hash"] == plan["hash"]


def test_plan_does_not_depend_on_where_the_release_lies(release, tmp_path, capsys):
    hashes = set()
    for folder in (release, write_release(tmp_path / "elsewhere" / "copy")):
        assert status("plan", "--hf-path", folder, "--json") == 0
        hashes.add(json.loads(capsys.readouterr().out)["hash"])
    assert len(hashes) == 1


def test_plan_as_a_table(release, capsys):
    assert status("plan", "--hf-path", release, "-q", "--q-group-size", "32") == 0
    text = capsys.readouterr().out
    for words in ("model.layers.{0-1}.mlp.down_proj.weight", "affine 4-bit g32", "bits per weight"):
        assert words in text


def on_terminal(command, columns):
    """What a command prints on a terminal of so many columns, line by line."""
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (40, columns))
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen(command, stdin=there, stdout=there, stderr=there, env=env) as running:
        os.close(there)
        text = b""
        with suppress(OSError):  # as reading ends once nobody has the other side
            while piece := os.read(here, 1 << 16):
                text += piece
    os.close(here)
    assert running.returncode == 0
    return text.decode().splitlines()


@pytest.mark.parametrize("columns", [60, 80])
def test_a_plan_fits_the_terminal_and_is_whole(release, program, columns):
    command = [*program, "plan", "--hf-path", str(release), "-q", "--q-group-size", "32"]
    lines = on_terminal(command, columns)
    assert max(map(len, lines)) <= columns
    rows = [line.split("  ")[0] for line in lines]
    assert "model.layers.{0-1}.post_attention_layernorm.weight" in "".join(rows)
    assert sum("affine 4-bit" in line and "kB" in line for line in lines) == 9


def test_names_in_a_wide_plan_are_whole(release):
    plan = plan_request(Request(hf_path=str(release))).plans[0]
    out = plan.outputs[0]
    long = "language_model.model.layers.0.self_attn.a_rather_long_name.weight"
    named = out._replace(rule=replace(out.rule, target=long))
    lines = plan_tables(replace(plan, outputs=(named, *plan.outputs[1:])), workers=1).splitlines()
    assert long.replace("0", "{0}") in [line.split()[0] for line in lines if line]


class TestVerify:
    @pytest.fixture
    def out(self, release, tmp_path):
        return make(release, tmp_path / "out", FOUR_BIT)[0]

    def test_every_flipped_byte_is_seen(self, out, capsys):
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            file = out / name
            data = file.read_bytes()
            for at in (0, len(data) // 2, len(data) - 1):
                file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
                assert status("verify", out) == 1
                assert f"{name}: its content has changed" in capsys.readouterr().err
            file.write_bytes(data)
        assert status("verify", out) == 0

    def test_all_faults_are_named_at_once(self, out, capsys):
        (out / "tokenizer.json").unlink()
        (out / "config.json").write_text("{}")
        (out / "model-extra.safetensors").write_text("")
        assert status("verify", out) == 1
        message = capsys.readouterr().err
        assert "tokenizer.json: is missing" in message
        assert "config.json: has 2 bytes, not" in message
        assert "model-extra.safetensors: is not in the manifest" in message

    def test_reports_and_card_do_not_disturb(self, out):
        for name in ("README.md", "parity.json", "parity.html", "notes.txt"):
            (out / name).write_text("x")
        assert status("verify", out) == 0

    @pytest.mark.parametrize(
        "text", ["", "[]", "{", '{"format": 2}', '{"format": 1, "files": {"a": {}}}']
    )
    def test_damaged_manifest(self, out, text, capsys):
        (out / "conversion.json").write_text(text)
        assert status("verify", out) == 1
        streams = capsys.readouterr()
        assert "conversion.json: is" in streams.err
        assert "internal error" not in streams.err

    def test_no_manifest(self, release, tmp_path, capsys):
        for folder in (release, tmp_path / "absent"):
            assert status("verify", folder) == 2
            assert "has no conversion.json" in capsys.readouterr().err


def test_unexpected_failure_is_one_line(release, tmp_path, capsys, monkeypatch):
    from converter import pipeline

    def broken(*given, **more):
        raise RuntimeError("surprise hf_abcdefghijklmnopqrstuvwxyzABCDEFGH")

    monkeypatch.setattr(pipeline, "plan_request", broken)
    assert status("--hf-path", release, "--mlx-path", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert message.startswith("internal error: RuntimeError: surprise")
    assert "hf_abc" not in message
    assert "Traceback" not in message


def test_interrupt_says_how_to_go_on(release, tmp_path, capsys, monkeypatch):
    from converter import pipeline

    def interrupted(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "plan_request", interrupted)
    assert status("--hf-path", release, "--mlx-path", tmp_path / "out") == 130
    assert "run the same command again" in capsys.readouterr().err
