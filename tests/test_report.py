"""The page: self-contained, escaped, and honest about what is not finite."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from validate.charts import distribution_chart, gauge, position_chart
from validate.checks import CaseResult, Check, Report
from validate.report import figure, render_html, write_report

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
        cases=(CaseResult("prose", 0.012, {}, {"kl": [0.3, float("inf"), 0.001]}),),
    )
    return Report(
        plan="sha256:0123",
        reference={"class": HOSTILE},
        runtime={"runtimes": [{"name": "mlx_lm", "version": "0.32.2"}]},
        checks=(logits, loss),
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
        if tag not in ("meta", "br", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "line":
            assert self.open.pop() == tag


def test_files(tmp_path: Path) -> None:
    write_report(report(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parity.html", "parity.json"]
    data = json.loads((tmp_path / "parity.json").read_text())
    assert set(data) == {"verdict", "plan", "reference", "runtime", "checks"}
    assert data["verdict"] == "pass"
    assert data["checks"][0]["metrics"]["kl_mean"] == "nan"
    assert data["checks"][1]["cases"][0]["series"]["kl"] == [0.3, "inf", 0.001]


def test_page_is_self_contained_and_escaped() -> None:
    text = render_html(report().to_json())
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 2
    assert "&lt;script&gt;" in text
    assert "url(" not in text
    assert "@import" not in text
    assert "7*7" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_page_of_a_failure_names_it_first(value: float) -> None:
    text = render_html(report(verdict="fail", value=value).to_json())
    assert "Parity does not hold" in text
    assert text.index("<b>logits</b>") < text.index("<table>")
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
    light, dark = re.findall(r":root \{(.*?)\}", text, flags=re.S)
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
