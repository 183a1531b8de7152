"""``convert batch`` as people meet it: tables, the page, schedules, digests, logs."""

import http.server
import io
import json
import plistlib
import sys
import threading
import time
from pathlib import Path

import pytest
from batch_helpers import add, used, watch
from click.testing import CliRunner
from release_helpers import status as exit_status

from converter.batch.digest import send_digest
from converter.batch.failures import Failure
from converter.batch.install import schedule, write_files
from converter.batch.log import KEPT, logging_to
from converter.batch.report import trend
from converter.batch.site import Place
from converter.batch.status import print_table
from converter.batch.watchlist import Digest, Mail
from converter.cli.app import cli
from converter.errors import ConvertError, UsageError

TOKEN = "hf_sentinelsentinelsentinel"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def state(tmp_path, catalogue):
    """A state folder with jobs that have been through something."""
    mine = catalogue.ledger
    for repo in ("acme/good", "acme/bad", "acme/late"):
        add(catalogue, repo)
    parity = {"verdict": "pass", "error": 1.5e-6, "kl": 0.02, "failed": []}
    for _ in range(2):
        claim = mine.claim()
        (task,) = claim.tasks
        if claim.repo == "acme/good":
            address = {"address": "http://hub/night/good-bf16", "output_bytes": 2_000_000}
            facts = {"parity": parity, "bits_per_weight": 4.5, **address}
            mine.passed(claim, task.id, "publish", used(), facts=facts, published=True)
        else:
            text = "no map for <script>alert(1)</script>\nsecond line"
            mine.failed(claim, task.id, "examine", used(), Failure("unsupported", text))
        mine.give_back(claim)
    catalogue.began("run1", "watch.toml")
    catalogue.ended("run1", 3, {"published": [1], "failed": [1], "problems": ["x & y"]})
    return tmp_path / "state"


def command(*arguments):
    result = CliRunner().invoke(cli, ["batch", *map(str, arguments)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_status(state):
    rows = {row["repo"]: row for row in json.loads(command("status", "--json", "--state", state))}
    assert {repo: row["state"] for repo, row in rows.items()} == {
        "acme/good": "published",
        "acme/bad": "parked",
        "acme/late": "queued",
    }
    assert rows["acme/good"]["facts"]["parity"]["kl"] == 0.02
    assert rows["acme/bad"]["class"] == "unsupported"
    *table, count = command("status", "--state", state).splitlines()
    assert count == "3 jobs: 1 parked, 1 published, 1 queued"
    assert len(table) == 4, "a line for each, however long"
    (bad,) = [line for line in table if "night/bad-bf16" in line]
    assert bad.rstrip().endswith("unsupported: no map for <script>alert(1)</script>")


def test_status_on_a_terminal_tells_each_reason_once(tmp_path, catalogue, monkeypatch):
    add(catalogue, "acme/model", "bf16", "4bit")
    add(catalogue, "acme/next")
    claim = catalogue.ledger.claim()
    no = Failure("gated", f"acme/model is gated: ask for access{' again' * 12}")
    for task in claim.tasks:
        catalogue.ledger.failed(claim, task.id, "examine", used(), no)
    catalogue.ledger.give_back(claim)
    due = time.localtime(catalogue.entries()[0].job.not_before)
    again = time.strftime("; again at %Y-%m-%d %H:%M", due)
    lines = command("status", "--state", tmp_path / "state").splitlines()
    assert [line.rstrip().endswith(again) for line in lines] == [False, True, True, False, False]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    told = io.StringIO()
    monkeypatch.setattr(told, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", told)
    print_table(catalogue.entries())
    text = " ".join(told.getvalue().split())
    assert f"jobs 1, 2: gated: {no.text}{again} 3 jobs: 1 queued, 2 waiting" in text
    assert text.count("ask for") == 1
    assert max(map(len, told.getvalue().splitlines())) <= 80


def test_the_ledger_is_where_the_watch_list_says(tmp_path, catalogue):
    add(catalogue, "acme/model")
    top = f'state = "{tmp_path}/state"\nnamespace = "n"\n'
    watchlist = tmp_path / "watch.toml"
    watchlist.write_text(f'{top}[[watch]]\nmodels = ["a/b"]\nvariants = ["4bit"]\n')
    assert command("status", "--watchlist", watchlist).splitlines()[-1] == "1 job: 1 queued"
    assert command("park", "1", "--watchlist", watchlist) == "parked: 1 night/model-bf16\n"
    assert command("retry", "1", "--watchlist", watchlist) == "due: 1 night/model-bf16\n"
    assert command("forget", "1", "--watchlist", watchlist) == "forgotten: 1 night/model-bf16\n"


def test_report_is_one_page_that_runs_nothing(state, tmp_path):
    assert command("report", tmp_path / "out" / "night.html", "--state", state)
    page = (tmp_path / "out" / "night.html").read_text()
    assert "<script" not in page
    assert "no map for &lt;script&gt;" in page
    assert 'href="http://hub/night/good-bf16"' in page
    assert "2.0 MB" in page
    assert "x &amp; y" in page
    assert "<circle" in page
    assert page.count("src=") == 0
    # On a narrow screen a job's state is what is seen beside its name; the rest can be reached.
    assert "<tr><th>target</th><th>state</th>" in page
    assert page.count('class="scroll"') == page.count('class="scroll" tabindex="0"') == 4
    assert "unsupported" in page


def test_the_trend_is_in_order_and_within_its_frame():
    rows = [
        {"target": "b", "updated": "2", "facts": {"parity": {"error": 1e-4, "verdict": "pass"}}},
        {"target": "a", "updated": "1", "facts": {"parity": {"error": 0.0, "verdict": "fail"}}},
        {"target": "c", "updated": "3", "facts": {"parity": {"error": 9.0, "verdict": "pass"}}},
        {"target": "d", "updated": "4", "facts": {}},
    ]
    points = trend(rows)
    assert [point["name"][0] for point in points] == ["a", "b", "c"]
    assert [point["y"] for point in points] == [180.0, 36.0, 0.0]
    assert [point["good"] for point in points] == [False, True, True]


def test_retry_park_and_forget(state, catalogue):
    assert "due: 2 night/bad-bf16" in command("retry", "acme/bad", "--state", state)
    assert "parked: 3" in command("park", "*late*", "--reason", "too large", "--state", state)
    by_repo = {e.release.repo: e.job for e in catalogue.entries()}
    assert by_repo["acme/bad"].state == "queued"
    assert (by_repo["acme/late"].error_class, by_repo["acme/late"].error) == ("held", "too large")
    with pytest.raises(UsageError, match="night/good-bf16 is published, which this does not chan"):
        command("retry", "acme/good", "--state", state)
    with pytest.raises(UsageError, match=r"acme/other \*gone\*: no such job$"):
        command("park", "acme/other", "*gone*", "--state", state)
    command("forget", "acme/*", "--state", state)
    assert catalogue.entries() == []
    add(catalogue, "acme/busy")
    catalogue.ledger.claim()
    with pytest.raises(UsageError, match="is being worked on"):
        command("park", "acme/busy", "--state", state)


def test_retry_says_what_stays_parked(tmp_path, catalogue):
    add(catalogue, "acme/model")
    add(catalogue, "other/model")
    catalogue.park(catalogue.entries(), "not now")
    result = CliRunner().invoke(cli, ["batch", "retry", "*", "--state", str(tmp_path / "state")])
    assert result.output == "due: 1 night/model-bf16\n"
    assert isinstance(result.exception, UsageError)
    assert str(result.exception).startswith(
        "job 2 stays parked: night/model-bf16 is made from acme/model already; give names with"
    )


def test_a_state_folder_without_a_ledger_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"nothing/ledger\.db: there is no such ledger"):
        command("status", "--state", tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"other\.db: there is no such ledger"):
        command("status", "--ledger", f"sqlite:///{tmp_path / 'other.db'}")
    assert not (tmp_path / "nothing").exists()


def test_where_the_ledger_is(tmp_path, monkeypatch):
    watchlist = watch(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    place = Place.of(watchlist, state=None, ledger=None)
    assert place.state == tmp_path / "xdg" / "mlx-dayzero"
    assert place.url == f"sqlite:///{place.state}/ledger.db"
    monkeypatch.setenv("CONVERT_LEDGER", "postgresql://x@h/d")
    assert Place.of(watchlist, state=None, ledger=None).url == "postgresql+psycopg://x@h/d"
    assert Place.of(watchlist, state=tmp_path, ledger="sqlite:///o").url == "sqlite:///o"


def test_a_state_folder_that_cannot_be_is_told_with_its_flag(tmp_path):
    (tmp_path / "file").touch()
    watchlist = tmp_path / "watch.toml"
    watchlist.write_text('namespace = "n"\n[[watch]]\nmodels = ["a/b"]\nvariants = ["4bit"]\n')
    for arguments in (["status"], ["run", watchlist], ["install", watchlist]):
        with pytest.raises(UsageError, match=r"^--state ~nosuchuser/x: this machine has no such u"):
            command(*arguments, "--state", "~nosuchuser/x")
    with pytest.raises(
        ConvertError, match=r"file: a part of this path is a file.* another --state"
    ):
        command("run", watchlist, "--state", tmp_path / "file")
    with watchlist.open("a") as file:
        file.write(f'[fleet]\nshared = "{tmp_path}/file"\n')
    with pytest.raises(
        ConvertError, match=r"a part of this path is a file.* another fleet\.shared"
    ):
        command("run", watchlist, "--state", tmp_path / "state")


def test_exit_statuses_reach_the_shell():
    assert exit_status("batch", "run", "no-such.toml") == 2
    assert exit_status() == 2


def test_schedules(tmp_path, monkeypatch):
    odd = tmp_path / "a 100% $name.toml"
    odd.write_text('namespace = "n"\n[[watch]]\nmodels = ["a/b"]\nvariants = ["4bit"]\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    systemd = schedule(odd, state=tmp_path / "state", at="23:05", kind="systemd")
    service, timer = systemd.files.values()
    assert f'"{tmp_path}/a 100%% $$name.toml" --quiet --state {tmp_path}/state' in service
    assert "OnCalendar=*-*-* 23:05:00" in timer
    assert "enable --now mlx-dayzero-nightly.timer" in systemd.then
    written = write_files(systemd)
    assert [path.read_text() for path in written] == [service, timer]
    launchd = schedule(odd, state=None, at="02:30", kind="launchd")
    (text,) = launchd.files.values()
    plist = plistlib.loads(text.encode())
    assert plist["StartCalendarInterval"] == {"Hour": 2, "Minute": 30}
    assert plist["ProgramArguments"][-2:] == [str(odd), "--quiet"]
    cron = schedule(odd, state=None, at="02:30", kind="cron")
    (line,) = cron.files.values()
    assert line.startswith("30 2 * * * ")
    assert line.count("\\%") == 1
    with pytest.raises(UsageError, match="crontab -e"):
        write_files(cron)
    with pytest.raises(UsageError, match="--at 25:00"):
        schedule(odd, state=None, at="25:00", kind="cron")
    printed = command("install", odd, "--kind", "systemd")
    assert "OnCalendar=*-*-* 02:30:00" in printed
    with pytest.raises(UsageError, match="does not belong into a unit file"):
        command("install", odd, "--ledger", "postgresql://u:p@h/d")


@pytest.fixture
def webhook():
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if "fail" in self.path else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    thread.join()
    server.server_close()


SUMMARY = {
    "watchlist": "watch.toml",
    "status": 4,
    "published": [{"address": "http://hub/night/a", "target": "night/a"}],
    "failed": [
        {"target": "night/b", "state": "parked", "class": "gate", "reason": f"KL {TOKEN}\nmore"}
    ],
    "problems": ["acme: down"],
}


def test_digest_by_webhook(webhook):
    url, got = webhook
    lines = []
    send_digest(Digest(webhook=f"{url}/hook"), SUMMARY, say=lines.append)
    assert lines == []
    assert got[0]["text"].splitlines() == [
        "watch.toml: 1 published, 1 failed, status 4",
        "published http://hub/night/a",
        "parked night/b (gate): KL hf_***",
        "not looked at: acme: down",
    ]
    assert got[0]["published"] == SUMMARY["published"]
    assert TOKEN not in json.dumps(got)
    send_digest(Digest(webhook=f"{url}/fail?secret=1"), SUMMARY, say=lines.append)
    assert lines == ["digest: 127.0.0.1 did not take it: HTTPError"]


def test_digest_by_mail(monkeypatch):
    sent = []

    class Server:
        def __init__(self, host, port, timeout):
            sent.append((host, port))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def starttls(self, context):
            sent.append("tls")

        def login(self, user, password):
            sent.append((user, password))

        def send_message(self, message):
            sent.append(message)

    monkeypatch.setattr("smtplib.SMTP", Server)
    mail = Mail(host="smtp", sender="a@b", to=("c@d", "e@f"), user="u", password="p")
    send_digest(Digest(mail=mail), SUMMARY, say=pytest.fail)
    assert sent[:3] == [("smtp", 587), "tls", ("u", "p")]
    assert sent[3]["To"] == "c@d, e@f"
    assert sent[3]["Subject"] == "watch.toml: 1 published, 1 failed, status 4"
    assert "not looked at" in sent[3].get_content()

    def refuse(*arguments, **named):
        raise OSError("no route")

    lines = []
    monkeypatch.setattr("smtplib.SMTP", refuse)
    send_digest(Digest(mail=mail), SUMMARY, say=lines.append)
    assert lines == ["digest: smtp did not take the mail: OSError"]


def test_logs_hold_no_secret_and_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-no-known-form")
    for number in range(KEPT + 5):
        (tmp_path / f"run-2020{number:04}.log").touch()
    echoed = []
    with logging_to(tmp_path, "abcdef123456", echo=echoed.append) as say:
        say(f"{TOKEN} and a-token-of-no-known-form")
        say("Authorization: Bearer abcdefghijkl")
        say("postgresql://night:s3cret@db/night")
        say("https://cdn/x?X-Amz-Signature=0123456789abcdef&y=1")
    logs = sorted(Path(tmp_path).iterdir())
    assert len(logs) == KEPT + 1
    text = logs[-1].read_text()
    for secret in ("sentinel", "no-known-form", "abcdefghijkl", "s3cret", "0123456789abcdef"):
        assert secret not in text
        assert secret not in "".join(echoed)
    assert text.splitlines()[0].startswith("20")
    assert " INFO " in text
