import gc
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from arch_maps.dtypes import NUMPY_DTYPES
from converter.errors import PlanError
from converter.source import Source, open_folder
from converter.source.pickle_child import DTYPES
from converter.source.pickles import open_pickles

BASE = torch.arange(12.0).reshape(3, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "release"
    root.mkdir()
    (root / "config.json").write_text("{}")
    return root


def problems(folder: Path) -> list[str]:
    with pytest.raises(PlanError) as caught:
        open_folder(folder, scratch=folder.parent)
    assert caught.value.exit_code == 3
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "scratch left behind"
    return [problem.replace(str(folder), "DIR") for problem in caught.value.problems]


def check_contents(source: Source, tensors: dict[str, torch.Tensor]) -> None:
    assert list(source.tensors) == sorted(tensors)
    with source.open() as reader:
        for name, tensor in tensors.items():
            read = reader.read(name)
            assert read.shape == tuple(tensor.shape)
            assert DTYPES[str(tensor.dtype).removeprefix("torch.")] == source.tensors[name].dtype
            plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            assert read.tobytes() == plain.tobytes()


def in_place(source: Source) -> set[str]:
    return {name for name, info in source.tensors.items() if info.file in source.weight_files}


def test_every_dtype_is_read_from_the_file_itself(folder: Path) -> None:
    assert set(DTYPES.values()) == set(NUMPY_DTYPES)
    raw = torch.arange(48, dtype=torch.uint8) % 2
    tensors = {name: raw.clone().view(getattr(torch, name)) for name in DTYPES}
    torch.save(tensors, folder / "pytorch_model.bin")
    source = open_folder(folder, scratch=folder.parent)
    assert (source.kind, source.weight_files) == ("pickle", ("pytorch_model.bin",))
    assert source.notes == ()
    assert in_place(source) == set(tensors)
    assert list(folder.parent.iterdir()) == [folder]
    check_contents(source, tensors)


def test_views_and_parameters(folder: Path) -> None:
    tied = torch.nn.Parameter(BASE.clone())
    tensors = {
        "embed": tied,
        "head": tied,
        "rows": BASE[1:],
        "transposed": BASE.t(),
        "column": BASE[:, 1],
        "spread": BASE[0, 0].expand(5),
        "scalar": torch.tensor(7, dtype=torch.int16),
        "empty": torch.empty(0, 4),
    }
    torch.save(tensors, folder / "model.pt")
    source = open_folder(folder, scratch=folder.parent)
    assert in_place(source) == {"embed", "head", "rows", "scalar", "empty"}
    assert source.tensors["embed"].start == source.tensors["head"].start
    assert source.notes == (
        "model.pt: 3 tensors are read from an unpacked copy: not stored as plain rows",
    )
    check_contents(source, tensors)
    assert source.fingerprint() == open_folder(folder).fingerprint()
    assert set(source.fingerprint()) == {"model.pt"}


def test_unpacked_copies_live_as_long_as_source_or_reader(folder: Path) -> None:
    torch.save({"w": BASE.t()}, folder / "model.pt")
    reader = open_folder(folder, scratch=folder.parent).open()
    gc.collect()
    np.testing.assert_array_equal(reader.read("w"), BASE.t().numpy())
    reader.close()
    del reader
    gc.collect()
    assert list(folder.parent.iterdir()) == [folder]


def test_the_format_before_zip(folder: Path) -> None:
    tensors = {"w": BASE, "t": BASE.t(), "b": torch.ones(3, dtype=torch.bfloat16)}
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    source = open_folder(folder)
    assert in_place(source) == set()
    assert source.notes == (
        "pytorch_model.bin: 3 tensors are read from an unpacked copy: the file is in the format "
        "before zip",
    )
    check_contents(source, tensors)


def test_compressed_archive_is_unpacked(folder: Path) -> None:
    torch.save({"w": BASE.repeat(50, 1)}, folder / "stored.tmp")
    with (
        zipfile.ZipFile(folder / "stored.tmp") as stored,
        zipfile.ZipFile(folder / "model.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for info in stored.infolist():
            packed.writestr(info.filename, stored.read(info))
    source = open_folder(folder)
    assert in_place(source) == set()
    check_contents(source, {"w": BASE.repeat(50, 1)})


def test_shards_with_an_index(folder: Path) -> None:
    torch.save({"a": BASE}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": BASE + 1}, folder / "pytorch_model-00002-of-00002.bin")
    index = folder / "pytorch_model.bin.index.json"
    weight_map = {f"{n}": f"pytorch_model-0000{i}-of-00002.bin" for i, n in enumerate("ab", 1)}
    index.write_text(json.dumps({"weight_map": weight_map}))
    source = open_folder(folder)
    assert source.weight_files == tuple(weight_map.values())
    check_contents(source, {"a": BASE, "b": BASE + 1})
    index.write_text(json.dumps({"weight_map": {**weight_map, "c": weight_map["a"]}}))
    assert problems(folder) == [f"{index.name}: c: not in {weight_map['a']}"]


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrapped_state_dict(folder: Path, wrapper: str) -> None:
    torch.save({wrapper: {"w": BASE}, "epoch": 3, "args": {"lr": 1}}, folder / "model.pth")
    source = open_folder(folder)
    assert source.notes == (
        "model.pth: 2 entries that hold no tensors are ignored: epoch, args",
        f"model.pth: tensors are taken from the entry '{wrapper}'",
    )
    check_contents(source, {"w": BASE})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model": {"w": BASE}, "optimizer": {"state": [BASE]}},
            "cannot tell which entries are the model's; nested tensors under: 'model', 'optimizer'",
        ),
        (
            {"w": BASE, "ema": {"w": BASE}},
            "cannot tell which entries are the model's; nested tensors under: 'ema'",
        ),
        ({"epoch": 3}, "cannot tell which entries are the model's; nested tensors under: none"),
        ([BASE], "holds a list, not a dictionary of tensors"),
        ({3: BASE}, "tensor names that are not strings: 3"),
        ({"w": BASE.to(torch.complex64)}, "'w': a torch.strided tensor of torch.complex64"),
        ({"w": BASE.to_sparse()}, "'w': a torch.sparse_coo tensor of torch.float32"),
        ({"w": torch.zeros(1).expand(1 << 30)}, "unpacks to 4294967296 bytes, out of proportion"),
    ],
    ids=["optimizer", "ema", "none", "list", "number", "complex", "sparse", "bomb"],
)
def test_refused_contents(folder: Path, content: object, message: str) -> None:
    torch.save(content, folder / "model.pt")
    (found,) = problems(folder)
    assert found.startswith(f"model.pt: {message}")


class Payload:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_pickle_runs_nothing(folder: Path, form: str, tmp_path_factory: Any) -> None:
    sentinel = tmp_path_factory.mktemp("sentinel") / "ran"
    content = {"w": BASE, "evil": Payload(sentinel)}
    path = folder / "pytorch_model.bin"
    if form == "plain":
        path.write_bytes(pickle.dumps(content["evil"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    (found,) = problems(folder)
    assert found == (
        f"pytorch_model.bin: asks to run {os.system.__module__}.system, which is not part of a "
        "plain checkpoint"
    )
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(content["evil"]))
    assert sentinel.exists(), "the payload is harmless, so the test proves nothing"


def test_wrong_extensions(folder: Path) -> None:
    save_file({"w": BASE.numpy()}, folder / "pytorch_model.bin")
    assert problems(folder) == [
        "pytorch_model.bin: a safetensors file under a pickle's name; rename it to .safetensors"
    ]
    (folder / "pytorch_model.bin").unlink()
    for zipped in (True, False):
        torch.save({"w": BASE}, folder / "model.safetensors", _use_new_zipfile_serialization=zipped)
        assert problems(folder) == [
            "model.safetensors: a PyTorch pickle under a safetensors name; rename it to .bin to "
            "convert it"
        ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a PyTorch checkpoint"),
        (b"hello", "not a PyTorch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer, not the file itself"),
        (b"PK\3\4broken", "torch cannot load it safely: "),
        (b"\x80\2broken", "torch cannot load it safely: "),
    ],
)
def test_damaged_files(folder: Path, content: bytes, message: str) -> None:
    (folder / "pytorch_model.bin").write_bytes(content)
    (found,) = problems(folder)
    assert found.startswith(f"pytorch_model.bin: {message}")


def test_truncated_checkpoint(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save({"w": BASE}, path)
    os.truncate(path, path.stat().st_size // 2)
    assert problems(folder)[0].startswith("pytorch_model.bin: torch cannot load it safely: ")


def test_safetensors_win(folder: Path) -> None:
    torch.save({"w": BASE}, folder / "pytorch_model.bin")
    save_file({"w": BASE.numpy() + 1}, folder / "model.safetensors")
    source = open_folder(folder)
    assert source.notes == ("pytorch_model.bin ignored: the safetensors are used",)
    check_contents(source, {"w": BASE + 1})


def test_time_limit_and_secrets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "model.pt"
    torch.save({"w": BASE}, path)
    options: dict[str, Any] = {
        "where": "x",
        "root": folder,
        "config": {},
        "files": {"model.pt": path},
        "index": None,
    }
    with pytest.raises(PlanError, match=r"^model.pt: not read within 0.01 seconds$"):
        open_pickles(**options, timeout=0.01)
    child = folder.parent / "child.py"
    child.write_text("import os, sys; sys.exit('SECRET' if 'HF_TOKEN' in os.environ else 'none')")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("converter.source.pickle_child.__file__", str(child))
    with pytest.raises(PlanError, match=r"^model.pt: cannot be read: none$"):
        open_pickles(**options)
    child.write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(PlanError, match=r"^model.pt: reading was stopped by signal 9$"):
        open_pickles(**options)
