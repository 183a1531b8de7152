"""Shared by the tests of the hub's client: a small model to publish, and what a repo then holds."""

from huggingface_hub import HfApi

CARD = (
    "---\nlicense: apache-2.0\nlibrary_name: mlx\npipeline_tag: text-generation\n"
    "tags: [mlx]\n---\n# A model\n"
)
WEIGHTS = bytes(range(256)) * 4096
REPO = "acme/model"
TOKEN = "hf_abcdefghijklmnop"
HF_WEIGHTS = r"resolve/.*/model\.safetensors"


def commits(endpoint: str) -> list[str]:
    return [c.title for c in HfApi(endpoint=endpoint, token=TOKEN).list_repo_commits(REPO)]


def files(endpoint: str) -> set[str]:
    return set(HfApi(endpoint=endpoint, token=TOKEN).list_repo_files(REPO)) - {".gitattributes"}
