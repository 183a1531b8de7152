"""The staging hub, driven by the real huggingface_hub client over HTTP."""

import hashlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from converter.errors import ConvertError, UsageError
from converter.staging import Fault, Faults, StagingOptions, create_app, running_hub, serve
from converter.staging.card import CardError, parse_front_matter
from converter.staging.names import checked_path
from converter.staging.pages import render_card
from converter.staging.refusal import Refusal

# The client itself passes file objects to its HTTP library in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "---\nlicense: mit\nlibrary_name: mlx\ntags: [mlx]\nbase_model: acme/base\n---\n# A model\n"
WEIGHTS = bytes(range(256)) * 4096


@pytest.fixture(autouse=True)
def _no_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    with running_hub(tmp_path / "hub", options=StagingOptions(page_size=3)) as url:
        yield url


@pytest.fixture
def api(hub: str) -> HfApi:
    return HfApi(endpoint=hub, token="hf_somebody")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    (root / "sub" / "deeper").mkdir(parents=True)
    (root / "README.md").write_text(CARD)
    (root / "config.json").write_text('{"model_type": "qwen3"}')
    (root / "model.safetensors").write_bytes(WEIGHTS)
    (root / "sub" / "a b%2F+é.txt").write_text("odd name")
    (root / "sub" / "deeper" / "empty").touch()
    return root


@pytest.fixture
def repo(api: HfApi, folder: Path) -> str:
    api.create_repo("acme/model")
    api.upload_folder(repo_id="acme/model", folder_path=folder)
    return "acme/model"


def test_create_is_409_unless_exist_ok(api: HfApi) -> None:
    assert api.create_repo("acme/m").repo_id == "acme/m"
    assert api.create_repo("acme/m", exist_ok=True).repo_id == "acme/m"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("acme/m")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("Acme/M")
    assert api.create_repo("mine").repo_id == "local/mine"
    api.delete_repo("acme/m")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("acme/m")
    assert not api.repo_exists("acme/m")


def test_whoami(api: HfApi, hub: str) -> None:
    assert api.whoami()["name"] == "local"
    assert httpx2.get(f"{hub}/api/whoami-v2").status_code == 401


def test_upload_then_download_gives_the_same_bytes(
    api: HfApi, repo: str, folder: Path, tmp_path: Path
) -> None:
    got = Path(api.snapshot_download(repo, cache_dir=tmp_path / "cache"))
    for path in folder.rglob("*"):
        if path.is_file():
            assert (got / path.relative_to(folder)).read_bytes() == path.read_bytes()
    check = api.verify_repo_checksums(repo, cache_dir=tmp_path / "cache")
    assert (check.checked_count, check.mismatches, check.missing_paths) == (6, [], [])


def test_model_info(api: HfApi, repo: str) -> None:
    info = api.model_info(repo, files_metadata=True)
    assert set(info.tags) == {
        "mlx", "base_model:acme/base", "license:mit", "safetensors", "qwen3",
    }  # fmt: skip
    assert info.card_data.license == "mit"
    assert info.library_name == "mlx"
    files = {sibling.rfilename: sibling for sibling in info.siblings}
    weights = files["model.safetensors"]
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert weights.size == len(WEIGHTS)
    git = subprocess.run(
        ["git", "hash-object", "--stdin"], input=CARD.encode(), capture_output=True, check=True
    )
    assert files["README.md"].blob_id == git.stdout.decode().strip()
    assert api.model_info(repo, revision=info.sha).sha == info.sha
    assert api.model_info(repo, expand=["tags"]).siblings is None
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="nope")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="0" * 40)


def test_tree_is_paged_and_recursive(api: HfApi, repo: str) -> None:
    flat = [item.path for item in api.list_repo_tree(repo)]
    assert flat == [".gitattributes", "README.md", "config.json", "model.safetensors", "sub"]
    deep = [item.path for item in api.list_repo_tree(repo, recursive=True, expand=True)]
    assert deep == sorted([*flat, "sub/a b%2F+é.txt", "sub/deeper", "sub/deeper/empty"])
    below = [item.path for item in api.list_repo_tree(repo, "sub/deeper", recursive=True)]
    assert below == ["sub/deeper/empty"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(repo, "additional_chat_templates"))
    found = api.get_paths_info(repo, ["sub", "config.json", "absent"], expand=True)
    assert [item.path for item in found] == ["sub", "config.json"]
    assert found[1].last_commit.title == "Upload folder using huggingface_hub"


def test_list_models_filters_sorts_and_pages(api: HfApi, repo: str) -> None:
    for number in range(7):
        api.create_repo(f"other/plain-{number}")
    assert [m.id for m in api.list_models(filter="mlx")] == [repo]
    assert [m.id for m in api.list_models(filter=["mlx", "absent"])] == []
    assert [m.id for m in api.list_models(search="PLAIN-3")] == ["other/plain-3"]
    newest = [m.id for m in api.list_models(author="other", sort="last_modified")]
    assert newest == [f"other/plain-{number}" for number in reversed(range(7))]
    limited = list(api.list_models(sort="last_modified", limit=4))
    assert [m.id for m in limited] == newest[:4]
    assert [m.card_data.license for m in api.list_models(filter="mlx", cardData=True)] == ["mit"]
    assert [m.sha for m in api.list_models(filter="mlx", expand=["sha"])] == [
        api.model_info(repo).sha
    ]


def test_history_refs_and_branches(api: HfApi, repo: str) -> None:
    commits = api.list_repo_commits(repo)
    assert [c.title for c in commits] == ["Upload folder using huggingface_hub", "initial commit"]
    api.create_branch(repo, branch="feature/x", revision=commits[1].commit_id)
    branches = {b.name: b.target_commit for b in api.list_repo_refs(repo).branches}
    assert branches == {"main": commits[0].commit_id, "feature/x": commits[1].commit_id}
    assert api.list_repo_files(repo, revision="feature/x") == [".gitattributes"]
    api.upload_file(
        repo_id=repo, revision="feature/x", path_or_fileobj=b"x", path_in_repo="only-here"
    )
    assert api.file_exists(repo, "only-here", revision="feature/x")
    assert not api.file_exists(repo, "only-here")


def test_resolve_headers_and_ranges(hub: str, repo: str, api: HfApi) -> None:
    sha = hashlib.sha256(WEIGHTS).hexdigest()
    url = f"{hub}/{repo}/resolve/main/model.safetensors"
    head = httpx2.head(url)
    assert head.headers["etag"] == f'"{sha}"'
    assert head.headers["x-linked-etag"] == f'"{sha}"'
    assert head.headers["x-linked-size"] == head.headers["content-length"] == str(len(WEIGHTS))
    assert head.headers["x-repo-commit"] == api.model_info(repo).sha
    part = httpx2.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, WEIGHTS[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(WEIGHTS)}"
    assert httpx2.get(url, headers={"Range": "bytes=-5"}).content == WEIGHTS[-5:]
    assert httpx2.get(url, headers={"Range": f"bytes={len(WEIGHTS)}-"}).status_code == 416
    missing = httpx2.get(f"{hub}/{repo}/resolve/main/absent")
    assert (missing.status_code, missing.headers["x-error-code"]) == (404, "EntryNotFound")


def test_private_repos_need_a_token(hub: str, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("acme/secret", private=True)
    api.upload_file(repo_id="acme/secret", path_or_fileobj=b"x", path_in_repo="f")
    anonymous = HfApi(endpoint=hub, token=False)
    with pytest.raises(RepositoryNotFoundError) as caught:
        anonymous.model_info("acme/secret")
    assert caught.value.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError):
        anonymous.hf_hub_download("acme/secret", "f", cache_dir=tmp_path / "c")
    assert list(anonymous.list_models()) == []
    assert "acme/secret" not in httpx2.get(hub).text
    assert [m.private for m in api.list_models()] == [True]
    with pytest.raises(HfHubHTTPError, match="401"):
        anonymous.create_repo("acme/other", private=True)
    api.update_repo_settings("acme/secret", private=False)
    assert anonymous.model_info("acme/secret").private is False


def test_wrong_token_and_required_token(tmp_path: Path) -> None:
    options = StagingOptions(tokens=frozenset({"hf_right"}), require_token=True)
    with running_hub(tmp_path / "hub", options=options) as url:
        with pytest.raises(HfHubHTTPError, match="401"):
            HfApi(endpoint=url, token="hf_wrong").create_repo("a/b")
        with pytest.raises(HfHubHTTPError, match="401"):
            HfApi(endpoint=url, token=False).create_repo("a/b")
        HfApi(endpoint=url, token="hf_right").create_repo("a/b")
        assert HfApi(endpoint=url, token=False).repo_exists("a/b")


def test_gated_repos(hub: str, api: HfApi, repo: str, tmp_path: Path) -> None:
    anonymous = HfApi(endpoint=hub, token=False)
    api.update_repo_settings(repo, gated="auto")
    assert anonymous.model_info(repo).gated == "auto"
    with pytest.raises(GatedRepoError) as caught:
        anonymous.hf_hub_download(repo, "config.json", cache_dir=tmp_path / "c")
    assert caught.value.response.status_code == 401
    assert api.hf_hub_download(repo, "config.json", cache_dir=tmp_path / "c")
    api.update_repo_settings(repo, gated="manual")
    with pytest.raises(GatedRepoError) as caught:
        api.hf_hub_download(repo, "README.md", cache_dir=tmp_path / "c")
    assert caught.value.response.status_code == 403


def test_commit_on_a_stale_parent_is_412(api: HfApi, repo: str) -> None:
    parent = api.list_repo_commits(repo)[1].commit_id
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(
            repo, [CommitOperationAdd("f", b"x")], commit_message="m", parent_commit=parent
        )
    assert len(api.list_repo_commits(repo)) == 2


def test_deletions(api: HfApi, repo: str) -> None:
    operations = [CommitOperationDelete("sub/"), CommitOperationDelete("config.json")]
    api.create_commit(repo, operations, commit_message="remove")
    assert api.list_repo_files(repo) == [".gitattributes", "README.md", "model.safetensors"]
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("config.json", repo)


@pytest.mark.parametrize(
    "path", ["../x", "a/../x", "/x", "a//x", "a\\x", "./x", "a\nb", "C:x", ".git/config", ""]
)
def test_paths_that_could_leave_the_repository_are_refused(hub: str, api: HfApi, path: str) -> None:
    with pytest.raises(Refusal):
        checked_path(path)
    api.create_repo("acme/m", exist_ok=True)
    lines = [
        {"key": "header", "value": {"summary": "s"}},
        {"key": "file", "value": {"path": path, "content": "eA==", "encoding": "base64"}},
    ]
    body = "\n".join(map(json.dumps, lines))
    assert httpx2.post(f"{hub}/api/models/acme/m/commit/main", content=body).status_code == 400
    assert api.list_repo_files("acme/m") == [".gitattributes"]


@pytest.mark.parametrize(
    "url",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/resolve/main/x",
        "/acme/model/resolve/main/../../x",
        "/acme/model/resolve/..%2F..%2Fx/f",
        "/acme/model/resolve/main/..%2f..%2frepo.json",
    ],
)
def test_urls_cannot_leave_the_folder(hub: str, repo: str, url: str) -> None:
    host, port = hub.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.request("GET", url)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert answer.status in (400, 401, 404)


def test_bad_commits_change_nothing(hub: str, api: HfApi, repo: str) -> None:
    url = f"{hub}/api/models/{repo}/commit/main"
    header = {"key": "header", "value": {"summary": "s"}}
    good = {"key": "file", "value": {"path": "new", "content": "eA==", "encoding": "base64"}}
    absent = {"path": "w.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}
    clash = {"path": "config.json/x", "content": "eA==", "encoding": "base64"}
    for last in (
        {"key": "lfsFile", "value": absent},
        {"key": "file", "value": clash},
        {"key": "file", "value": {"path": "y", "content": "not base64", "encoding": "base64"}},
        {"key": "surprise", "value": {"path": "y"}},
        ["not an object"],
    ):
        body = "\n".join(map(json.dumps, [header, good, last]))
        assert httpx2.post(url, content=body).status_code == 400
    assert len(api.list_repo_commits(repo)) == 2
    assert not api.file_exists(repo, "new")


def test_lfs_content_must_match_its_hash(hub: str, api: HfApi, repo: str) -> None:
    sha = hashlib.sha256(b"right").hexdigest()
    url = f"{hub}/{repo}.git/info/lfs/objects/{sha}"
    assert httpx2.put(url, params={"size": 5}, content=b"wrong").status_code == 400
    assert httpx2.put(url, params={"size": 5}, content=b"righ").status_code == 400
    assert httpx2.put(url, params={"size": 5}, content=b"right and more").status_code == 400
    verify = f"{hub}/{repo}.git/info/lfs/verify"
    assert httpx2.post(verify, json={"oid": sha, "size": 5}).status_code == 404
    assert httpx2.put(url, params={"size": 5}, content=b"right").status_code == 200
    assert httpx2.post(verify, json={"oid": sha, "size": 5}).status_code == 200


def test_everything_survives_a_restart(tmp_path: Path, folder: Path) -> None:
    with running_hub(tmp_path / "hub") as url:
        api = HfApi(endpoint=url, token="hf_x")
        api.create_repo("acme/m", private=True)
        api.upload_folder(repo_id="acme/m", folder_path=folder)
        before = api.model_info("acme/m", files_metadata=True)
    with running_hub(tmp_path / "hub") as url:
        api = HfApi(endpoint=url, token="hf_x")
        after = api.model_info("acme/m", files_metadata=True)
        assert (after.sha, after.siblings, after.private) == (before.sha, before.siblings, True)
        got = api.hf_hub_download("acme/m", "model.safetensors", cache_dir=tmp_path / "c")
        assert Path(got).read_bytes() == WEIGHTS


def test_an_upload_cut_in_two_goes_on_where_it_stopped(tmp_path: Path, folder: Path) -> None:
    (folder / "second.safetensors").write_bytes(WEIGHTS[::-1])
    second = hashlib.sha256(WEIGHTS[::-1]).hexdigest()
    puts = f"/objects/{second}"
    faults = Faults([Fault("refuse", "PUT", puts, status=403)])
    with running_hub(tmp_path / "hub", faults=faults) as url:
        api = HfApi(endpoint=url, token="hf_x")
        api.create_repo("acme/m")
        with pytest.raises(RuntimeError, match=r"second\.safetensors"):
            api.upload_folder(repo_id="acme/m", folder_path=folder)
        assert api.list_repo_files("acme/m") == [".gitattributes"]
        api.upload_folder(repo_id="acme/m", folder_path=folder)
        sent = [path.rsplit("/", 1)[1] for method, path in faults.requests if method == "PUT"]
        assert sorted(sent) == sorted([second, second, hashlib.sha256(WEIGHTS).hexdigest()])
        assert len(api.list_repo_commits("acme/m")) == 2


def test_the_client_resumes_a_body_that_breaks_off(tmp_path: Path, folder: Path) -> None:
    faults = Faults([Fault("truncate", "GET", "resolve/.*/model.safetensors")])
    with running_hub(tmp_path / "hub", faults=faults) as url:
        api = HfApi(endpoint=url, token="hf_x")
        api.create_repo("acme/m")
        api.upload_folder(repo_id="acme/m", folder_path=folder)
        got = api.hf_hub_download("acme/m", "model.safetensors", cache_dir=tmp_path / "c")
        assert Path(got).read_bytes() == WEIGHTS


def test_large_files_pass_in_bounded_memory(tmp_path: Path) -> None:
    script = tmp_path / "serve.py"
    script.write_text(
        "import sys, resource\n"
        "from pathlib import Path\n"
        "from converter.staging import running_hub\n"
        "with running_hub(Path(sys.argv[1])) as url:\n"
        "    print(url, flush=True)\n"
        "    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    sys.stdin.readline()\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start, flush=True)\n"
    )
    big = tmp_path / "big.safetensors"
    with big.open("wb") as file:
        file.truncate(300 * 1024 * 1024)
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "hub")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        api = HfApi(endpoint=url, token="hf_x")
        api.create_repo("acme/m")
        api.upload_file(repo_id="acme/m", path_or_fileobj=big, path_in_repo="big.safetensors")
        api.hf_hub_download("acme/m", "big.safetensors", cache_dir=tmp_path / "c")
        server.stdin.write("\n")
        server.stdin.flush()
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        grown = int(server.stdout.readline()) * unit
    assert grown < 100 * 1024 * 1024


def test_pages_escape_what_people_write(hub: str, api: HfApi) -> None:
    nasty = (
        "---\nlicense: '<script>alert(1)</script>'\n---\n<script>alert(2)</script>\n"
        "[x](javascript:alert(3)) ![t](http://tracker/x.png) <img src=x onerror=alert(4)>\n"
    )
    api.create_repo("acme/m")
    api.upload_file(repo_id="acme/m", path_or_fileobj=nasty.encode(), path_in_repo="README.md")
    api.upload_file(
        repo_id="acme/m", path_or_fileobj=b"x", path_in_repo='"><script>.txt',
        commit_message="<script>alert(5)</script>",
    )  # fmt: skip
    for page in (hub, f"{hub}/acme/m", f"{hub}/acme/m/tree/main"):
        answer = httpx2.get(page)
        assert answer.status_code == 200
        assert "acme/m" in answer.text
        assert "<script" not in answer.text
        assert "<img" not in answer.text
        assert 'href="javascript' not in answer.text
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "unsafe" not in policy
    assert "&lt;script&gt;" in render_card(nasty)


def test_web_pages_cannot_reach_it(hub: str) -> None:
    rebound = httpx2.get(f"{hub}/api/models", headers={"Host": "evil.example"})
    assert rebound.status_code == 400
    forged = httpx2.post(
        f"{hub}/api/repos/create", json={"name": "x"}, headers={"Origin": "http://evil.example"}
    )
    assert forged.status_code == 403


def test_only_loopback_addresses_are_served(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(UsageError, match="not a loopback address"):
            serve(tmp_path / "hub", host=host, port=0)


def test_a_port_in_use_is_said_plainly(hub: str, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="cannot listen"):
        serve(tmp_path / "hub2", port=int(hub.rsplit(":", 1)[1]))


def test_front_matter() -> None:
    assert parse_front_matter(CARD)["base_model"] == "acme/base"
    assert parse_front_matter("no metadata") is None
    assert parse_front_matter("---\nd: 2024-01-02\nx: .nan\n---\n") == {
        "d": "2024-01-02",
        "x": "nan",
    }
    for bad in (
        "a: [",
        "- x",
        "a: &x [1]\nb: *x",
        "a: " + "[" * 100_000,
        "!!python/name:os.system",
    ):
        with pytest.raises(CardError):
            parse_front_matter(f"---\n{bad}\n---\n")


def test_a_broken_card_is_refused_before_the_upload(api: HfApi, folder: Path) -> None:
    api.create_repo("acme/m")
    (folder / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.upload_folder(repo_id="acme/m", folder_path=folder)


def test_an_xet_upload_is_told_what_to_do(
    api: HfApi,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    api.create_repo("acme/m")
    with pytest.raises(Exception, match="xet-write-token"):
        api.upload_folder(repo_id="acme/m", folder_path=folder)
    assert "HF_HUB_DISABLE_XET=1" in caplog.text


def test_the_web_framework_is_imported_only_to_serve() -> None:
    code = (
        "import sys, converter.staging, converter.hub\n"
        "print([m for m in ('fastapi', 'uvicorn', 'huggingface_hub') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert callable(create_app)
