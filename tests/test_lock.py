"""One process at a time on one conversion."""

import threading

import pytest
from release_helpers import hashes, make, write_release

from converter.errors import UsageError
from converter.execute.folder import locked, publish, work_folder
from converter.pipeline import Request, plan_request


@pytest.fixture
def release(tmp_path):
    return write_release(tmp_path / "in" / "release")


class TestLock:
    def test_second_process_is_turned_away(self, release, tmp_path):
        plan = plan_request(Request(hf_path=str(release))).plans[0]
        out = tmp_path / "out"
        with (
            locked(work_folder(out, plan.hash)),
            pytest.raises(UsageError, match="another process"),
        ):
            make(release, out)
        make(release, out)

    def test_lock_file_of_a_dead_process_is_no_lock(self, release, tmp_path):
        plan = plan_request(Request(hf_path=str(release))).plans[0]
        work = work_folder(tmp_path / "out", plan.hash)
        work.mkdir()
        (work / "lock").write_text("4711")
        work.with_suffix(".lock").write_text("4711")
        [out] = make(release, tmp_path / "out")
        assert hashes(out).keys() >= {"conversion.json"}

    def test_lock_holds_until_the_work_is_published(self, tmp_path):
        work, out = tmp_path / ".out.0.partial", tmp_path / "out"
        with locked(work):
            (work / "file").write_text("whole")
            publish(work, out)
            with pytest.raises(UsageError, match="another process"), locked(work):
                pass
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]

    def test_lock_on_a_file_that_is_gone_is_no_lock(self, tmp_path, monkeypatch):
        """The last holder removes the file between our opening and locking it."""
        import fcntl

        work = tmp_path / "w.partial"
        flock, calls = fcntl.flock, []

        def late(descriptor, operation):
            calls.append(descriptor)
            if len(calls) == 1:
                (tmp_path / "w.lock").unlink()
                (tmp_path / "w.lock").touch()
            flock(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", late)
        with locked(work), pytest.raises(UsageError, match="another process"), locked(work):
            pass
        assert len(calls) == 3

    def test_one_holder_at_a_time_among_many(self, tmp_path):
        work = tmp_path / "w.partial"
        inside, most, entered = [0], [0], [0]
        guard = threading.Lock()

        def enter():
            for _ in range(200):
                try:
                    with locked(work):
                        with guard:
                            inside[0] += 1
                            entered[0] += 1
                            most[0] = max(most[0], inside[0])
                        with guard:
                            inside[0] -= 1
                except UsageError:
                    continue

        threads = [threading.Thread(target=enter) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert entered[0] > 4
        assert most[0] == 1
