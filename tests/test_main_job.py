"""The main job as a user runs it: a release on a hub, one command, a proven repo that runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from converter.staging import running_hub
from validate.twin import load_example, make_twin

CONVERT = [sys.executable, "-m", "converter"]
RELEASE = "openbmb/MiniCPM-V-4_6"
RESULT = "local/MiniCPM-V-4_6-4bit"


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """A staging hub that holds the twin of MiniCPM-V 4.6 under its real name."""
    from huggingface_hub import HfApi

    make_twin(load_example("minicpmv4_6"), tmp_path / "twin", dtype="bfloat16")
    card = "---\nlicense: apache-2.0\npipeline_tag: image-text-to-text\n---\n# MiniCPM-V 4.6\n"
    (tmp_path / "twin" / "README.md").write_text(card)
    with running_hub(tmp_path / "hub") as endpoint:
        api = HfApi(endpoint=endpoint, token="hf_staging")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        api.create_repo(RELEASE)
        api.upload_folder(repo_id=RELEASE, folder_path=tmp_path / "twin")
        yield endpoint, api


def _run(arguments, *, cwd, endpoint, **extra):
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cwd / "hf"),
        "HF_TOKEN": "hf_staging",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
        **extra,
    }
    return subprocess.run(
        arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def test_release_becomes_a_proven_repo_that_stock_mlx_vlm_runs(staged, tmp_path):
    endpoint, api = staged
    work = tmp_path / "work"
    work.mkdir()
    command = [*CONVERT, "--hf-path", RELEASE, "-q", "--q-bits", "4", "--upload-repo"]
    done = _run(command, cwd=work, endpoint=endpoint)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert f"published: {endpoint}/{RESULT}" in done.stdout
    assert "parity: pass" in done.stdout

    info = api.model_info(RESULT)
    remote = {sibling.rfilename for sibling in info.siblings}
    needed = {"README.md", "config.json", "conversion.json", "parity.json", "parity.html"}
    needed |= {"model.safetensors", "model.safetensors.index.json", "chat_template.jinja"}
    pictures = {"parity-layers.png", "parity-kl.png"}
    needed |= pictures | {name.replace("png", "svg") for name in pictures}
    assert needed <= remote
    assert info.card_data.license == "apache-2.0"
    assert info.card_data.base_model == RELEASE
    assert info.card_data.library_name == "mlx"

    local = work / "MiniCPM-V-4_6-4bit"
    card = (local / "README.md").read_text()
    assert all(f"]({name})" in card for name in pictures)
    manifest = json.loads((local / "conversion.json").read_text())
    report = json.loads((local / "parity.json").read_text())
    assert report["plan"] == manifest["plan"]
    assert manifest["source"]["commit"] == api.model_info(RELEASE).sha

    picture = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(picture).ellipse((20, 10, 70, 54), fill="red")
    picture.save(work / "picture.png")
    generate = [sys.executable, "-m", "mlx_vlm.generate", "--model", RESULT, "--max-tokens", "6"]
    generate += ["--image", "picture.png", "--prompt", "What is this?", "--temperature", "0"]
    said = _run(generate, cwd=work, endpoint=endpoint)
    assert said.returncode == 0, said.stderr[-3000:]
    assert said.stdout.strip()

    again = _run(command, cwd=work, endpoint=endpoint)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr

    # What the report vouches for can no longer be published once a file has changed.
    (local / "generation_config.json").write_text("{}")
    published = _run(
        [*CONVERT, "upload", str(local), "--upload-repo", "local/other"],
        cwd=work,
        endpoint=endpoint,
    )
    assert published.returncode != 0
    assert not api.repo_exists("local/other")
    refused = _run([*CONVERT, "verify", str(local)], cwd=work, endpoint=endpoint)
    assert refused.returncode == 1
    assert "generation_config.json" in refused.stderr


def test_failing_report_is_exit_4_and_not_published(staged, tmp_path):
    endpoint, api = staged
    command = [*CONVERT, "--hf-path", RELEASE, "-q", "--q-bits", "2", "--kl-threshold", "1e-9"]
    done = _run([*command, "--upload-repo", "local/bad"], cwd=tmp_path, endpoint=endpoint)
    assert done.returncode == 4, done.stderr[-2000:]
    assert "not published" in done.stderr
    assert not api.repo_exists("local/bad")
    assert json.loads((tmp_path / "MiniCPM-V-4_6-2bit" / "parity.json").read_text())["verdict"] == (
        "fail"
    )


def test_plan_from_the_hub_reads_headers_only(staged, tmp_path):
    endpoint, _ = staged
    done = _run([*CONVERT, "plan", "--hf-path", RELEASE, "-q"], cwd=tmp_path, endpoint=endpoint)
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
