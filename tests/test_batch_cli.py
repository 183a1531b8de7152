"""``convert batch`` as people meet it: discovery, tables, the page, schedules, digests, logs."""

import http.server
import json
import plistlib
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from batch_helpers import add, close_ledgers, ledger, used
from click.testing import CliRunner
from huggingface_hub import HfApi
from release_helpers import status as exit_status
from release_helpers import write_release

from converter.batch import discover as discover_module
from converter.batch.believed import believed
from converter.batch.catalogue import Catalogue
from converter.batch.digest import send_digest
from converter.batch.discover import content_of, discover, wanted
from converter.batch.examine import examine
from converter.batch.failures import Failure
from converter.batch.install import schedule, write_files
from converter.batch.log import KEPT, logging_to
from converter.batch.orders import Order, Part
from converter.batch.recipes import Policy
from converter.batch.report import trend
from converter.batch.run import Place
from converter.batch.watchlist import Digest, Filters, Mail, read_watchlist
from converter.batch.work import convert_release, fetch_release
from converter.cli.app import cli
from converter.errors import HubError, PlanError, UsageError
from converter.hub import api as hub_api
from converter.hub import resolve_revision
from converter.plan import Options
from converter.staging import Fault, Faults, StagingOptions, Weather, running_hub

TOKEN = "hf_sentinelsentinelsentinel"
CARD = "---\nlicense: {licence}\npipeline_tag: {task}\n---\n# x\n"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def _closed():
    yield
    close_ledgers()


@pytest.fixture
def faults():
    return Faults()


@pytest.fixture
def api(tmp_path, faults, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_api, "FIRST_WAIT_S", 0.01)
    options = StagingOptions(page_size=2)
    with running_hub(tmp_path / "hub", options=options, faults=faults) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        yield HfApi(endpoint=endpoint, token=TOKEN)


def release(api, repo, *, licence="apache-2.0", task="text-generation", weights=b"x" * 100):
    from huggingface_hub import CommitOperationAdd

    files = {
        "README.md": CARD.format(licence=licence, task=task).encode(),
        "config.json": b"{}",
        "model.safetensors": weights,
    }
    api.create_repo(repo, exist_ok=True)
    adds = [CommitOperationAdd(name, data) for name, data in files.items()]
    return api.create_commit(repo, adds, commit_message="release").oid


def watch(tmp_path, text="", models='organisations = ["acme"]'):
    path = tmp_path / "watch.toml"
    path.write_text(f'namespace = "night"\n[[watch]]\n{models}\nvariants = ["4bit"]\n{text}')
    return read_watchlist(path)


@pytest.fixture
def catalogue(tmp_path):
    return Catalogue(ledger(f"sqlite:///{tmp_path / 'state' / 'ledger.db'}"))


def found_in(catalogue):
    return {entry.release.repo for entry in catalogue.entries()}


def look(watchlist, catalogue, now=None):
    return discover(watchlist, catalogue, say=lambda line: None, now=now or time.time())


def test_discovery_pages_down_to_its_watermark(api, catalogue, tmp_path, faults, monkeypatch):
    monkeypatch.setattr(discover_module, "OVERLAP_S", 0.0)
    for number in range(5):
        release(api, f"acme/m{number}")
    release(api, "other/model")
    first = look(watch(tmp_path), catalogue)
    assert (first.seen, first.matched, first.added, first.problems) == (5, 5, 5, [])
    assert found_in(catalogue) == {f"acme/m{number}" for number in range(5)}
    commit = release(api, "acme/m1", weights=b"y" * 100)
    release(api, "acme/new")
    asked = len(faults.requests)
    second = look(watch(tmp_path), catalogue)
    assert (second.seen, second.added) == (2, 2)
    listings = [path for _, path in faults.requests[asked:] if path == "/api/models"]
    assert len(listings) <= 2  # of three items, on pages of two
    newest = {e.release.repo: e.release.commit for e in reversed(catalogue.entries())}
    assert newest["acme/m1"] == commit
    assert look(watch(tmp_path), catalogue).seen == 0
    # Another recipe is another question: everything is looked at again, what is known stays.
    more = watch(tmp_path, "[watch.filters]\nmin_size = 50\n")
    third = look(more, catalogue)
    assert (third.seen, third.added) == (6, 0)


def test_filters_are_honoured(api, catalogue, tmp_path):
    release(api, "acme/good")
    release(api, "acme/closed", licence="other")
    release(api, "acme/speech", task="text-to-speech")
    release(api, "acme/large", weights=b"x" * 2000)
    release(api, "acme/good-AWQ")
    text = (
        '[watch.filters]\nlicences = ["apache-2.0"]\npipeline_tags = ["text-generation"]\n'
        'exclude = ["*-AWQ"]\nmax_size = "1kB"\n'
    )
    look(watch(tmp_path, text), catalogue)
    assert found_in(catalogue) == {"acme/good"}


def info(**settings):
    facts = {"id": "acme/m", "tags": ["license:mit"], "downloads": 5, "disabled": False}
    facts |= {"pipeline_tag": "text-generation", "library_name": "transformers"}
    facts |= {"created_at": datetime.fromtimestamp(1000, UTC), "last_modified": None}
    return SimpleNamespace(**{**facts, **settings})


@pytest.mark.parametrize(
    ("filters", "settings", "passes"),
    [
        ({}, {}, True),
        ({}, {"library_name": "mlx"}, False),
        ({}, {"tags": ["mlx"]}, False),
        ({}, {"disabled": True}, False),
        ({"max_age": 50.0}, {}, False),
        ({"max_age": 150.0}, {}, True),
        ({"min_downloads": 6}, {}, False),
        ({"min_downloads": 5}, {}, True),
        ({"include": ("x*",)}, {}, False),
        ({"include": ("m",)}, {}, True),
        ({"licences": ("apache-2.0",)}, {}, False),
        ({"licences": ("mit",)}, {}, True),
        ({"licences": ("mit",)}, {"tags": []}, False),
        ({"pipeline_tags": ("image-text-to-text",)}, {}, False),
    ],
)
def test_each_filter(filters, settings, passes):
    assert wanted(info(**settings), Filters(**filters), now=1100.0) is passes


def test_what_cannot_be_looked_at_is_looked_at_again(api, catalogue, tmp_path, faults):
    release(api, "acme/one")
    release(api, "acme/two")
    for _ in range(4):
        faults.add(Fault("refuse", "GET", "/api/models/acme/one/", status=503))
    found = look(watch(tmp_path), catalogue)
    assert found.failed
    assert len(found.problems) == 1
    assert found.problems[0].startswith("acme/one: Looking up acme/one at ")
    assert found_in(catalogue) == {"acme/two"}
    assert look(watch(tmp_path), catalogue).problems == []
    assert found_in(catalogue) == {"acme/one", "acme/two"}


def test_single_models_follow_their_branch_and_may_be_missing(api, catalogue, tmp_path):
    release(api, "acme/one")
    first = api.model_info("acme/one").sha
    api.create_branch("acme/one", branch="stable")
    release(api, "acme/one", weights=b"new")
    models = 'models = ["acme/one@stable", "acme/none"]'
    found = look(watch(tmp_path, models=models), catalogue)
    assert [entry.release.commit for entry in catalogue.entries()] == [first]
    assert found.problems[0].startswith("models: acme/none: Looking up acme/none: there is no repo")
    assert not found.failed  # waiting would not help


def test_a_branch_that_moves_is_another_job(api, catalogue, tmp_path, faults):
    release(api, "acme/one")
    before = api.model_info("acme/one").sha
    faults.add(Fault("move_branch", "GET", "/api/models/acme/one/revision/"))
    look(watch(tmp_path), catalogue)
    assert [entry.release.commit for entry in catalogue.entries()] == [before]
    assert api.model_info("acme/one").sha != before
    look(watch(tmp_path), catalogue)
    assert [e.release.commit for e in catalogue.entries()] == [api.model_info("acme/one").sha]


def test_weather_is_the_same_for_the_same_seed_and_hits_its_rate():
    bad = Weather(0.1, seed=3)
    asked = [("GET", f"/acme/m/resolve/main/f{number}", 0) for number in range(2000)]
    struck = [bad.strike(*one) for one in asked]
    assert struck == [Weather(0.1, seed=3).strike(*one) for one in asked]
    assert struck != [Weather(0.1, seed=4).strike(*one) for one in asked]
    hit = [fault for fault in struck if fault is not None]
    assert 150 < len(hit) < 250
    assert {fault.kind for fault in hit} == {"refuse", "corrupt", "truncate", "ignore_range"}
    assert {fault.status for fault in hit if fault.kind == "refuse"} == {429, 500, 502, 503, 504}
    assert any(bad.strike("GET", "/x/resolve/", before) is None for before in range(50))


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
    table = command("status", "--state", state)
    assert "night/good-bf16" in table
    assert "3 jobs" in table


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
    with pytest.raises(UsageError, match="no such job in a state that this changes"):
        command("retry", "acme/good", "--state", state)
    command("forget", "acme/*", "--state", state)
    assert catalogue.entries() == []
    add(catalogue, "acme/busy")
    catalogue.ledger.claim()
    with pytest.raises(UsageError, match="is being worked on"):
        command("park", "acme/busy", "--state", state)


def test_a_state_folder_without_a_ledger_is_said(tmp_path):
    with pytest.raises(UsageError, match="holds no ledger"):
        command("status", "--state", tmp_path / "nothing")
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


def test_content_is_everything_but_the_card(api):
    first = content_of(resolve_revision("acme/m", revision=release(api, "acme/m")))
    card = content_of(resolve_revision("acme/m", revision=release(api, "acme/m", licence="mit")))
    weights = release(api, "acme/m", weights=b"y" * 100)
    assert card == first
    assert content_of(resolve_revision("acme/m", revision=weights)) != first


def test_a_damaged_header_is_read_again_in_every_stage(api, faults, tmp_path, monkeypatch):
    place = api.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", place)
    api.create_repo("acme/small")
    api.upload_folder(repo_id="acme/small", folder_path=write_release(tmp_path / "source"))
    part = Part(
        job=1, variant="bf16", target="n/small", options=Options(), policy=Policy(twin=False)
    )
    order = Order(
        repo="acme/small",
        commit=api.model_info("acme/small").sha,
        folder=tmp_path / "work",
        parts=(part,),
        workers=1,
    )
    for number, stage in enumerate((examine, fetch_release, convert_release), start=1):
        faults.add(Fault(kind="corrupt", method="GET", path="/resolve/.*safetensors"))
        answer = stage(order)
        assert answer.failed == {}
        assert faults.struck["corrupt"] == number
        if stage is examine:
            order = replace(order, parts=(replace(part, plan=answer.facts[1]["plan"]),))
    assert (order.out(part) / "conversion.json").is_file()


@pytest.mark.parametrize(
    ("said", "raised"),
    [
        (["a", "a", "a"], PlanError),
        (["a", "a", None], None),
        (["a", None], None),
        (["a", "b"], HubError),
        (["a", "a", "b"], HubError),
    ],
)
def test_a_refusal_is_believed_when_every_reading_says_it(said, raised):
    left = iter(said)

    def read():
        if (text := next(left)) is not None:
            raise PlanError([text])
        return "read"

    if raised is None:
        assert believed("acme/m", read) == "read"
    else:
        with pytest.raises(raised, match="a" if raised is PlanError else "damaged answers"):
            believed("acme/m", read)
    assert list(left) == []
