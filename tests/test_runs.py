"""convert report: finished runs side by side, from what lies beside them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from release_helpers import make, status

from converter.errors import ConvertError
from converter.manifest import file_sha256, read_manifest, refresh, verify
from converter.measured import quality_report, record_variants
from converter.page import draw_page
from converter.plan import Options
from converter.publish import published_files
from converter.source.strict_json import MAX_JSON_BYTES
from quant.recipe import QuantSpec
from validate.checks import Check, Report
from validate.report import write_json
from validate.runs import one_release, run_facts, runs_html

HOSTILE = "[red]<script>alert(1)</script>"


def parity(folder: Path, *, error: float, kl: float) -> Path:
    verdict = "pass" if error < 1e-4 else "fail"
    checks = (
        Check("logits", "text", verdict, "mlx_lm", error, 1e-4),
        Check(
            "loss",
            "text",
            "info",
            "mlx_lm",
            kl,
            metrics={"kl_mean": kl, "kl_p99": kl, "top1": 0.9, "positions": 7},
        ),
    )
    reference = {"class": "Q", "folder": HOSTILE, "torch": "2.13.0"}
    runtime = {"runtimes": [{"name": "mlx_lm", "version": "0.32.2", "mlx": "0.32.4"}]}
    report = Report(plan="p", reference=reference, runtime=runtime, checks=checks)
    folder.mkdir(parents=True)
    write_json(report, folder, checkpoint=None, kv_cache=None)
    return folder


@pytest.fixture(scope="module")
def outputs(tinylm, tmp_path_factory) -> tuple[Path, Path]:
    """Two real conversions of one release, with reports as a parity run writes them."""
    root = tmp_path_factory.mktemp("runs")
    made = []
    for bits, error, kl in ((4, 1e-6, 0.01), (8, 5e-4, 0.001)):
        (out,) = make(
            tinylm, root / f"{bits}bit", Options(quant=QuantSpec.make("affine", bits, 64))
        )
        parity(root / f"report-{bits}", error=error, kl=kl)
        data = json.loads((root / f"report-{bits}" / "parity.json").read_text())
        plan = json.loads((out / "conversion.json").read_text())["plan"]
        (out / "parity.json").write_text(json.dumps({**data, "plan": plan}))
        made.append(out)
    return made[0], made[1]


def test_runs_are_told_in_a_table_as_json_and_as_a_page(outputs, tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.html"
    assert status("report", *outputs, "--html", page) == 0
    told = capsys.readouterr().out
    assert "exactness, text" in told
    assert "4-bit affine" in told
    assert str(page) in told
    assert status("report", *outputs, "--html", page, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)["runs"]
    assert [first["name"], second["name"]] == ["4bit", "8bit"]
    assert (first["verdict"], second["verdict"]) == ("pass", "fail")
    assert second["failed"] == ["logits, text, mlx-lm"]
    assert second["worst"] == {"check": "logits, text, mlx-lm", "value": 5e-4, "gate": 1e-4}
    assert first["bits_per_weight"] < 5 < second["bits_per_weight"]
    assert first["bytes"] == sum(p.stat().st_size for p in outputs[0].glob("*.safetensors"))
    assert first["versions"]["mlx-lm"] == "0.32.2"
    assert first["stale"], "these reports name no checkpoint, and the manifest has one"
    text = page.read_text()
    assert "<script>" not in text
    assert text.count("<circle") == 4
    assert "not in it" not in text


def test_outputs_of_one_run_are_shown_beside_each_other(outputs, tmp_path: Path) -> None:
    copies = [shutil.copytree(out, tmp_path / out.name) for out in outputs]
    for copy in copies:  # a report of exactly these files
        data = json.loads((copy / "parity.json").read_text())
        (copy / "parity.json").write_text(
            json.dumps({**data, "checkpoint": read_manifest(copy).checkpoint})
        )
    record_variants(copies)
    found = quality_report(copies[1])
    assert [(row["name"], row["kl_mean"], row["this"]) for row in found["rows"]] == [
        ("4bit", 0.01, False),
        ("8bit", 0.001, True),
    ]
    draw_page(copies[1])
    text = (copies[1] / "parity.html").read_text()
    assert text.count("<circle") == 4
    assert "parity-kl.png" not in {path.name for path in copies[1].iterdir()}
    verify(copies[1])
    assert "quality.json" in published_files(copies[1], read_manifest(copies[1]))
    config = json.loads((copies[1] / "config.json").read_text())
    (copies[1] / "config.json").write_text(json.dumps({**config, "changed": 1}))
    refresh(copies[1], {"config.json": file_sha256(copies[1] / "config.json")})
    assert quality_report(copies[1]) is None
    assert "quality.json" not in published_files(copies[1], read_manifest(copies[1]))
    (copies[1] / "quality.json").write_text("{")
    with pytest.raises(ConvertError, match=r"quality\.json: is damaged"):
        quality_report(copies[1])
    (copies[1] / "quality.json").unlink()
    draw_page(copies[1])
    assert "<circle" not in (copies[1] / "parity.html").read_text()


def test_a_report_alone_is_told_as_far_as_it_goes(tmp_path: Path, outputs, capsys) -> None:
    kept = shutil.copyfile(outputs[0] / "parity.json", tmp_path / "old.json")
    other = parity(tmp_path / HOSTILE.replace("/", "-"), error=1e-6, kl=0.5)
    page = tmp_path / "page.html"
    assert status("report", kept, other, "--html", page) == 0
    told = capsys.readouterr().out
    assert "[red]" in told
    assert "bits per weight" not in told
    assert "no conversion.json lies beside" in page.read_text()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no parity.json; `convert validate"),
        ("{", "cannot be read as a parity report"),
        ("{}", "lacks verdict, plan, reference, runtime, checks"),
        (
            '{"verdict": "pass", "plan": "p", "reference": 1, "runtime": {}, "checks": []}',
            "is no parity report: AttributeError",
        ),
        (" " * (MAX_JSON_BYTES + 1), "bytes are too many"),
    ],
    ids=["nothing", "cut", "empty", "of another kind", "huge"],
)
def test_what_is_no_run_is_refused(tmp_path: Path, outputs, capsys, content, says: str) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    if content is not None:
        (bad / "parity.json").write_text(content)
    page = tmp_path / "page.html"
    assert status("report", outputs[0], bad, "--html", page) == 2
    assert says in capsys.readouterr().err
    assert not page.exists()


def test_a_place_that_is_not_there_and_one_twice_are_refused(tmp_path, outputs, capsys) -> None:
    assert status("report", tmp_path / "none") == 2
    assert "there is no such folder or file" in capsys.readouterr().err
    assert status("report", outputs[0], outputs[0], "--html", tmp_path / "page.html") == 2
    assert "given twice" in capsys.readouterr().err


def facts(release: str | None, folder: str, kl: object = 0.1, checks=()) -> dict:
    data = {
        **{"verdict": "pass", "plan": "p", "reference": {"folder": folder}, "runtime": {}},
        "checks": [
            {"name": "loss", "modality": "text", "runtime": "mlx_lm", "verdict": "info"}
            | {"value": kl, "threshold": None, "metrics": {"kl_mean": kl, "top1": 1}, "cases": []},
            *checks,
        ],
    }
    made = {"repo": release, "bits_per_weight": 4.5}
    return run_facts(
        data, name=folder, conversion=made, recorded=None, acceptance=None, stale=False
    )


def test_runs_of_one_release_are_known_by_its_name_or_its_folder() -> None:
    assert one_release([facts("acme/q", "a"), facts("acme/q", "b")])
    assert one_release([facts("acme/q", "a"), facts(None, "a")]), "the same reference folder"
    assert not one_release([facts("acme/q", "a"), facts("acme/r", "b")])


def test_a_failed_check_is_nearest_to_its_gate_whatever_its_value() -> None:
    def check(name: str, verdict: str, value: object, gate: float) -> dict:
        known = {"name": name, "modality": "text", "runtime": "mlx_lm", "metrics": {}, "cases": []}
        return {**known, "verdict": verdict, "value": value, "threshold": gate}

    passed, failed = check("logits", "pass", 9e-5, 1e-4), check("decode", "fail", "nan", 1e-4)
    run = facts("acme/q", "a", checks=(passed, failed))
    assert run["worst"] == {"check": "decode, text, mlx-lm", "value": "nan", "gate": 1e-4}
    assert facts("acme/q", "a", checks=(passed,))["worst"]["value"] == 9e-5
    same = check("same tensors", "fail", 3, 0)
    assert facts("acme/q", "a", checks=(passed, same))["worst"]["value"] == 3


def test_a_run_keeps_its_colour_where_another_has_no_dot() -> None:
    whole = runs_html([facts("r", "a"), facts("r", "b", kl=0.2), facts("r", "c", kl=0.3)])
    parted = runs_html([facts("r", "a"), facts("r", "b", kl="inf"), facts("r", "c", kl=0.3)])
    colour = re.compile(r'<circle[^>]*class="[^"]*?(\d)[^"]*"')
    assert colour.findall(whole)[-1] == colour.findall(parted)[-1]
