"""Chat templates of a release: tried in a limited child before anything renders them here."""

import json

import pytest

from validate import templates
from validate.parity import run_parity
from validate.templates import template_problem
from validate.twin.family import Family
from validate.twin.tokenizer import chat_template

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{{ messages|length }}"
ENDLESS = LOOP.replace("{{ messages|length }}", "{% endfor %}{% endfor %}")
HOSTILE = {
    "endless loop": (ENDLESS, "chat_template.jinja: does not end within"),
    "recursion of loops": (
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}",
        "chat_template.jinja: does not end within",
    ),
    "1 GB string": ("{% set x = messages[0].role * 10**9 %}{{ x }}", "1024 MiB of memory"),
    "constant of 100 GB": ("{{ 'x' * 10**11 }}", "1024 MiB of memory"),
    "long text": ("{{ 'x' * 2000000 }}", "makes more than 1,000,000 characters"),
    "after JSON": (
        "{{ messages|tojson(false) }}{{ sep_token + 'a' }}" + LOOP + "{% endfor %}{% endfor %}",
        "makes more than 1,000,000 characters",
    ),
    "many pieces": (LOOP + "{% endfor %}{% endfor %}", "makes more than 1,000,000 characters"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_are_stopped(tmp_path, case):
    text, message = HOSTILE[case]
    (tmp_path / "chat_template.jinja").write_text(text)
    seconds = 1 if "does not end" in message else 20
    assert message in str(template_problem(tmp_path, seconds=seconds))


@pytest.mark.parametrize(
    "text",
    [
        chat_template(Family()),
        "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}{{ strftime_now('%Y') }}",
        "{{ raise_exception('no system role') }}",
        "{{ messages|tojson(indent=2) }}{% for m in messages %}{% break %}{% endfor %}",
        "{% this is no template",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_sound_and_refusing_templates_pass(tmp_path, text):
    (tmp_path / "chat_template.jinja").write_text(text)
    assert template_problem(tmp_path) is None


def test_templates_are_found_wherever_they_are_kept(tmp_path):
    assert template_problem(tmp_path) is None
    long = "{{ 'x' * 2000000 }}"
    named = [{"name": "default", "template": "fine"}, {"name": "tools", "template": long}]
    for name, value in (("tokenizer_config.json", named), ("chat_template.json", long)):
        (tmp_path / name).write_text(json.dumps({"chat_template": value}))
        assert str(template_problem(tmp_path)).startswith(name)
        (tmp_path / name).unlink()
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "rag.jinja").write_text(long)
    assert str(template_problem(tmp_path)).startswith("additional_chat_templates/rag.jinja")


def test_a_huge_template_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "MAX_BYTES", 10)
    (tmp_path / "chat_template.jinja").write_text("x" * 11)
    assert template_problem(tmp_path) == (
        "chat_template.jinja: has 11 bytes, too many for a template"
    )


def test_a_proof_with_a_hostile_template_fails_before_anything_runs(tmp_path, monkeypatch):
    def never():
        raise AssertionError("the runtime was started")

    monkeypatch.setattr("validate.parity.prepare_mlx", never)
    for name in ("source", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ 'x' * 2000000 }}")
    report = run_parity(source=tmp_path / "source", mlx_path=tmp_path / "out", plan=None)
    assert report.verdict == "fail"
    (check,) = report.checks
    assert (check.name, check.verdict) == ("chat template", "fail")
    assert "makes more than 1,000,000 characters" in check.note
