"""Uploading through the real client, against the staging hub and its faults."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import httpx2
import pytest
from hub_helpers import REPO, TOKEN, WEIGHTS, commits, files
from huggingface_hub import HfApi, constants

from converter import hub
from converter.errors import HubError, UsageError
from converter.hub import publish
from converter.staging import Fault, Faults, StagingOptions, running_hub

# The client itself passes file objects to its HTTP library in a deprecated way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("impatient"),
]


def test_upload_leaves_out_hidden_files_and_repeats_nothing(
    published: str, folder: Path, faults: Faults
) -> None:
    assert files(published) == {"README.md", "config.json", "model.safetensors", "sub/note.txt"}
    sent = [method for method, _ in faults.requests].count("PUT")
    url = hub.upload(folder, REPO, commit_message="again", endpoint=published)
    assert url == f"{published}/{REPO}"
    assert commits(published) == ["first", "initial commit"]
    assert [method for method, _ in faults.requests].count("PUT") == sent == 1


@pytest.mark.parametrize("fault", ["lose_response", "refuse"])
def test_a_lost_answer_does_not_commit_twice(
    endpoint: str, folder: Path, faults: Faults, fault: Literal["lose_response", "refuse"]
) -> None:
    faults.add(Fault(fault, "POST", "/commit/main", status=503))
    hub.upload(folder, REPO, commit_message="once", endpoint=endpoint)
    assert commits(endpoint) == ["once", "initial commit"]
    posts = [path for method, path in faults.requests if path.endswith("/commit/main")]
    assert len(posts) == (1 if fault == "lose_response" else 2)


def test_changed_weights_of_the_same_size_are_sent(published: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])
    hub.upload(folder, REPO, commit_message="changed", endpoint=published)
    now = hub.resolve_revision(REPO, endpoint=published).file("model.safetensors")
    assert now.sha256 == hashlib.sha256(WEIGHTS[::-1]).hexdigest()


def test_a_hub_that_stays_down_is_said_plainly(endpoint: str, folder: Path, faults: Faults) -> None:
    faults.add(Fault("refuse", "POST", "/commit/main", times=99))
    with pytest.raises(HubError, match=r"the hub is failing \(HTTP 503\)\. Nothing is lost"):
        hub.upload(folder, REPO, commit_message="m", endpoint=endpoint)
    assert commits(endpoint) == ["initial commit"]


def test_somebody_elses_commit_is_not_overwritten(
    endpoint: str, folder: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = HfApi.create_commit

    def raced(self: HfApi, *args: object, **kwargs: object) -> object:
        monkeypatch.setattr(HfApi, "create_commit", original)
        other = HfApi(endpoint=endpoint, token=TOKEN)
        other.upload_file(repo_id=REPO, path_or_fileobj=b"theirs", path_in_repo="config.json")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", raced)
    with pytest.raises(HubError, match="Somebody else committed to acme/model"):
        hub.upload(folder, REPO, commit_message="ours", endpoint=endpoint)
    assert "ours" not in commits(endpoint)


def test_shards_of_an_older_conversion_go_in_the_same_commit(
    published: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    api = HfApi(endpoint=published, token=TOKEN)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"keep", path_in_repo="eval.json")
    api.upload_file(repo_id=REPO, path_or_fileobj=b"keep", path_in_repo="other/a.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    hub.upload(folder, REPO, commit_message="resharded", endpoint=published)
    assert files(published) == {
        "README.md", "config.json", "eval.json", "model-00001-of-00001.safetensors",
        "model.safetensors.index.json", "other/a.safetensors", "sub/note.txt",
    }  # fmt: skip
    assert commits(published)[0] == "resharded"
    (folder / "model-00001-of-00001.safetensors").unlink()
    hub.upload(folder, REPO, commit_message="kept", stale=(), endpoint=published)
    assert "model-00001-of-00001.safetensors" in files(published)


def test_upload_goes_on_with_the_second_file(endpoint: str, folder: Path, faults: Faults) -> None:
    (folder / "second.safetensors").write_bytes(WEIGHTS[::-1])
    second = hashlib.sha256(WEIGHTS[::-1]).hexdigest()
    faults.add(Fault("refuse", "PUT", second, status=403))
    with pytest.raises(HubError, match="HTTP 403"):
        hub.upload(folder, REPO, commit_message="m", endpoint=endpoint)
    assert files(endpoint) == set()
    seen: list[tuple[int, int]] = []
    hub.upload(
        folder, REPO, commit_message="m", endpoint=endpoint,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    puts = [path for method, path in faults.requests if method == "PUT"]
    assert len(puts) == 3
    assert seen[-1][0] == seen[-1][1] > 2 * len(WEIGHTS)
    assert commits(endpoint) == ["m", "initial commit"]


def test_a_file_that_changes_during_the_upload_is_caught(
    endpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = HfApi.create_commit

    def edited(self: HfApi, *args: object, **kwargs: object) -> object:
        (folder / "config.json").write_text("[]")
        result = original(self, *args, **kwargs)
        (folder / "config.json").write_text("{}")
        return result

    monkeypatch.setattr(HfApi, "create_commit", edited)
    with pytest.raises(HubError, match=r"not what was sent: config\.json"):
        hub.upload(folder, REPO, commit_message="m", endpoint=endpoint)


def test_private_stays_private(endpoint: str, folder: Path) -> None:
    hub.upload(folder, "acme/secret", commit_message="m", private=True, endpoint=endpoint)
    assert hub.resolve_revision("acme/secret", endpoint=endpoint).private
    hub.upload(folder, REPO, commit_message="m", endpoint=endpoint)
    with pytest.raises(HubError, match="exists and is public"):
        hub.upload(folder, REPO, commit_message="m", private=True, endpoint=endpoint)


def test_upload_refuses_files_outside_the_folder(
    endpoint: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    for paths in (None, ["../secret"], ["link"], ["absent"]):
        with pytest.raises(UsageError, match="is not a file inside"):
            hub.upload(folder, REPO, commit_message="m", paths=paths, endpoint=endpoint)
    with pytest.raises(UsageError, match="nothing to upload"):
        hub.upload(folder, REPO, commit_message="m", paths=[], endpoint=endpoint)


def test_a_hub_without_xet_is_recognised(endpoint: str, folder: Path) -> None:
    assert not publish.is_loopback("https://huggingface.co")
    api = hub.client(endpoint=endpoint)
    api.create_repo(REPO)
    assert not publish._offers_xet(api, REPO, "main")


def test_upload_works_with_xet_installed(endpoint: str, folder: Path) -> None:
    assert constants.HF_HUB_DISABLE_XET is False
    hub.upload(folder, REPO, commit_message="m", endpoint=endpoint)
    assert constants.HF_HUB_DISABLE_XET is False
    assert "model.safetensors" in files(endpoint)


def test_a_wrong_token_is_said_plainly_and_not_repeated(tmp_path: Path, folder: Path) -> None:
    options = StagingOptions(tokens=frozenset({"hf_right1"}), require_token=True)
    with running_hub(tmp_path / "hub", options=options) as url:
        with pytest.raises(HubError, match="did not accept the request's credentials") as caught:
            hub.upload(folder, REPO, commit_message="m", endpoint=url, token="hf_wrong1")
        assert "hf_wrong1" not in str(caught.value)
        hub.upload(folder, REPO, commit_message="m", endpoint=url, token="hf_right1")


RUNTIME = """
import json, os, sys
from pathlib import Path
folder, repo = sys.argv[1:]
sys.path.insert(0, os.environ["CHECKOUT"])
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
)
source = Path(folder) / "torch"
Qwen3ForCausalLM(config).save_pretrained(source)
spelt = json.loads((source / "config.json").read_text())
spelt["rope_theta"] = 10000.0
(source / "config.json").write_text(json.dumps(spelt))
AutoTokenizer.from_pretrained(os.environ["TOKENIZER"]).save_pretrained(source)
import mlx.core as mx
import mlx_lm
mlx_lm.convert(str(source), mlx_path=str(Path(folder) / "mlx"), dtype="float32")
from converter import hub
print(hub.upload(Path(folder) / "mlx", repo, commit_message="converted"))
model, tokenizer = mlx_lm.load(repo)
local, _ = mlx_lm.load(str(Path(folder) / "mlx"))
tokens = mx.array([[1, 2, 3]])
assert mx.array_equal(model(tokens), local(tokens))
from mlx_vlm.utils import get_model_path
vlm = Path(get_model_path(repo))
assert (vlm / "config.json").exists() and (vlm / "model.safetensors").exists()
print("loaded", tokenizer.vocab_size, len(model.layers))
"""


def test_stock_runtimes_load_from_it(endpoint: str, tmp_path: Path, faults: Faults) -> None:
    checkout = Path(__file__).parent.parent
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNTIME, str(tmp_path / "work"), "acme/tiny-mlx"],
        env={
            **os.environ,
            "CHECKOUT": str(checkout),
            "TOKENIZER": str(checkout / "tests" / "fixtures" / "tinylm"),
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{endpoint}/acme/tiny-mlx" in done.stdout
    assert done.stdout.rstrip().endswith("2")
    assert any("resolve" in path for _, path in faults.requests)
    index = httpx2.get(f"{endpoint}/acme/tiny-mlx/resolve/main/model.safetensors.index.json")
    assert "weight_map" in json.loads(index.content)
