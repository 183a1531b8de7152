import json
import os
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from converter.errors import PlanError
from converter.source import Source, build_source, open_folder, parse_header, select_weights
from converter.source.folder import resolve_inside

ONE = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4)}
TWO = {"b.weight": np.arange(6, dtype=np.float16).reshape(2, 3), "b.bias": np.ones(2, np.int8)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_MAP = {"a.weight": FIRST, "b.weight": SECOND, "b.bias": SECOND}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "release"
    root.mkdir()
    (root / "config.json").write_text('{"model_type": "llama", "eps": NaN}')
    return root


@pytest.fixture
def sharded(folder: Path) -> Path:
    save_file(ONE, folder / FIRST)
    save_file(TWO, folder / SECOND)
    write_index(folder, WEIGHT_MAP)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def problems(folder: Path, **options: Any) -> list[str]:
    with pytest.raises(PlanError) as caught:
        open_folder(folder, **options)
    assert caught.value.exit_code == 3
    return [problem.replace(str(folder), "DIR") for problem in caught.value.problems]


def check_contents(source: Source, arrays: dict[str, Any]) -> None:
    assert list(source.tensors) == sorted(arrays)
    with source.open() as reader:
        for name, array in arrays.items():
            read = reader.read(name)
            assert read.dtype == array.dtype
            np.testing.assert_array_equal(read, array)


def test_single_file(folder: Path) -> None:
    save_file(ONE, folder / "model.safetensors")
    source = open_folder(folder)
    assert (source.kind, source.root, source.notes) == ("safetensors", folder, ())
    assert source.weight_files == ("model.safetensors",)
    assert source.config["model_type"] == "llama"
    assert np.isnan(source.config["eps"])
    check_contents(source, ONE)


def test_one_file_of_any_name(folder: Path) -> None:
    save_file(ONE, folder / "weights.safetensors")
    assert open_folder(folder).weight_files == ("weights.safetensors",)


def test_shards(sharded: Path) -> None:
    source = open_folder(sharded)
    assert source.weight_files == (FIRST, SECOND)
    assert source.tensors["b.bias"].file == SECOND
    check_contents(source, ONE | TWO)


def test_fingerprint_follows_headers_and_sizes(sharded: Path) -> None:
    before = open_folder(sharded).fingerprint()
    assert before == open_folder(sharded).fingerprint()
    save_file({**TWO, "b.bias": np.ones(2, np.uint8)}, sharded / SECOND)
    after = open_folder(sharded).fingerprint()
    assert after[FIRST] == before[FIRST]
    assert after[SECOND][0] != before[SECOND][0]
    assert after[SECOND][1] == (sharded / SECOND).stat().st_size


def test_source_from_headers_alone(sharded: Path) -> None:
    local = open_folder(sharded)
    headers = {}
    for name in (FIRST, SECOND):
        file = (sharded / name).read_bytes()
        headers[name] = parse_header(file, len(file), name)
    remote = build_source(where="org/name", config=local.config, headers=headers)
    assert remote.tensors == local.tensors
    assert remote.fingerprint() == local.fingerprint()
    with pytest.raises(AssertionError, match="not downloaded"):
        remote.open()
    check_contents(remote.located(sharded), ONE | TWO)


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert problems(sharded) == [f"DIR: 2 weight files ({FIRST}, {SECOND}) but no {INDEX}"]


def test_index_disagreements_are_all_reported(sharded: Path) -> None:
    third = "model-00003-of-00003.safetensors"
    write_index(
        sharded,
        {"a.weight": SECOND, "b.weight": SECOND, "gone": SECOND, "c": third, "d": third},
    )
    save_file(ONE, sharded / "model-extra.safetensors")
    assert problems(sharded) == [
        f"{FIRST}: not listed in {INDEX}; remove the file or repair the index",
        f"model-extra.safetensors: not listed in {INDEX}; remove the file or repair the index",
        f"{INDEX}: shard {third} is missing (2 tensors)",
        f"{INDEX}: a.weight: not in {SECOND}",
        f"{INDEX}: gone: not in {SECOND}",
        f"{SECOND}: b.bias: not listed in {INDEX}",
    ]


def test_tensor_listed_in_the_wrong_shard(sharded: Path) -> None:
    write_index(sharded, {**WEIGHT_MAP, "b.bias": FIRST})
    assert problems(sharded) == [f"{INDEX}: b.bias: not in {FIRST}; it is in {SECOND}"]


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_file({**ONE, **TWO}, sharded / FIRST)
    assert problems(sharded) == [
        f"b.bias: in more than one shard: {FIRST}, {SECOND}",
        f"b.weight: in more than one shard: {FIRST}, {SECOND}",
    ]


def test_truncated_shard_is_named_beside_other_problems(sharded: Path) -> None:
    os.truncate(sharded / FIRST, (sharded / FIRST).stat().st_size - 1)
    write_index(sharded, {**WEIGHT_MAP, "gone": SECOND})
    (sharded / "config.json").write_text("[]")
    assert problems(sharded) == [
        "config.json: not a JSON object",
        f"{FIRST}: a.weight: truncated: its data ends at byte 48 of 47",
        f"{INDEX}: gone: not in {SECOND}",
    ]


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../m.safetensors", "shard ../m.safetensors leaves the folder"),
        ("a/../../m.safetensors", "shard a/../../m.safetensors leaves the folder"),
        ("/etc/m.safetensors", "shard /etc/m.safetensors is not a relative path"),
        ("C:m.safetensors", "shard C:m.safetensors is not a relative path"),
        ("a\\m.safetensors", "shard a\\m.safetensors is not a relative path"),
        ("", "shard '' is not a file name"),
        ("./m.safetensors", "shard ./m.safetensors leaves the folder"),
        ("config.json", "shard config.json does not end in .safetensors"),
        (3, "a.weight: its shard is not a file name"),
    ],
)
def test_hostile_index_paths(sharded: Path, shard: object, message: str) -> None:
    write_index(sharded, {**WEIGHT_MAP, "a.weight": shard})
    assert problems(sharded) == [f"{INDEX}: {message}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": []}', "weight_map is missing, empty or not an object"),
        ('{"weight_map": {}}', "weight_map is missing, empty or not an object"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "keys that appear more than once: a"),
        ("{", "not JSON: Expecting property name enclosed in double quotes: "),
        ("[" * 200_000, "not JSON: nested too deeply"),
    ],
)
def test_bad_index(sharded: Path, text: str, message: str) -> None:
    (sharded / INDEX).write_text(text)
    (found,) = problems(sharded)
    assert found.startswith(f"{INDEX}: {message}")


def test_files_that_are_not_the_model_are_noted(sharded: Path) -> None:
    save_file(ONE, sharded / "consolidated.safetensors")
    save_file(ONE, sharded / "adapter_model.safetensors")
    (sharded / "pytorch_model.bin").write_bytes(b"never opened")
    (sharded / "training_args.bin").write_bytes(b"never opened")
    assert open_folder(sharded).notes == (
        "adapter_model.safetensors is ignored: an adapter; --adapter-path merges one",
        "consolidated.safetensors is ignored: the same weights in another layout",
        "training_args.bin is ignored: training state",
        "pytorch_model.bin ignored: the safetensors are used",
    )


def test_whole_model_beside_an_unrelated_file(folder: Path) -> None:
    save_file(ONE, folder / "model.safetensors")
    save_file(TWO, folder / "speaker.safetensors")
    source = open_folder(folder)
    assert source.weight_files == ("model.safetensors",)
    assert source.notes == ("speaker.safetensors is ignored: model.safetensors is the model",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "adapter_model.safetensors",
            "DIR: holds only an adapter (adapter_model.safetensors); convert its base model with "
            "--adapter-path pointing here",
        ),
        ("m.gguf", "m.gguf: truncated: the head at byte 0 needs 24 bytes of 0"),
        (
            "consolidated.safetensors",
            "DIR: no weights found (looked for *.safetensors, *.bin, *.pt, *.pth, *.gguf); "
            "consolidated.safetensors is not a layout this can read",
        ),
        (
            "notes.txt",
            "DIR: no weights found (looked for *.safetensors, *.bin, *.pt, *.pth, *.gguf)",
        ),
    ],
)
def test_no_weights(folder: Path, name: str, message: str) -> None:
    (folder / name).write_bytes(b"")
    assert problems(folder) == [message]


def test_folder_that_is_none(tmp_path: Path) -> None:
    assert problems(tmp_path / "gone") == ["DIR: no such folder"]
    (tmp_path / "file").write_text("")
    assert problems(tmp_path / "file") == [
        "DIR: not a folder; give the folder that holds the model"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "DIR: config.json does not exist"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "config.json: keys that appear more than once: c"),
        ("[]", "config.json: not a JSON object"),
        ('{"a": "\\ud800"', "config.json: not JSON: "),
    ],
)
def test_bad_config(folder: Path, text: str | None, message: str) -> None:
    save_file(ONE, folder / "model.safetensors")
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    (found,) = problems(folder)
    assert found.startswith(message)


def test_names_that_differ_only_in_case(folder: Path) -> None:
    save_file(ONE, folder / "model.safetensors")
    (folder / "Readme.md").write_text("")
    (folder / "README.md").write_text("")
    if len(list(folder.glob("*.md"))) == 2:  # not on a disk that ignores case
        assert problems(folder) == [
            "README.md and Readme.md: names that differ only in case; rename one"
        ]


def test_mlx_input_needs_a_flag(folder: Path) -> None:
    advice = "give the original release, or use -d / --to torch to convert this one back"
    path = folder / "model.safetensors"
    save_file(ONE, path, metadata={"format": "mlx"})
    assert problems(folder) == [
        f"DIR: already an MLX checkpoint (model.safetensors says format: mlx); {advice}"
    ]
    check_contents(open_folder(folder, allow_mlx=True), ONE)
    save_file({**ONE, "a.scales": np.ones(1, np.float32)}, path)
    open_folder(folder)
    (folder / "config.json").write_text('{"quantization": {"group_size": 64, "bits": 4}}')
    assert problems(folder) == [
        "DIR: already an MLX checkpoint (config.json has MLX quantization settings and the "
        f"weights have .scales); {advice}"
    ]


def test_link_that_leaves_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file(ONE, outside)
    (folder / "model.safetensors").symlink_to(outside)
    assert problems(folder) == [
        f"DIR: model.safetensors is a link that leaves the folder (to {outside.resolve()})"
    ]
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")
    assert problems(folder) == ["DIR: model.safetensors is a broken link"]
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    (found,) = problems(folder)
    assert found.startswith("DIR: model.safetensors cannot be followed")
    (folder / "model.safetensors").unlink()
    save_file(ONE, folder / "real.safetensors.data")
    (folder / "model.safetensors").symlink_to("real.safetensors.data")
    check_contents(open_folder(folder), ONE)


def test_linked_folder_inside_does_not_open_a_way_out(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    save_file(ONE, tmp_path / "elsewhere" / "m.safetensors")
    (sharded / "sub").symlink_to(tmp_path / "elsewhere")
    write_index(sharded, {**WEIGHT_MAP, "x": "sub/m.safetensors"})
    assert any("is a link that leaves the folder" in problem for problem in problems(sharded))


@pytest.mark.parametrize("shared", [False, True])
def test_hub_cache_layout(tmp_path: Path, shared: bool) -> None:
    cache = tmp_path / "hub"
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    store = cache / "blobs" / "ab" if shared else repo / "blobs"
    store.mkdir(parents=True, exist_ok=True)
    save_file(ONE, store / "abc")
    if shared:
        (repo / "blobs" / "abc").symlink_to("../../blobs/ab/abc")
    (repo / "blobs" / "def").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "config.json").symlink_to("../../blobs/def")
    check_contents(open_folder(snapshot), ONE)
    # The same links mean nothing in a folder that is no snapshot of a repo.
    repo.rename(cache / "other")
    if not shared:
        moved = cache / "other" / "snapshots" / ("0" * 40)
        assert all("leaves the folder" in problem for problem in problems(moved))


def test_resolve_inside_refuses_folders_and_climbing(folder: Path) -> None:
    (folder / "sub").mkdir()
    with pytest.raises(PlanError, match=r"sub is not a file$"):
        resolve_inside(folder, "sub")
    with pytest.raises(PlanError, match=r"^../config.json: leaves the folder$"):
        resolve_inside(folder, "../config.json")
    assert resolve_inside(folder, "config.json") == folder / "config.json"


def test_selection_is_a_pure_function_of_names() -> None:
    names = ["config.json", INDEX, FIRST, SECOND, "sub/other.safetensors", ".hidden.safetensors"]
    selection = select_weights(names, "org/name")
    assert (selection.kind, selection.index, selection.files) == ("safetensors", INDEX, ())
    assert select_weights(["pytorch_model.bin", "optimizer.pt"], "x").files == (
        "pytorch_model.bin",
    )


def test_read_rows_and_bytes(folder: Path) -> None:
    arrays = {
        "bf": np.arange(24).reshape(4, 3, 2).astype(ml_dtypes.bfloat16),
        "scalar": np.asarray(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "thin": np.zeros((3, 0), np.float32),
    }
    save_file(arrays, folder / "model.safetensors")
    with open_folder(folder).open() as reader:
        np.testing.assert_array_equal(reader.read_rows("bf", 1, 3), arrays["bf"][1:3])
        assert reader.read_rows("bf", 2, 2).shape == (0, 3, 2)
        assert reader.read_rows("scalar", 0, 1) == np.float32(2.5)
        assert reader.read_rows("scalar", 0, 1).shape == ()
        assert reader.read_rows("empty", 0, 0).shape == (0, 3)
        assert reader.read_rows("thin", 1, 3).shape == (2, 0)
        buffer = bytearray(6)
        reader.pread_into("bf", 4, buffer)
        assert bytes(buffer) == arrays["bf"].tobytes()[4:10]
        with pytest.raises(AssertionError, match="outside the tensor"):
            reader.pread_into("bf", 44, buffer)
        with pytest.raises(AssertionError, match="bf has 4 rows: 2:5"):
            reader.read_rows("bf", 2, 5)
    with pytest.raises(AssertionError, match="closed"):
        reader.read("bf")


def test_reading_without_preadv(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.source.reader._HAS_PREADV", False)
    save_file(ONE, folder / "model.safetensors")
    check_contents(open_folder(folder), ONE)


def test_file_that_changes_after_planning(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(ONE, path)
    source = open_folder(folder)
    size = path.stat().st_size
    with source.open() as reader:
        reader.read("a.weight")
        os.truncate(path, size - 8)
        with pytest.raises(PlanError) as caught:
            reader.read("a.weight")
    assert str(caught.value) == (
        f"model.safetensors: a.weight: short read: the file ends at byte {size - 8}, 8 bytes early"
    )
    with source.open() as reader, pytest.raises(PlanError, match="changed since it was planned"):
        reader.read("a.weight")
    path.unlink()
    with source.open() as reader, pytest.raises(PlanError, match="cannot be read: No such file"):
        reader.read("a.weight")


def test_threads_share_a_reader(sharded: Path) -> None:
    failures = []
    with open_folder(sharded).open() as reader:

        def work() -> None:
            for _ in range(200):
                for name, array in (ONE | TWO).items():
                    if not np.array_equal(reader.read(name), array):
                        failures.append(name)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(reader._descriptors) == 2
    assert not failures
