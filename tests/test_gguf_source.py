"""GGUF files as sources: which file, what config, and every way a head can lie."""

import json
import math
import struct

import numpy as np
import pytest
from gguf_files import (
    ARRAY,
    BOOL,
    F32,
    I32,
    SETTINGS,
    SHAPES,
    STRING,
    U32,
    File,
    entry,
    llama3_file,
    llama3_scaling,
    settings,
    text,
)
from release_helpers import LLAMA, status

from converter.decode import DecodingReader, decoded
from converter.errors import PlanError
from converter.plan.match import find_map, match_release
from converter.release import open_release
from converter.source import open_folder
from converter.source.gguf import read_head


def problems(path):
    with pytest.raises(PlanError) as caught:
        open_folder(path)
    return list(caught.value.problems)


def test_a_sound_file_is_the_release_it_was_made_from(tmp_path):
    path = File().write(tmp_path / "m.gguf")
    source = open_folder(tmp_path)
    assert source.kind == "gguf"
    assert source.weight_files == ("m.gguf",)
    match = match_release(decoded(source).source, find_map(source.config))
    assert len(match.rules) == len(SHAPES)
    config = {k: source.config.get(k) for k in LLAMA}
    assert config == LLAMA | {"num_hidden_layers": 1, "dtype": "float32"}
    assert open_folder(path).tensors == source.tensors
    assert source.tensors["model.layers.0.mlp.up_proj.weight"].shape == (128, 64)


SPOILT = {
    "does not begin with GGUF": lambda f: None,
    "was written for big-endian machines": lambda f: setattr(f, "version", 3 << 24),
    "is version 1 of the format; versions 2 and 3 are read": lambda f: setattr(f, "version", 1),
    "claims 9223372036854775808 tensors in": lambda f: setattr(f, "counts", [2**63, None]),
    "claims 1099511627776 entries in": lambda f: setattr(f, "counts", [None, 2**40]),
    "the name of a tensor at byte 441 has": lambda f: setattr(f, "counts", [None, 10]),
    "a key at byte 32 has 9223372036854775808 bytes": lambda f: f.entries.insert(
        0, struct.pack("<Q", 2**63)
    ),
    "the key 'llama.block_count' appears more than once": lambda f: f.entries.append(
        entry("llama.block_count", U32, 1)
    ),
    "a key at byte 32 is not UTF-8": lambda f: f.entries.insert(0, entry(b"\xff", U32, 1)),
    "odd.kind has the unknown type 13": lambda f: f.entries.append(entry("odd.kind", 13, b"")),
    "odd.flag is neither true nor false": lambda f: f.entries.append(entry("odd.flag", BOOL, 2)),
    "odd.list is an array of the unknown type 9": lambda f: f.entries.append(
        entry("odd.list", ARRAY, (ARRAY, []))
    ),
    "odd.list claims 4611686018427387904 values": lambda f: f.entries.append(
        text("odd.list") + struct.pack("<IIQ", ARRAY, U32, 2**62)
    ),
    "the name of a tensor at byte 410 has 2000 bytes": lambda f: f.tensors[0].__setitem__(
        0, "x" * 2000
    ),
    "a key at byte 32 has 2000 bytes": lambda f: f.entries.insert(0, entry("x" * 2000, U32, 1)),
    "odd.text at byte": lambda f: f.entries.append(
        text("odd.text") + struct.pack("<IQ", STRING, 2**63)
    ),
    "the tensor 'output.weight' appears more than once": lambda f: f.tensors.append(f.tensors[2]),
    "has 0 dimensions": lambda f: f.tensors[0].__setitem__(1, ()),
    "has 5 dimensions": lambda f: f.tensors[0].__setitem__(1, (1,) * 5),
    "token_embd.weight: shape [9223372036854775808, 9223372036854775808] is empty or too large": (
        lambda f: f.tensors[0].__setitem__(1, (2**63, 2**63))
    ),
    "output_norm.weight: shape [0] is empty or too large": lambda f: f.tensors[1].__setitem__(
        1, (0,)
    ),
    "token_embd.weight: unknown type 99": lambda f: f.tensors[0].__setitem__(2, 99),
    "output_norm.weight: rows of 64 are no whole blocks of Q4_K": lambda f: f.tensors[
        1
    ].__setitem__(2, 12),
    "output.weight: begins at 24833, no multiple of the alignment 32": lambda f: f.tensors[
        2
    ].__setitem__(3, f.tensors[2][3] + 1),
    "output.weight: overlaps 'output_norm.weight'".replace("'", ""): lambda f: f.tensors[
        2
    ].__setitem__(3, f.tensors[1][3]),
    "blk.0.attn_norm.weight: 24576 bytes of no tensor before it": lambda f: f.tensors.pop(2),
    "blk.0.ffn_down.weight: truncated: its data ends at byte": lambda f: setattr(
        f, "data", f.data[:-32]
    ),
    "64 bytes after blk.0.ffn_down.weight": lambda f: setattr(f, "data", f.data + bytes(64)),
    "general.alignment is 24, not a power of two": lambda f: f.entries.append(
        entry("general.alignment", U32, 24)
    ),
}


@pytest.mark.parametrize("message", SPOILT)
def test_a_head_that_lies_is_an_error_that_names_the_file(message, tmp_path):
    file = File()
    SPOILT[message](file)
    path = file.write(tmp_path / "m.gguf")
    if message.startswith("does not begin"):
        path.write_bytes(b"GGML" + path.read_bytes()[4:])
    found = problems(path)
    assert any(problem.startswith("m.gguf: ") and message in problem for problem in found), found


@pytest.mark.parametrize("cut", [0, 3, 12, 23, 40, 200, 500])
def test_a_file_cut_anywhere_in_its_head_is_truncated(cut, tmp_path):
    [problem] = problems(File().write(tmp_path / "m.gguf", cut=cut))
    assert problem.startswith("m.gguf: truncated: ")


def test_what_a_head_says_is_bounded(tmp_path):
    """Templates and vocabularies stay in the file; all counts are still held against it."""
    long = {"tokenizer.chat_template": (STRING, "x" * 100_000), "a.short": (STRING, "x" * 4096)}
    long["tokenizer.ggml.tokens"] = (ARRAY, (STRING, ["x" * 100] * 2000))
    long["a.sizes"] = (ARRAY, (U32, list(range(5000))))
    path = File({**SETTINGS, **long}).write(tmp_path / "m.gguf")
    metadata = read_head(path, "m.gguf").metadata
    assert {key: metadata[key] for key in long if key != "a.short"} == {
        "tokenizer.chat_template": {"count": 100_000},
        "tokenizer.ggml.tokens": {"count": 2000},
        "a.sizes": {"count": 5000},
    }
    assert len(metadata["a.short"]) == 4096


def test_what_is_answered_is_bounded_as_a_whole(tmp_path, monkeypatch):
    many = {f"a.{number}": (ARRAY, (U32, [7] * 4096)) for number in range(300)}
    path = File({**SETTINGS, **many, "z": (STRING, "x" * 4096)}).write(tmp_path / "m.gguf")
    metadata = read_head(path, "m.gguf").metadata
    whole = [key for key in many if metadata[key] == [7] * 4096]
    assert whole == list(many)[:255], "the other settings take less than one more"
    assert metadata["a.299"] == {"count": 4096}
    assert metadata["z"] == {"count": 4096}
    monkeypatch.setattr("converter.source.gguf._LONGEST_ANSWER", 10_000)
    with pytest.raises(PlanError, match=r"there are \d+ bytes to say of it, more than 10000"):
        read_head(path, "m.gguf")


def test_more_than_is_read_is_no_truncation(tmp_path):
    file = File()
    file.counts = [(1 << 17) + 1, None]
    [problem] = problems(file.write(tmp_path / "m.gguf", tail=bytes(4 << 20)))
    assert problem == "m.gguf: has 131073 tensors; no more than 131072 are read"


def test_names_that_mean_something_to_format_are_only_names(tmp_path):
    path = File(tensors={**SHAPES, "{0.__class__}.{}.weight": (32,)}).write(tmp_path / "m.gguf")
    source = open_folder(path)
    with pytest.raises(PlanError, match="__class__"):
        match_release(decoded(source).source, find_map(source.config))


CONFIG_FAULTS = {
    "general.architecture is mamba2; of GGUF files only gemma, ": settings(
        general__architecture=(STRING, "mamba2")
    ),
    "llama.block_count is missing": settings(llama__block_count=None),
    "llama.embedding_length must be one positive whole number, not -64": settings(
        llama__embedding_length=(I32, -64)
    ),
    "llama.attention.head_count_kv must be one positive whole number, not [1, 2]": settings(
        llama__attention__head_count_kv=(ARRAY, (U32, [1, 2]))
    ),
    "llama.attention.layer_norm_rms_epsilon must be a number, not nan": settings(
        llama__attention__layer_norm_rms_epsilon=(F32, math.nan)
    ),
    "llama.rope.scaling.type is 'longrope', whose settings are in config.json alone": settings(
        llama__rope__scaling__type=(STRING, "longrope"), llama__rope__scaling__factor=(F32, 2.0)
    ),
}


@pytest.mark.parametrize("message", CONFIG_FAULTS)
def test_settings_that_make_no_config(message, tmp_path):
    found = problems(File(CONFIG_FAULTS[message]).write(tmp_path / "m.gguf"))
    assert any(problem.startswith(f"m.gguf: {message}") for problem in found), found


def test_the_config_beside_must_be_of_the_same_model(tmp_path):
    path = File().write(tmp_path / "m.gguf")
    right = LLAMA | {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(right))
    assert open_folder(path).config["dtype"] == "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(right | {"rope_theta": 5e5}))
    assert problems(path) == [
        "m.gguf: config.json says rope_theta = 500000.0, the GGUF file 10000.0"
    ]
    moved = {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    moved = {k: v for k, v in (right | moved).items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(moved))
    assert "rope_theta = 500000.0" in problems(path)[0]
    (tmp_path / "config.json").write_text(json.dumps(right | {"model_type": "qwen3"}))
    assert "the config.json beside it is of 'qwen3', not of llama or mistral" in problems(path)[0]


def test_what_the_file_leaves_out_the_config_beside_has(tmp_path):
    path = File(settings(**{"llama.feed_forward_length": None})).write(tmp_path / "m.gguf")
    assert "llama.feed_forward_length is missing" in problems(path)[0]
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 1}))
    assert open_folder(path).config["intermediate_size"] == LLAMA["intermediate_size"]


def test_rotary_factors_need_the_config_they_follow_from(tmp_path):
    path = File(tensors={**SHAPES, "rope_freqs.weight": (16,)}).write(tmp_path / "m.gguf")
    assert problems(path) == [
        "m.gguf: rope_freqs.weight: factors of the rotary frequencies, which follow from "
        "rope_scaling in config.json; put the release's config.json beside the file"
    ]
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 1}))
    [drop] = decoded(open_folder(path)).drops
    assert drop.name == "rope_freqs.weight"


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_factors_say_what_they_were_made_from(factor, tmp_path):
    """As the reference computes them; of others config.json has to tell."""
    source = open_folder(llama3_file(factor).write(tmp_path / "m.gguf"))
    assert source.config["rope_scaling"] == llama3_scaling(factor)
    assert [drop.name for drop in decoded(source).drops] == ["rope_freqs.weight"]


def test_types_that_are_not_decoded_are_named(tmp_path):
    file = File(tensors={**SHAPES, "token_embd.weight": (96, 256)})
    file.tensors[0][2] = 18
    file.data = bytes(len(file.data))
    at = 0
    for tensor in file.tensors:
        tensor[3] = at
        size = math.prod(tensor[1]) * 4 if tensor[2] == 0 else 96 * 98
        at += -(-size // 32) * 32
    file.data = bytes(at)
    source = open_folder(file.write(tmp_path / "m.gguf"))
    with pytest.raises(PlanError) as caught:
        decoded(source)
    [problem] = caught.value.problems
    assert problem.startswith("token_embd.weight: is IQ3_XXS, which is not decoded; only F32, F16,")


def test_the_file_is_chosen_or_named(tmp_path):
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf", "mmproj-a.gguf"):
        File().write(tmp_path / name)
    assert problems(tmp_path) == [
        f"{tmp_path}: 2 GGUF models; name the one to convert with --gguf-file: a-Q4_0.gguf, "
        "a-Q8_0.gguf"
    ]
    release = open_release(str(tmp_path), gguf="a-Q8_0.gguf")
    assert release.source.weight_files == ("a-Q8_0.gguf",)
    assert release.root == tmp_path / "a-Q8_0.gguf"
    with pytest.raises(PlanError, match=r"--gguf-file b.gguf: .* has no such file; it has a-Q4_0"):
        open_release(str(tmp_path), gguf="b.gguf")
    (tmp_path / "a-Q4_0.gguf").unlink()
    assert open_folder(tmp_path).weight_files == ("a-Q8_0.gguf",)  # the tower is no model
    plan = ("plan", "--hf-path", tmp_path)
    assert status(*plan) == 0
    assert status(*plan, "--gguf-file", "b.gguf") == 3
    assert status("plan", "--hf-path", tmp_path / "a-Q8_0.gguf") == 0


def test_a_model_in_parts(tmp_path):
    names = list(SHAPES)
    halves = [dict.fromkeys(names[:5]), dict.fromkeys(names[5:])]
    count = {"split.tensors.count": (I32, len(names)), "split.count": (U32, 2)}
    for number, half in enumerate(halves, 1):
        own = {**SETTINGS, **count} if number == 1 else count
        file = File(own, {name: SHAPES[name] for name in half})
        file.write(tmp_path / f"m-{number:05d}-of-00002.gguf")
    source = open_folder(tmp_path)
    assert len(source.tensors) == len(names)
    assert source.weight_files == ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    assert "m-00002-of-00002.gguf is missing, a part of" in problems(tmp_path)[0]


def test_rotated_rows_are_read_in_any_strips(tmp_path):
    source = open_folder(File().write(tmp_path / "m.gguf"))
    view = decoded(source)
    name = "model.layers.0.self_attn.q_proj.weight"
    with source.open() as raw:
        reader = DecodingReader(raw, view)
        whole = reader.read_rows(name, 0, 64)
        stored = raw.read_rows(name, 0, 64)
        for step in (1, 7, 32, 33):
            strips = [reader.read_rows(name, i, min(i + step, 64)) for i in range(0, 64, step)]
            np.testing.assert_array_equal(np.concatenate(strips), whole)
    for row in range(16):  # two heads of 32 rows: first halves at even places, second at odd
        np.testing.assert_array_equal(whole[row], stored[2 * row])
        np.testing.assert_array_equal(whole[16 + row], stored[2 * row + 1])
        np.testing.assert_array_equal(whole[48 + row], stored[33 + 2 * row])


def test_without_a_tokenizer_the_error_says_which_files(tmp_path):
    File(settings(tokenizer__ggml__model=(STRING, "bert"))).write(tmp_path / "m.gguf")
    with pytest.raises(PlanError, match=r"put the release's tokenizer.json and tokenizer_config"):
        open_release(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "holiday.jpg").write_bytes(b"not of the release")
    assert open_release(str(tmp_path)).sidecars == ("tokenizer.json",)
