"""The page: self-contained, escaped, and honest about what is not finite."""

import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from validate.acceptance.browser import Page as Browser
from validate.acceptance.needs import chromium, no_chromium
from validate.charts import distribution_chart, gauge, position_chart
from validate.checks import CaseResult, Check, Parting, Report
from validate.partings import Words, partings
from validate.report import IMAGES, REPORT_FILES, render_html, write_json, write_page
from validate.view import choices, figure, visible

HOSTILE = "<script>alert('{{ 7*7 }}')</script>"


def report(*, verdict: str = "pass", value: float = 2e-6) -> Report:
    logits = Check(
        name="logits",
        modality="text",
        runtime="mlx_lm",
        value=value,
        threshold=1e-4,
        verdict=verdict,
        note=HOSTILE,
        metrics={"kl_mean": float("nan"), "top1": 1.0},
        cases=(
            CaseResult(
                HOSTILE, value, {"positions": 3}, {"error": [0.0, 1e-6, value], "kl": [0, 1e-9, 0]}
            ),
        ),
    )
    loss = Check(
        name="loss",
        modality="text",
        runtime="mlx_lm",
        value=0.012,
        verdict="info",
        cases=(
            CaseResult(
                "prose",
                0.012,
                {"top1": 2 / 3, "positions": 3},
                {"kl": [0.3, float("inf"), 0.001]},
                partings=(
                    Parting(position=1, before="once", wanted=" upon", got=HOSTILE, lead=0.25),
                ),
            ),
        ),
    )
    modules = Check(
        name="modules",
        modality="text",
        runtime="mlx_lm",
        value=1.5,
        threshold=32,
        verdict="info",
        cases=(
            CaseResult(
                "prose",
                1.5,
                {},
                {"error": [1e-7, 2e-7, 1e-6], "noise": [1e-7, 1e-7, 2e-6]},
                ("embed_tokens", "layers.0", "norm"),
            ),
        ),
    )
    return Report(
        plan="sha256:0123",
        reference={"class": HOSTILE},
        runtime={"runtimes": [{"name": "mlx_lm", "version": "0.32.2"}]},
        checks=(logits, loss, modules),
    )


class Page(HTMLParser):
    """Collects tags and what they would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href", "onload")]
        if tag not in ("meta", "br", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "polyline"):
            assert self.open.pop() == tag


def test_files(tmp_path: Path) -> None:
    found = write_json(report(), tmp_path, checkpoint="c", kv_cache=None)
    write_page(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(REPORT_FILES)
    data = json.loads((tmp_path / "parity.json").read_text())
    assert data == found
    assert set(data) == {"verdict", "plan", "reference", "runtime", "checks", "checkpoint"}
    assert data["verdict"] == "pass"
    assert data["checks"][0]["metrics"]["kl_mean"] == "nan"
    assert data["checks"][1]["cases"][0]["series"]["kl"] == [0.3, "inf", 0.001]


def test_page_is_self_contained_and_escaped() -> None:
    text = render_html(report().to_json())
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(re.fullmatch("#[a-z]+", link) for link in page.fetched), page.fetched
    assert {f'id="{link[1:]}"' for link in page.fetched} <= set(re.findall(r'id="[a-z]+"', text))
    assert "script" not in page.tags
    assert text.count('role="img"') == 4
    assert "&lt;script&gt;" in text
    assert "url(" not in text
    assert "@import" not in text
    assert "7*7" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_page_of_a_failure_names_it_first(value: float) -> None:
    text = render_html(report(verdict="fail", value=value).to_json())
    assert "Parity does not hold" in text
    assert text.index("<b>logits</b>") < text.index("</header>") < text.index("<table>")
    assert str(value) in text


def test_a_deviation_of_the_runtime_is_told_at_the_top() -> None:
    row = Check(
        name="deviation",
        modality="image",
        runtime="mlx_vlm",
        value=0.0015,
        threshold=0.01,
        verdict="info",
        note="another activation",
    )
    base = report()
    page = render_html(
        Report(plan=None, reference={}, runtime=base.runtime, checks=(*base.checks, row)).to_json()
    )
    head = page[: page.index("</header>")]
    assert "Parity holds" in head
    assert "off by 0.0015" in head
    assert "another activation" in head


def test_both_colour_schemes_define_every_colour() -> None:
    text = render_html(report().to_json())
    light, dark = re.findall(r":root \{(.*?)\n *\}", text, flags=re.S)
    names = [set(re.findall(r"(--[\w-]+):", block)) for block in (light, dark)]
    assert names[0] == names[1]
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= names[0]


def test_chart_geometry() -> None:
    check = report(value=1e-2).to_json()["checks"][0]
    chart = position_chart(check)
    assert chart is not None
    (line,) = chart.lines
    points = [tuple(map(float, point.split(","))) for point in line.points.split()]
    assert [x for x, _ in points] == [58.0, 343.0, 628.0]
    assert chart.threshold is not None
    assert points[2][1] < chart.threshold.at < points[1][1] < points[0][1] + 1
    assert position_chart({**check, "cases": []}) is None


def test_infinity_sits_on_the_upper_edge() -> None:
    chart = distribution_chart(report().to_json()["checks"][1])
    assert chart is not None
    last = chart.lines[0].points.split()[-1]
    assert last == "628,12"


def test_gauge_and_figures() -> None:
    assert gauge(1e-4, 1e-4) == 100
    assert gauge(1e-7, 1e-4) == pytest.approx(50)
    assert gauge("nan", 1e-4) is None
    assert gauge(0.0, 1e-4) == 0
    assert gauge(1.0, 0.0) is None
    assert [figure(v) for v in (None, 12.0, 1234567, 1.23456e-7, "inf", True)] == [
        "-",
        "12",
        "1,234,567",
        "1.23e-07",
        "inf",
        "True",
    ]


def test_tokens_are_told_where_first_choices_part() -> None:
    text = render_html(report().to_json())
    assert "1 of 3 positions" in text
    assert "\u2423upon</code>" in text
    assert "&hellip;once" in text
    (group,) = choices(report().to_json()["checks"])
    assert [row["prompt"] for row in group["parted"]] == ["prose"]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" a b", "\u2423a b"),
        ("\n\n", "\u23ce\u23ce"),
        ("  ", "\u2423\u2423"),
        ("", "\u2205"),
        ("x\t", "x\u21e5"),
    ],
)
def test_blanks_of_a_token_can_be_seen(token: str, shown: str) -> None:
    assert visible(token) == shown


class Letters:
    """A tokenizer of single letters, in which 9 is a byte of a longer character."""

    def decode(self, ids):
        return "".join("\ufffd" if token == 9 else "abcd efgh"[token] for token in ids)

    def convert_ids_to_tokens(self, ids):
        return [f"<0x{token:02X}>" for token in ids]


def test_partings_are_the_surest_first_in_words() -> None:
    wanted = [[5.0, 0, 0, 0, 0, 0, 0, 0, 0, 0]] * 3
    other = [[5.0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 9 + [1.0]]
    wanted = [wanted[0], [1.0, 0.9, *wanted[0][2:]], wanted[2]]
    found = partings(wanted, other, Words(Letters()), ids=[2, 4, 3], fed=1)
    told = [(one.position, one.before, one.wanted, one.got) for one in found]
    assert told == [(2, "c d", "a", "<0x09>"), (1, "c ", "a", "b")]
    assert [one.lead for one in found] == pytest.approx([5.0, 0.1])
    assert partings(wanted, other, Words(), ids=[], fed=1)[0].got == "#9"
    assert partings(wanted, other, Words(), ids=[], fed=1)[0].before == ""
    assert partings(wanted, other[:2], Words(), ids=[], fed=1) == ()


def test_charts_are_files_of_the_same_bytes_and_go_with_what_they_show(tmp_path: Path) -> None:
    data = report().to_json()
    write_page(data, tmp_path)
    pictures = [tmp_path / f"{name}.{kind}" for name in IMAGES for kind in ("svg", "png")]
    first = [path.read_bytes() for path in pictures]
    write_page(data, tmp_path)
    assert [path.read_bytes() for path in pictures] == first
    for path in pictures[::2]:
        drawn = ElementTree.fromstring(path.read_text())
        assert len(drawn.findall(".//{*}g/{*}polyline")) in (1, 2)
    for path in pictures[1::2]:
        with Image.open(path) as image:
            colours = {tuple(colour) for _, colour in image.convert("RGB").getcolors()}
            assert image.size[0] == 1280
        assert (0x0B, 0x68, 0xCB) in colours  # the first line
        assert (0x1C, 0x20, 0x24) in colours  # the title
    write_page({**data, "checks": data["checks"][:1]}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["parity.html"]


def conversion() -> dict:
    return {
        "repo": f"org/{HOSTILE}",
        "weights": "4-bit affine",
        "size": "1.0 MB",
        "bits_per_weight": 4.5,
        "command": "convert --hf-path x",
        "drops": [("mtp.{0-3}.weight", "a drafter, see --mtp")],
        "notes": ["a note"],
        "sources": [("model.safetensors", 10, "ab")],
        "files": [("config.json", 1, "cd")],
        "facts": [("source commit", "0123")],
    }


def test_the_page_tells_how_the_checkpoint_was_made() -> None:
    text = render_html({**report().to_json(), "conversion": conversion()})
    for told in (
        "mtp.{0-3}.weight",
        "a drafter, see --mtp",
        "a note",
        "source commit",
        "cd</code>",
    ):
        assert told in text
    none = {**conversion(), "drops": []}
    assert "every tensor of the release is used" in render_html(
        {**report().to_json(), "conversion": none}
    )


def test_outputs_that_were_measured_together_are_shown() -> None:
    rows = [
        {"name": name, "control": False, "bytes": 10**6, "bits_per_weight": bits, "kl_mean": kl}
        | {"top1": 0.9, "this": name == "m-4bit"}
        for name, bits, kl in (("m-4bit", 4.5, 0.01), ("m-8bit", 8.5, 0.001))
    ]
    quality = {"plan": None, "checkpoint": None, "measured": "on a text", "rows": rows}
    text = render_html({**report().to_json(), "quality": quality})
    section = text[text.index('id="sizes"') :]
    assert section.count("<circle") == 4  # two points, two keys
    assert (
        section.index("m-4bit")
        < section.index("this one")
        < section.index('<tr><th scope="row">m-8bit')
    )


BROKEN = """
[...document.querySelectorAll('body *')].filter(e =>
  e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll')).map(e => e.outerHTML)
"""


def full() -> dict:
    row = {"name": "server chat", "runtime": "mlx_lm", "rule": "r", "note": "n", "metrics": {}}
    rows = [{**row, "verdict": v, "commands": ["x" * 90]} for v in ("pass", "not applicable")]
    accepted = {"backend": {"mlx": "0.32.4"}, "rows": rows}
    return {**report().to_json(), "conversion": conversion(), "acceptance": accepted}


@pytest.mark.skipif(no_chromium() is not None, reason=str(no_chromium()))
@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_the_page_in_a_browser(tmp_path: Path, verdict: str) -> None:
    """No errors, no breach of the accessibility rules, nothing past the edge, all by keyboard."""
    data = full()
    data["checks"][0]["verdict"] = data["verdict"] = verdict
    (tmp_path / "parity.html").write_text(render_html(data))
    url = (tmp_path / "parity.html").as_uri()
    with Browser(url, chromium=str(chromium()), work=tmp_path) as page:
        page.until("document.readyState == 'complete'", "nothing shown", limit_s=30)
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        page.evaluate((files("axe_core_python") / "axe.min.js").read_text())
        for width, scheme in ((1280, "light"), (1280, "dark"), (320, "light"), (320, "dark")):
            page.show(width=width, scheme=scheme)
            found = page.evaluate(
                "axe.run(document, {resultTypes: ['violations']}).then(all => "
                "all.violations.map(one => one.id + ': ' + one.nodes.map(n => n.html)))"
            )
            assert found == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(BROKEN) == []
        page.evaluate("document.body.tabIndex = -1; document.body.focus()")
        reached = []
        for _ in range(80):
            page.press("Tab")
            reached.append(
                page.evaluate(
                    "document.activeElement.ariaLabel || document.activeElement.innerText"
                )
            )
        assert reached[:2] == ["To the findings", "Error by layer"]
        regions = page.evaluate("[...document.querySelectorAll('.scroll')].map(e => e.ariaLabel)")
        assert set(regions) <= set(reached)
        assert page.errors() == page.said() == []
