"""What goes along with the weights, and what does not."""

import json

import pytest
from release_helpers import LLAMA, hashes, make, status, write_release

from converter.errors import PlanError
from converter.sidecars import choose_sidecars, is_sidecar, list_sidecars

COPIED = {
    "tokenizer.json": b'{"a": "\xc3\xa9"}',
    "tokenizer_config.json": b'{ "odd":   "spacing" }\r\n',
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b"{}",
    "preprocessor_config.json": b"{}",
    "merges.txt": b"a b\n",
    "tokenizer.model": bytes(range(256)),
    "vocab.json": b"",
    "LICENSE": b"words",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "modules.json": b"[]",
    "docs/README.md": b"nested",
    "modeling_custom.py": b"",
}
LEFT = [
    *(".gitattributes", ".cache/huggingface/x.json", "a/.hidden", "README.md", "model.gguf"),
    *("pytorch_model.bin", "training_args.bin", "optimizer.pt", "flax_model.msgpack"),
    *("tf_model.h5", "onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.xml"),
    *("coreml/Model.mlpackage/Data/weights/weight.bin", "original/params.json"),
    *("checkpoint-500/config.json", "model.onnx_data", "rust_model.ot", "parity.json"),
    *(
        "quantize_config.json",
        "conversion.json",
        "parity.html",
        "parity-kl.png",
        "quality.json",
        "pytorch_model.bin.index.json",
    ),
]


@pytest.fixture
def release(tmp_path):
    root = write_release(tmp_path / "in" / "release")
    for name, data in COPIED.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_copied_byte_for_byte_and_nothing_else(release, tmp_path):
    for name in LEFT:
        (release / name).parent.mkdir(parents=True, exist_ok=True)
        (release / name).write_bytes(b"not this")
    [out] = make(release, tmp_path / "out")
    made = hashes(out)
    assert {name: (out / name).read_bytes() for name in COPIED} == COPIED
    ours = {"config.json", "conversion.json", "model.safetensors", "model.safetensors.index.json"}
    assert made.keys() == COPIED.keys() | ours
    listed = json.loads((out / "conversion.json").read_text())["files"]
    assert listed.keys() == made.keys() - {"conversion.json"}


@pytest.mark.parametrize("name", LEFT)
def test_left_behind(name):
    assert not is_sidecar(name)
    assert name not in choose_sidecars([name, "tokenizer.json"])


def test_names_of_the_work_folder_are_free(release, tmp_path):
    for name in ("lock", "journal.jsonl"):
        (release / name).write_text("mine")
    [out] = make(release, tmp_path / "out")
    assert (out / "lock").read_text() == (out / "journal.jsonl").read_text() == "mine"


def test_links_inside_are_followed_and_links_outside_refused(release, tmp_path, capsys):
    (release / "special_tokens_map.json").symlink_to("tokenizer.json")
    assert "special_tokens_map.json" in list_sidecars(release)
    [out] = make(release, tmp_path / "out")
    copy = out / "special_tokens_map.json"
    assert not copy.is_symlink()
    assert copy.read_bytes() == COPIED["tokenizer.json"]
    (tmp_path / "secret").write_text("key")
    (release / "notes.txt").symlink_to(tmp_path / "secret")
    (release / "folder").symlink_to(tmp_path)
    (release / "gone.txt").symlink_to("nowhere")
    assert status("--hf-path", release, "--mlx-path", tmp_path / "no", "--no-validate") == 3
    message = capsys.readouterr().err
    assert "'notes.txt' is a link that leaves the folder" in message or "notes.txt" in message
    assert all(name in message for name in ("notes.txt", "folder", "gone.txt"))
    assert not (tmp_path / "no").exists()


def test_unsafe_names_of_a_hub_repo():
    with pytest.raises(PlanError) as caught:
        choose_sidecars(["a.json", "A.json", "a//b.txt", "/etc/x", "ok.txt"])
    assert len(caught.value.problems) == 3
    assert choose_sidecars(["../up.txt", "a/../../up.txt", "ok.txt"]) == ("ok.txt",)


def test_custom_code_is_copied_and_never_run(release, tmp_path):
    proof = tmp_path / "ran"
    code = f"open({str(proof)!r}, 'w').close()\n".encode()
    for name in (
        "modeling_custom.py",
        "configuration_custom.py",
        "__init__.py",
        "sitecustomize.py",
    ):
        (release / name).write_bytes(code)
    auto_map = {"AutoConfig": "configuration_custom.C", "AutoModel": "modeling_custom.M"}
    config = LLAMA | {"auto_map": auto_map, "model_file": "modeling_custom.py"}
    (release / "config.json").write_text(json.dumps(config))
    arguments = ("--hf-path", release, "--mlx-path", tmp_path / "out", "--no-validate", "--quiet")
    assert status(*arguments) == 0
    assert status("plan", "--hf-path", release) == 0
    assert (tmp_path / "out" / "modeling_custom.py").read_bytes() == code
    assert not proof.exists()
