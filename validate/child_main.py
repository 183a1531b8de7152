"""Runs in a child process of its own: one of our scripts on what a stranger wrote, within limits.

Started by its path and isolated from the caller's environment, so only the standard library is
imported here. The order comes as JSON on stdin; what the script's ``answer`` gives for the request
is written to a file.
"""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> None:
    """Do what stdin orders."""
    order = json.load(sys.stdin)
    limit(order["memory"], order["seconds"], order["file_bytes"])
    spec = spec_from_file_location("script", order["script"])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["script"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    text = json.dumps(module.answer(order["request"]))
    partial = Path(f"{order['answer']}.part")
    partial.write_text(text)
    partial.rename(order["answer"])


def limit(memory: int, seconds: int, file_bytes: int | None) -> None:
    """Bound address space, processor time, files and core dumps where the platform can."""
    try:
        import resource
    except ImportError:
        return
    for what, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        if value is None:
            continue
        try:
            hard = resource.getrlimit(what)[1]
            bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(what, (bound, hard))
        except (ValueError, OSError):
            continue  # macOS refuses some of them; the parent's time limit still holds


if __name__ == "__main__":
    main()
