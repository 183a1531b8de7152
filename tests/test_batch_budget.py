"""What a run may take of a machine: disk, memory, bandwidth."""

import os
from pathlib import Path

import pytest

from converter import memory as memory_module
from converter.batch import budget as budget_module
from converter.batch.budget import Budget
from converter.batch.work import Throttle


def test_budget():
    budget = Budget("disk", lambda: 100)
    assert budget.reserve("a", 60)
    assert not budget.reserve("b", 50)
    assert budget.refusal(500) is None  # others may leave
    assert budget.reserve("a", 90)
    budget.free("a")
    assert budget.refusal(500) == "needs 500 B of disk and may use 100 B"
    assert budget.reserve("b", 100)


def test_memory_is_that_of_the_container(tmp_path, monkeypatch):
    whole = memory_module.installed_memory()
    assert budget_module.memory(None).limit == whole * 4 // 5
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "memory.max").write_text("1000\n")
    monkeypatch.setattr(memory_module, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory_module, "_membership", lambda: "0::/job\n")
    assert budget_module.memory(None).limit == 800
    assert budget_module.memory(5).limit == 5


def test_memory_is_that_of_the_machine_where_the_container_does_not_tell(monkeypatch):
    read_text = Path.read_text

    def denied(path, **given):
        if str(path) == "/proc/self/cgroup":
            raise PermissionError(path)
        return read_text(path, **given)

    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(Path, "read_text", denied)
    assert memory_module.installed_memory() == whole
    assert memory_module.available_memory() > 0


def test_throttle_holds_a_download_to_its_rate():
    now, slept = [0.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    throttle = Throttle(100.0, clock=lambda: now[0], sleep=sleep)
    for done in range(0, 1001, 50):
        throttle(done, 1000)
    assert now[0] == pytest.approx(10.0)
    assert throttle.done == 1000
    free = Throttle(None, clock=lambda: now[0], sleep=sleep)
    count = len(slept)
    free(10**9, 10**9)
    assert len(slept) == count
