"""How much memory a process may take: what the machine has left, within its container's limit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from converter.errors import UsageError

_CGROUP = Path("/sys/fs/cgroup")


def size_of(text: str, flag: str) -> int:
    """A size such as 4.2GB or 900MiB in bytes; UsageError names the ``flag``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*", text)
    if match is None:
        raise UsageError(f"{flag} {text}: give a size such as 4.2GB or 900MiB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def available_memory() -> int:
    """Bytes that this process can take without anything being paged out, as the system tells it.

    Linux: MemAvailable, and what control groups (v2) leave. macOS: pages that are free, purgeable,
    or have a file behind them. Elsewhere half of all memory.
    """
    if sys.platform.startswith("linux"):
        return min(_linux())
    if sys.platform == "darwin":
        found = subprocess.run(["vm_stat"], capture_output=True, text=True, check=False).stdout
        if pages := _vm_stat(found):
            return pages
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def installed_memory() -> int:
    """Bytes of memory of this machine, or of the container (control groups v2) that this is in."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not sys.platform.startswith("linux"):
        return whole
    return min([whole, *(most for _, most in _groups(_CGROUP, _membership()))])


def _linux() -> Iterator[int]:
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    yield int(re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024  # type: ignore[index]
    yield from group_room(_CGROUP, _membership())


def _membership() -> str:
    try:
        return Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:  # as in a hardened container: what limits there are is not known
        return ""


def group_room(root: Path, membership: str) -> Iterator[int]:
    """Bytes that each control group (v2) of a process leaves, by ``/proc/self/cgroup``.

    What the kernel can drop from a group's page cache counts as left.
    """
    for group, most in _groups(root, membership):
        used = group / "memory.current"
        if used.is_file():
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
            yield max(0, most - int(used.read_text()) + cached)


def _groups(root: Path, membership: str) -> Iterator[tuple[Path, int]]:
    """The control groups of a process that have a limit, and its bytes."""
    own = next((ln[3:] for ln in membership.splitlines() if ln.startswith("0::")), None)
    if own is None:
        return
    folder = root / own.lstrip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root):
            return
        limit = group / "memory.max"
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            yield group, int(most)


def _vm_stat(text: str) -> int:
    size = re.search(r"page size of (\d+) bytes", text)
    # Inactive pages would have to be compressed or swapped where no file is behind them.
    kinds = ("Pages free", "Pages purgeable", "File-backed pages")
    counts = (re.search(rf"^{kind}:\s+(\d+)\.", text, re.MULTILINE) for kind in kinds)
    return int(size[1]) * sum(int(found[1]) for found in counts if found) if size else 0
