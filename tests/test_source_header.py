import json
import math
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from arch_maps.dtypes import CODES, NUMPY_DTYPES
from converter.errors import PlanError
from converter.source.header import MAX_HEADER_BYTES, fetch_header, parse_header, read_header

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def blob(header: Any, data: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def problems(file: bytes, size: int | None = None) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        parse_header(file, len(file) if size is None else size, "x.safetensors")
    assert caught.value.exit_code == 3
    assert all(problem.startswith("x.safetensors: ") for problem in caught.value.problems)
    return tuple(problem.removeprefix("x.safetensors: ") for problem in caught.value.problems)


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {**GOOD, **changes}}


def test_offsets_are_absolute_and_metadata_is_kept() -> None:
    file = blob({"__metadata__": {"format": "pt"}, **entry()})
    header = parse_header(file, len(file), "x.safetensors")
    info = header.tensors["w"]
    assert (info.name, info.dtype, info.shape, info.file) == ("w", "F32", (2,), "x.safetensors")
    assert (info.start, info.stop, info.nbytes) == (len(file) - 8, len(file), 8)
    assert header.metadata == {"format": "pt"}
    assert header.size == len(file)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (entry(dtype="F31"), 8, "w: unknown dtype 'F31'"),
        (entry(dtype=7), 8, "w: unknown dtype 7"),
        (entry(dtype=["F32"]), 8, "w: unknown dtype ['F32']"),
        (entry(shape=[3]), 8, "w: shape [3] of F32 needs 12 bytes, the file gives 8"),
        (entry(shape=[-2]), 8, "w: negative size in shape [-1]"),
        (entry(shape=[True, 2]), 8, "w: shape [True, 2] is not a list of integers"),
        (entry(shape=[2.0]), 8, "w: shape [2.0] is not a list of integers"),
        (entry(shape=None), 8, "w: shape None is not a list of integers"),
        (entry(shape=[2**62, 2**62]), 8, f"w: shape [{2**62}, {2**62}] is too large"),
        (entry(shape=[10**30]), 8, f"w: shape [{2**63}] is too large"),
        (
            entry(shape=[2**40, 0, 2**40], data_offsets=[0, 0]),
            0,
            f"w: shape [{2**40}, 0, {2**40}] is too large",
        ),
        (entry(shape=[1] * 33, data_offsets=[0, 4]), 4, "w: 33 dimensions, more than 32"),
        (entry(data_offsets=[8, 0]), 8, "w: data_offsets [8, 0] do not run forward from 0"),
        (entry(data_offsets=[-1, 7]), 8, "w: data_offsets [-1, 7] do not run forward from 0"),
        (entry(data_offsets=[0]), 8, "w: data_offsets [0] are not two integers"),
        (entry(data_offsets=[0, 8.0]), 8, "w: data_offsets [0, 8.0] are not two integers"),
        (entry(data_offsets=[False, 8]), 8, "w: data_offsets [False, 8] are not two integers"),
        (entry(), 7, "w: truncated: its data ends at byte 8 of 7"),
        (entry(), 9, "1 trailing bytes after w"),
        ({}, 4, "4 trailing bytes after the header"),
        ({"w": {"dtype": "F32"}}, 0, "w: its entry lacks data_offsets, shape"),
        (entry(strides=[1]), 8, "w: its entry has unknown fields strides"),
        ({"w": []}, 0, "w: its entry is not an object"),
        ({"__metadata__": []}, 0, "__metadata__ is not an object"),
        ({"__metadata__": None}, 0, "__metadata__ is not an object"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__ values that are not strings: a"),
        (b'{"__metadata__":{"a":"1","a":"2"}}', 0, "__metadata__ repeats a"),
        (b'{"w":{"dtype":"F32","dtype":"F32"}}', 0, "w: its entry repeats dtype"),
        (
            b'{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}',
            0,
            "w: negative size in shape [-1]",
        ),
    ],
)
def test_one_problem(header: Any, data: int, message: str) -> None:
    assert problems(blob(header, data)) == (message,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "not a safetensors file: its header does not start with '{'"),
        (b"", "not a safetensors file: its header does not start with '{'"),
        (b" {}", "not a safetensors file: its header does not start with '{'"),
        (b'{"a\xff":1}', "header is not UTF-8 at byte 11"),
        (b'{"a":NaN}', "header is not JSON: NaN is not JSON"),
        (b'{"a":1}x', "header is not JSON: Extra data: line 1 column 8 (char 7)"),
        (b'{"a":' + b"[" * 200_000, "header is not JSON: nested too deeply"),
        (b'{"\\ud800":1}', "'\\ud800': lone surrogate in the header"),
    ],
)
def test_not_a_header(text: bytes, message: str) -> None:
    assert problems(blob(text, 0)) == (message,)


@pytest.mark.parametrize("one", [True, 1.0])
def test_what_equals_a_size_that_was_fine_is_none(one: object) -> None:
    fine = {"dtype": "U8", "shape": [1, 2], "data_offsets": [0, 2]}
    file = blob({"v": fine, "w": {**fine, "shape": [one, 2], "data_offsets": [2, 4]}}, 4)
    assert problems(file) == (f"w: shape [{one}, 2] is not a list of integers",)
    file = blob({"v": fine, "w": {**fine, "data_offsets": [one, 3]}}, 3)
    assert problems(file) == (f"w: data_offsets [{one}, 3] are not two integers",)


def test_lengths() -> None:
    assert problems(b"\2\0\0") == ("truncated: 3 bytes cannot hold a safetensors header",)
    assert problems(b"\2\0\0", 20) == ("short read: 3 of the first 8 bytes",)
    assert problems(blob({}, 0)[:-1]) == ("truncated: the header ends at byte 10 of a 9 byte file",)
    assert problems(blob({}, 0)[:-1], 10) == ("short read: 9 of 10 header bytes",)
    long = struct.pack("<Q", MAX_HEADER_BYTES + 1)
    assert problems(long, 1 << 40) == (
        "header of 100000001 bytes is over the 100000000 byte limit",
    )


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (b"PK\3\4\0\0\x08\x08", "a PyTorch pickle under a safetensors name; rename it to .bin"),
        (b"\x80\2\x8a\nl\xfc\x9cF", "a PyTorch pickle under a safetensors name; rename it to .bin"),
        (b"GGUF\3\0\0\0", "a GGUF file under a safetensors name; rename it to .gguf"),
        (b"version https://git-lfs", "a git-lfs pointer, not the file itself"),
    ],
)
def test_other_formats_are_named(prefix: bytes, message: str) -> None:
    assert problems(prefix.ljust(64, b"\0"))[0].startswith(message)


def test_layout_problems_name_both_tensors() -> None:
    one = {"dtype": "U8", "shape": [4]}
    overlap = {"a": {**one, "data_offsets": [0, 4]}, "b": {**one, "data_offsets": [2, 6]}}
    assert problems(blob(overlap, 6)) == ("b: overlaps a (starts at 2, 2 bytes before its end)",)
    hole = {"a": {**one, "data_offsets": [0, 4]}, "b": {**one, "data_offsets": [5, 9]}}
    assert problems(blob(hole, 9)) == ("b: hole of 1 bytes after a",)
    first = {"a": {**one, "data_offsets": [1, 5]}}
    assert problems(blob(first, 5)) == ("a: hole of 1 bytes after the header",)


@pytest.mark.parametrize(
    "text",
    [
        '{"w":%s,"w":%s}',
        '{ "w" : %s , "w" : %s }',
        '{"__metadata__":{"a:b":"::"},"w":%s,"w":%s}',
        '{"a\\u003a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":%s,"w":%s}',
    ],
)
def test_duplicate_tensor(text: str) -> None:
    body = json.dumps(GOOD)
    assert problems(blob((text % (body, body)).encode())) == ("w: appears more than once",)


def test_names_like_numbers_and_with_colons_are_names() -> None:
    names = ["a:b", "-1", f"x,{10**30}", "w: -0"]
    entries = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [at, at + 1]}
        for at, name in enumerate(names)
    }
    file = blob(entries, 4)
    assert list(parse_header(file, len(file), "x").tensors) == names


def test_all_problems_at_once() -> None:
    header = {
        "__metadata__": {"format": 1},
        "a": {"dtype": "Q4", "shape": [8], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [7], "data_offsets": [8, 16]},
        "c": {"dtype": "U8", "shape": [8], "data_offsets": [12, 20]},
    }
    assert problems(blob(header, 21)) == (
        "__metadata__ values that are not strings: format",
        "a: unknown dtype 'Q4'",
        "b: shape [7] of U8 needs 7 bytes, the file gives 8",
        "c: overlaps b (starts at 12, 4 bytes before its end)",
        "1 trailing bytes after c",
    )


def test_hostile_names_cannot_forge_output() -> None:
    file = blob({"\x1b[31m\nok": {**GOOD, "dtype": "X"}})
    assert problems(file) == ("'\\x1b[31m\\nok': unknown dtype 'X'",)
    assert len(problems(blob({"n" * 100_000: {**GOOD, "dtype": "X"}}))[0]) < 300


def test_zero_size_tensors(tmp_path: Path) -> None:
    arrays = {"a": np.zeros((0, 4), np.float32), "b": np.ones(3, np.int8), "c": np.float32(2)}
    path = tmp_path / "z.safetensors"
    path.write_bytes(save({name: np.asarray(array) for name, array in arrays.items()}))
    header = read_header(path)
    assert {name: info.shape for name, info in header.tensors.items()} == {
        "a": (0, 4),
        "b": (3,),
        "c": (),
    }
    assert read_header(path, "sub/name").tensors["a"].file == "sub/name"


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"^gone: cannot be read: No such file or directory$"):
        read_header(tmp_path / "gone")


@pytest.mark.parametrize("count", [1, 5000])
def test_remote_header_needs_at_most_two_ranges(count: int) -> None:
    file = save({f"layer.{i}.weight": np.zeros(1, np.float32) for i in range(count)})
    ranges = []

    def fetch(start: int, stop: int) -> bytes:
        ranges.append((start, stop))
        return file[start:stop]

    header = fetch_header(fetch, len(file), "x")
    assert header == parse_header(file, len(file), "x")
    assert len(ranges) == (1 if count == 1 else 2)
    assert max(stop for _, stop in ranges) <= max(1 << 18, header.tensors["layer.0.weight"].start)
    with pytest.raises(PlanError, match="short read"):
        fetch_header(lambda start, stop: file[start:stop][:20], len(file), "x")


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, np.ndarray[Any, Any]]:
    # The writer's numpy side knows no ml_dtypes but bfloat16.
    codes = [code for code in NUMPY_DTYPES if not code.startswith("F8")]
    names = draw(st.lists(st.text(max_size=8), unique=True, max_size=5))
    made = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = NUMPY_DTYPES[draw(st.sampled_from(codes))]
        raw = draw(st.binary(min_size=(n := math.prod(shape) * dtype.itemsize), max_size=n))
        if dtype == np.bool_:
            raw = bytes(byte & 1 for byte in raw)
        made[name] = np.frombuffer(raw, dtype).reshape(shape)
    made.pop("__metadata__", None)
    return made


@given(arrays())
@settings(max_examples=100, deadline=None)
def test_round_trip_with_the_reference_writer(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    file = save(tensors, metadata={"format": "np"})
    header = parse_header(file, len(file), "x")
    assert header.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        info = header.tensors[name]
        assert (info.dtype, info.shape) == (CODES[array.dtype], array.shape)
        assert file[info.start : info.stop] == array.tobytes()


SEED_FILE = blob(
    {
        "__metadata__": {"format": "pt"},
        "a.b": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]},
        "c": {"dtype": "U8", "shape": [], "data_offsets": [12, 13]},
        "d": {"dtype": "I64", "shape": [0, 7], "data_offsets": [13, 13]},
    },
    13,
)
TOKENS = [b"-", b"0", b"9", b"1e3", b".", b'"', b"\\ud800", b",", b"[", b"]", b"{", b"}", b"\xff"]
TOKENS += [b"true", b"null", b"NaN", b" ", b"18446744073709551616", b"\n", b'"c"', b"\0"]


@given(
    st.lists(
        st.tuples(
            st.integers(0, len(SEED_FILE)),
            st.integers(0, 3),
            st.one_of(st.sampled_from(TOKENS), st.binary(max_size=2)),
        ),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
@settings(max_examples=600, deadline=None)
def test_mutations_never_pass_what_the_reference_reader_rejects(
    edits: list[tuple[int, int, bytes]], repair: bool
) -> None:
    file = bytearray(SEED_FILE)
    for place, drop, insert in edits:
        file[place : place + drop] = insert
    if repair:  # Fix the length so that the damage is inside the JSON, not around it.
        file[:8] = struct.pack("<Q", max(len(file) - 21, 0))
    compare_with_reference(bytes(file))


NUMBER = st.sampled_from(["0", "1", "2", "3", "4", "-0", "-1", "1.0", "true"])
OFFSETS = st.tuples(NUMBER, NUMBER).map(lambda pair: f"[{pair[0]},{pair[1]}]")
SHAPES = st.lists(NUMBER, max_size=2).map(lambda sizes: f"[{','.join(sizes)}]")
ENTRY = st.tuples(st.sampled_from("abc"), st.sampled_from(["U8", "U9"]), SHAPES, OFFSETS)


@given(st.lists(ENTRY, min_size=1, max_size=3), st.integers(0, 4))
@settings(max_examples=600, deadline=None)
@example([("a", "U8", "[-0]", "[0,0]")], 0)
@example([("a", "U8", "[1]", "[0,1]"), ("b", "U8", "[1]", "[2,3]")], 3)
@example([("a", "U8", "[2]", "[0,2]"), ("b", "U8", "[2]", "[1,3]")], 3)
@example([("a", "U8", "[1]", "[0,1]"), ("a", "U8", "[1]", "[0,1]")], 1)
def test_wrong_values_never_pass_what_the_reference_reader_rejects(
    entries: list[tuple[str, str, str, str]], data: int
) -> None:
    fields = (
        f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'
        for name, dtype, shape, offsets in entries
    )
    compare_with_reference(blob(f"{{{','.join(fields)}}}".encode(), data))


def compare_with_reference(file: bytes) -> None:
    try:
        header = parse_header(file, len(file), "x")
    except PlanError:
        return
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as handle:
        handle.write(file)
        handle.flush()
        try:
            with safe_open(handle.name, framework="np") as reference:
                assert set(reference.keys()) == header.tensors.keys()
                assert (reference.metadata() or {}) == header.metadata
        except SafetensorError as error:
            pytest.fail(f"accepted {file!r}, which safetensors rejects: {error}")
