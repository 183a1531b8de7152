"""The command that a batch's output tells: the command line makes the same plan of it."""

import shlex

import pytest
from quantized_twins import quantized_twin
from release_helpers import factors, peft_config, peft_pair, write_adapter, write_release

from converter.batch.commands import command_of
from converter.batch.orders import Part
from converter.batch.recipes import policy_of, recipes_of
from converter.batch.watchlist import parse_watchlist
from converter.cli.app import cli
from converter.cli.convert import request_from
from converter.pipeline import Request, plan_request

RECIPES = {
    "bf16": ("", "--dtype bfloat16"),
    "4bit": ("", "--quantize --q-bits 4 --q-group-size 64"),
    "mxfp4": ("", "--quantize --q-mode mxfp4"),
    "nvfp4": ("", "--quantize --q-mode nvfp4"),
    "careful": (
        'q_bits = 4\nq_group_size = 32\nq_method = "search"\nquant_predicate = "mixed_4_6"',
        "--quantize --q-bits 4 --q-group-size 32 --q-method search --quant-predicate mixed_4_6",
    ),
    "mx": ('q_mode = "mxfp8"\ndtype = "float16"', "--dtype float16 --quantize --q-mode mxfp8"),
    "kept": ("", ""),
    "turned": (
        "q_bits = 8\nkv_rotate_values = true",
        "--quantize --q-bits 8 --q-group-size 64 --kv-rotate-values",
    ),
    "weighed": (
        'q_bits = 3\nq_method = "imatrix"\ncalibration_length = 32',
        "--quantize --q-bits 3 --q-group-size 64 --q-method imatrix --calibration-sequences 64 "
        "--calibration-length 32 --calibration-data 'my text.txt'",
    ),
    "tuned": (
        'q_bits = 4\nq_method = "autoround"\ntuning_iterations = 7',
        "--quantize --q-bits 4 --q-group-size 64 --q-method autoround --tuning-iterations 7 "
        "--calibration-sequences 64 --calibration-length 512 --calibration-data 'my text.txt'",
    ),
    "sized": (
        'q_target_bpw = 6.0123456789\nq_method = "search"\ncalibration_sequences = 9',
        "--q-target-bpw 6.0123456789 --q-method search --calibration-sequences 9 "
        "--calibration-length 512 --calibration-data 'my text.txt'",
    ),
    "bytes": (
        'q_target_size = "0.12MB"',
        "--q-target-size 120000 --calibration-sequences 64 --calibration-length 512 "
        "--calibration-data 'my text.txt'",
    ),
    "own": (
        'adapter_path = "{lora}"\nq_bits = 6',
        "--quantize --q-bits 6 --q-group-size 64 --adapter-path lora",
    ),
}


BUILT_IN = {
    "bytes": ("q_target_size = 120000", "--q-target-size 120000"),
    "grouped": ("q_target_bpw = 7\nq_group_size = 32", "--q-target-bpw 7.0 --q-group-size 32"),
    "weighed": (
        'q_bits = 3\nq_method = "gptq"',
        "--quantize --q-bits 3 --q-group-size 64 --q-method gptq --calibration-sequences 64 "
        "--calibration-length 512",
    ),
}
"""Without a text of one's own."""


def parts_of(folder, recipes) -> dict[str, Part]:
    """The jobs of a watch list with these variants and recipes, by name."""
    pairs = peft_pair("model.layers.0.mlp.down_proj", *factors((64, 128), 2, 2))
    lora = write_adapter(folder / "lora", peft_config(r=2), pairs)
    own = {name: text.format(lora=lora) for name, (text, _) in recipes.items()}
    plain = [name for name in recipes if not own[name] and name != "kept"]
    text = f'namespace = "n"\n[[watch]]\nmodels = ["a/b"]\nvariants = {plain}\n'
    text += f"recipes = {[name for name in recipes if name not in plain]}\n"
    if recipes is not BUILT_IN:
        (folder / "my text.txt").write_text("some text. " * 100)
        text += f'calibration_data = "{folder}/my text.txt"\n'
    text += "".join(f"[recipes.{name}]\n{own[name]}\n" for name in own if name not in plain)
    read = parse_watchlist(folder / "watch.toml", text)
    (entry,) = read.watch
    policy = policy_of(read, entry)
    made = recipes_of(read, entry).items()
    return {
        name: Part(job=1, variant=name, target=f"n/{name}", asked=asked, policy=policy)
        for name, asked in made
    }


def planned(part: Part, source):
    """What a batch plans for a job."""
    request = Request(
        hf_path=str(source),
        recipes=(part.asked.options,),
        adapter_path=part.asked.checked_adapter(),
    )
    return plan_request(request, measure=False).plans[0]


def planned_by_hand(command: str, source):
    """What the command line plans, of a folder instead of the hub's release."""
    program, flag, repo, revision, commit, *flags = shlex.split(command)
    assert (program, flag, repo, revision, commit) == (
        *("convert", "--hf-path", "acme/small", "--revision", "c1"),
    )
    given = cli.make_context(program, ["--hf-path", str(source), *flags]).params
    return plan_request(request_from(given), measure=False).plans[0]


@pytest.mark.parametrize("recipes", [RECIPES, BUILT_IN], ids=["own text", "built-in text"])
def test_the_command_line_plans_the_same(tmp_path, monkeypatch, recipes):
    source = write_release(tmp_path / "source")
    monkeypatch.chdir(tmp_path)  # where text and adapter are known by their names
    parts = parts_of(tmp_path, recipes)
    assert parts.keys() == recipes.keys()
    for name, part in parts.items():
        plan = planned(part, source)
        command = command_of("acme/small", "c1", part, dequantize=plan.options.dequantize)
        flags = recipes[name][1]
        assert command == f"convert --hf-path acme/small --revision c1 {flags}".rstrip(), name
        assert planned_by_hand(command, source).hash == plan.hash, name


def test_what_is_plain_of_a_quantized_release_is_so_by_hand(tmp_path):
    source = quantized_twin("llama", "fp8", tmp_path)
    for name, part in parts_of(tmp_path, {n: RECIPES[n] for n in ("bf16", "kept", "4bit")}).items():
        plan = planned(part, source)
        command = command_of("acme/small", "c1", part, dequantize=plan.options.dequantize)
        assert ("--dequantize" in command) == (name == "bf16")
        assert planned_by_hand(command, source).hash == plan.hash
