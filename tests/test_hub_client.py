"""Our use of the hub, through the real client, against the staging hub and its faults."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx2
import pytest
from huggingface_hub import HfApi, constants

from converter import hub
from converter.errors import ConvertError, GateError, HubError, PlanError, UsageError
from converter.hub import api as hub_api
from converter.hub import fetch, publish, redact
from converter.staging import Fault, Faults, StagingOptions, running_hub

# The client itself passes file objects to its HTTP library in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = (
    "---\nlicense: apache-2.0\nlibrary_name: mlx\npipeline_tag: text-generation\n"
    "tags: [mlx]\n---\n# A model\n"
)
WEIGHTS = bytes(range(256)) * 4096
REPO = "acme/model"
TOKEN = "hf_abcdefghijklmnop"
HF_WEIGHTS = r"resolve/.*/model\.safetensors"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_api, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def endpoint(tmp_path: Path, faults: Faults) -> Iterator[str]:
    with running_hub(tmp_path / "hub", faults=faults) as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    (root / "README.md").write_text(CARD)
    (root / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(WEIGHTS)
    (root / "sub" / "note.txt").write_text("note")
    (root / ".journal").write_text("not to be published")
    return root


@pytest.fixture
def published(endpoint: str, folder: Path) -> str:
    hub.upload(folder, REPO, commit_message="first", endpoint=endpoint)
    return endpoint


def commits(endpoint: str) -> list[str]:
    return [c.title for c in HfApi(endpoint=endpoint, token=TOKEN).list_repo_commits(REPO)]


def files(endpoint: str) -> set[str]:
    return set(HfApi(endpoint=endpoint, token=TOKEN).list_repo_files(REPO)) - {".gitattributes"}


def test_resolve_revision(published: str) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    assert {f.path for f in snapshot.files} == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "sub/note.txt",
    }  # fmt: skip
    weights = snapshot.file("model.safetensors")
    assert weights.size == len(WEIGHTS)
    assert weights.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert snapshot.file("config.json").sha256 is None
    assert len(snapshot.commit) == 40
    assert (snapshot.license, snapshot.pipeline_tag) == ("apache-2.0", "text-generation")
    assert (snapshot.gated, snapshot.private, snapshot.library_name) == (False, False, "mlx")
    assert snapshot.card["tags"] == ["mlx"]
    assert snapshot.last_modified is not None
    assert hub.resolve_revision(REPO, revision=snapshot.commit, endpoint=published) == snapshot
    with pytest.raises(HubError, match=r"no file model\.safetensor; did you mean model\.safete"):
        snapshot.file("model.safetensor")


def test_fetch_range(published: str, faults: Faults) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    assert hub.fetch_range(snapshot, "model.safetensors", 8, 300) == WEIGHTS[8:300]
    end = len(WEIGHTS)
    assert hub.fetch_range(snapshot, "model.safetensors", end - 1, end) == WEIGHTS[-1:]
    assert hub.fetch_range(snapshot, "model.safetensors", 5, 5) == b""
    with pytest.raises(HubError, match="truncated or its header is wrong"):
        hub.fetch_range(snapshot, "model.safetensors", 0, end + 1)
    faults.add(Fault("ignore_range", "GET", HF_WEIGHTS))
    with pytest.raises(HubError, match="ignored a Range request"):
        hub.fetch_range(snapshot, "model.safetensors", 8, 300)


def test_fetch_range_tries_again(published: str, faults: Faults) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    faults.add(Fault("refuse", "GET", HF_WEIGHTS, times=2))
    faults.add(Fault("truncate", "GET", HF_WEIGHTS))
    assert hub.fetch_range(snapshot, "model.safetensors", 8, 90_000) == WEIGHTS[8:90_000]


def test_the_record_of_checked_files_is_only_that(
    published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    cache = tmp_path / "cache"
    records = cache / ".verified"

    def download(*names: str) -> Path:
        return hub.download(snapshot, names, cache_dir=cache)

    cache.mkdir()
    records.write_text("in the way of the folder")
    root = download("config.json", "model.safetensors")
    records.unlink()
    with monkeypatch.context() as patch:  # it changes while it is hashed
        patch.setattr(fetch, "check_hash", lambda *given: os.utime(root / "config.json", (1, 1)))
        download("config.json")
    assert not list(records.iterdir())
    download("config.json", "model.safetensors")
    assert len(list(records.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "check_hash", pytest.fail)
        download("config.json", "model.safetensors")
    (root / "model.safetensors").resolve().unlink()
    (root / "model.safetensors").unlink()
    hashed = []
    original = fetch.check_hash
    with monkeypatch.context() as patch:  # the record of a file that was fetched anew is of old
        patch.setattr(
            fetch, "check_hash", lambda *given: hashed.append(given[1].path) or original(*given)
        )
        download("config.json", "model.safetensors")
    assert hashed == ["model.safetensors"]


def test_a_record_does_not_hang_on_others(published: str, tmp_path: Path) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    cache = tmp_path / "cache"
    hub.download(snapshot, ["config.json"], cache_dir=cache)
    (cache / ".verified" / "other").symlink_to("nowhere")  # as one that another thread removes
    hub.download(snapshot, ["model.safetensors"], cache_dir=cache)
    assert len(list((cache / ".verified").iterdir())) == 3


def test_download_is_pinned_and_reports_progress(
    published: str, folder: Path, tmp_path: Path
) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    (folder / "config.json").write_text('{"moved": true}')
    hub.upload(folder, REPO, commit_message="second", endpoint=published)
    seen: list[tuple[int, int]] = []
    got = hub.download(
        snapshot,
        ["model.safetensors", "config.json", "sub/note.txt"],
        progress=lambda done, total: seen.append((done, total)),
        cache_dir=tmp_path / "cache",
    )
    assert got.name == snapshot.commit
    assert (got / "model.safetensors").read_bytes() == WEIGHTS
    assert (got / "config.json").read_text() == "{}"
    assert (got / "sub" / "note.txt").read_text() == "note"
    total = len(WEIGHTS) + 2 + 4
    assert seen[-1] == (total, total)
    assert not (got / "README.md").exists()


@pytest.mark.parametrize("path", ["model.safetensors", "sub/note.txt"])
def test_damage_of_the_same_size_is_caught_and_repaired(
    published: str, faults: Faults, tmp_path: Path, path: str
) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    faults.add(Fault("corrupt", "GET", f"resolve/.*/{path}"))
    cache = tmp_path / "cache"
    with pytest.raises(HubError, match=f"{path} of acme/model arrived damaged.*run the same"):
        hub.download(snapshot, [path], cache_dir=cache)
    assert not [p for p in cache.rglob("*") if p.is_file() and p.parent.name == "blobs"]
    got = hub.download(snapshot, [path], cache_dir=cache)
    assert hub.sha256_of(got / path) == hub.sha256_of(tmp_path / "model" / path)


def test_damage_in_the_cache_is_caught(published: str, tmp_path: Path) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    got = hub.download(snapshot, ["model.safetensors"], cache_dir=tmp_path / "cache")
    (got / "model.safetensors").write_bytes(WEIGHTS[::-1])
    with pytest.raises(HubError, match="arrived damaged"):
        hub.download(snapshot, ["model.safetensors"], cache_dir=tmp_path / "cache")
    hub.download(snapshot, ["model.safetensors"], cache_dir=tmp_path / "cache")


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


def test_errors_say_what_to_do(
    published: str, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(**arguments: str) -> str:
        with pytest.raises(HubError) as caught:
            hub.resolve_revision(**{"repo_id": REPO, "endpoint": published, **arguments})
        assert caught.value.exit_code == 5
        assert "\n" not in str(caught.value)
        assert TOKEN not in str(caught.value)
        return str(caught.value)

    assert "no repository acme/nope, or your token does not see it" in look(repo_id="acme/nope")
    assert "acme/model has no such revision" in look(revision="nope")
    assert "is not a repository name" in look(repo_id="not a name")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "log in with `hf auth login` or set HF_TOKEN" in look(repo_id="acme/nope")
    with pytest.raises(HubError, match=r"No access token was found\. Log in with"):
        hub.whoami(endpoint=published)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.whoami(endpoint=published) == "local"
    retry = (("retry-after", "7"),)
    faults.add(Fault("refuse", "GET", "/api/models", status=429, times=4, headers=retry))
    assert "Wait 7 seconds and run the same command again" in look()
    faults.add(Fault("refuse", "GET", "/api/models", status=502, times=4))
    assert "the hub is failing (HTTP 502)" in look()
    faults.add(Fault("refuse", "GET", "/api/models", status=503, times=2))
    assert hub.resolve_revision(REPO, endpoint=published).repo_id == REPO
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in look()


def test_an_unreachable_hub_is_said_plainly() -> None:
    with pytest.raises(HubError, match=r"cannot be reached \(ConnectError\)\. Check the conn"):
        hub.resolve_revision(REPO, endpoint="http://127.0.0.1:9")


def test_gated_and_forbidden(published: str, tmp_path: Path) -> None:
    api = HfApi(endpoint=published, token=TOKEN)
    api.update_repo_settings(REPO, gated="manual")
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    assert snapshot.gated
    for call in (
        lambda: hub.download(snapshot, ["model.safetensors"], cache_dir=tmp_path / "c"),
        lambda: hub.fetch_range(snapshot, "model.safetensors", 0, 8),
    ):
        with pytest.raises(HubError, match=f"is gated. Ask for access at {published}/{REPO};"):
            call()


def test_a_wrong_token_is_said_plainly_and_not_repeated(tmp_path: Path, folder: Path) -> None:
    options = StagingOptions(tokens=frozenset({"hf_right1"}), require_token=True)
    with running_hub(tmp_path / "hub", options=options) as url:
        with pytest.raises(HubError, match="did not accept the request's credentials") as caught:
            hub.upload(folder, REPO, commit_message="m", endpoint=url, token="hf_wrong1")
        assert "hf_wrong1" not in str(caught.value)
        hub.upload(folder, REPO, commit_message="m", endpoint=url, token="hf_right1")


def test_a_hostile_hub_cannot_name_a_file_outside(
    published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = HfApi.model_info

    def hostile(self: HfApi, *args: object, **kwargs: object) -> object:
        info = original(self, *args, **kwargs)
        info.siblings[0].rfilename = "a/../../x"
        return info

    monkeypatch.setattr(HfApi, "model_info", hostile)
    with pytest.raises(HubError, match="would leave its folder"):
        hub.resolve_revision(REPO, endpoint=published)


@pytest.mark.parametrize(
    "text",
    [
        "token hf_SeCrEtSeCrEt is wrong",
        "{'Authorization': 'Bearer SeCrEt.SeCrEt'}",
        "authorization: Bearer SeCrEtSeCrEt\nnext line",
        "curl -H 'authorization: SeCrEt SeCrEt'",
        "https://cdn/x?X-Amz-Signature=SeCrEt&X-Amz-Credential=SeCrEt&a=1",
        "https://cdn/x?Policy=SeCrEt&Signature=SeCrEt&Key-Pair-Id=SeCrEt",
        "http://user:SeCrEt@proxy:3128 refused",
    ],
)
def test_redact(text: str) -> None:
    assert "SeCrEt" not in redact(text)
    assert redact(redact(text)) == redact(text)


def test_redact_leaves_the_rest() -> None:
    assert redact("model hf_ok at https://x/y?revision=main") == (
        "model hf_ok at https://x/y?revision=main"
    )
    assert redact(f"the token {TOKEN[:3]}{TOKEN[3:]}.") == "the token ***."


def test_exit_codes() -> None:
    codes = {k: k.exit_code for k in (ConvertError, UsageError, PlanError, GateError, HubError)}
    assert list(codes.values()) == [1, 2, 3, 4, 5]
    error = PlanError(["one", "two"])
    assert (error.problems, str(error)) == (("one", "two"), "one\ntwo")


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
