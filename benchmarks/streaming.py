"""What ``--stream`` takes of a disk and a hub: ``python -m benchmarks.streaming [GB [THREADS]]``.

Makes a release, stages it on loopback, converts it from its folder and by ranges, and samples what
lies in the streaming process's own folders (cache, work, output, temporary files) all the while.
Requests for weights are counted: as many as the files have windows, and one for each header.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import process
from benchmarks.checkpoint import Shape, make_release

ROOT = Path(__file__).parents[1]
REPO = "acme/model"
ALLOWED = 1 << 30
"""Bytes beside the output."""
_PERIOD_S = 0.05


def main() -> int:
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.5
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    place = Path(tempfile.mkdtemp(prefix="streaming-", dir=os.environ.get("BENCH_DIR", ROOT)))
    try:
        return _measure(place, gigabytes * 1e9, threads)
    finally:
        shutil.rmtree(place)


def _measure(place: Path, size: float, threads: int) -> int:
    from huggingface_hub import HfApi, constants

    from converter.hub.stream import WINDOW
    from converter.staging import Faults, running_hub

    constants.HF_HUB_DISABLE_XET = True
    shape = Shape.of_bytes(size)
    source = place / "release"
    total = make_release(source, shape.config(), list(shape.tensors()))
    convert = [sys.executable, "-m", "converter", "-q", "--no-validate", "--quiet"]
    convert += ["--workers", str(threads)]
    local = place / "local"
    away = {"PYTHONPATH": str(ROOT)}
    log = place / "log"
    first = process.run(
        [*convert, "--hf-path", source, "--mlx-path", local / "out"],
        log=log, timeout=900, environment=away,
    )  # fmt: skip
    hub = Faults()  # none, but it counts
    with running_hub(place / "hub", faults=hub) as url:
        api = HfApi(endpoint=url, token="hf_staging")
        api.create_repo(REPO)
        api.upload_folder(repo_id=REPO, folder_path=source)
        own = place / "own"
        (own / "tmp").mkdir(parents=True)
        environment = away | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(own / "hf"),
            "TMPDIR": str(own / "tmp"),
            "HF_TOKEN": "hf_staging",
        }
        with _Sampled(own) as sampled:
            second = process.run(
                [*convert, "--stream", "--hf-path", REPO, "--mlx-path", own / "out"],
                log=log, timeout=900, environment=environment,
            )  # fmt: skip
    output = _used(own / "out")
    result = {
        "threads": threads,
        "source_bytes": total,
        "windows": sum(-(-f.stat().st_size // WINDOW) + 1 for f in source.glob("*.safetensors")),
        "requests": sum(m == "GET" and p.endswith(".safetensors") for m, p in hub.requests),
        "output_bytes": output,
        "most_bytes_on_disk": sampled.most,
        "beside_the_output": sampled.most - output,
        "same_bytes_as_from_a_folder": _hashes(own / "out") == _hashes(local / "out"),
        "peak_memory_bytes": second.peak_bytes,
        "peak_memory_from_a_folder_bytes": first.peak_bytes,
        "seconds": round(second.seconds, 1),
        "seconds_from_a_folder": round(first.seconds, 1),
    }
    print(json.dumps(result, indent=1))
    met = result["same_bytes_as_from_a_folder"] and sampled.most <= output + ALLOWED
    return 0 if met else 1


class _Sampled:
    """The most that a folder held at any time."""

    def __init__(self, root: Path) -> None:
        self.most = 0
        self._root = root
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self) -> _Sampled:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._done.is_set():
            self.most = max(self.most, _used(self._root))
            time.sleep(_PERIOD_S)


def _used(root: Path) -> int:
    """Bytes that files below ``root`` take of the disk."""
    used = 0
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                used += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # it went meanwhile
    return used


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file but the manifest, which names the source."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "conversion.json":
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


if __name__ == "__main__":
    sys.exit(main())
