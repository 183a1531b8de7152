"""Model cards: metadata as the hub's own client reads it, inert text, templates, stock usage."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from model_cards.card import CardFacts, names, readdressed, render_card
from model_cards.markdown import code, escape, fenced, literal, one_line, shell
from model_cards.metadata import MAX_METADATA_CHARS, read_source_metadata
from model_cards.view import CardError
from validate.checks import Check, Report

FOLDED = (
    "<details>\n<summary>All 1 rows of the report</summary>\n",
    "</details>\n",
)
"""The HTML that a card's own template has."""
GOLDEN = Path(__file__).parent / "golden" / "card_minicpmv4_6.md"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLAN = "5f2c0b1e"
SOURCE_CARD = """---
license: apache-2.0
language:
- en
- no
pipeline_tag: image-text-to-text
library_name: transformers
datasets: [openbmb/RLAIF-V-Dataset]
tags: [minicpm-v, vision, Transformers, custom_code, "license:mit", minicpm-v]
metrics: [accuracy]
model-index:
- name: MiniCPM-V
  results: []
new_version: openbmb/MiniCPM-V-5
extra_gated_prompt: Agree to everything
widget:
- text: hello
---
# MiniCPM-V 4.6
The best model.
"""
PARITY = Report(
    plan=PLAN,
    reference={"torch": "2.13.0", "transformers": "5.23.0", "dtype": "float32"},
    runtime={"fast_blas": True, "runtimes": [{"name": "mlx_vlm", "version": "0.7.10"}]},
    checks=(
        Check(
            name="weights",
            modality="weights",
            runtime="mlx_vlm",
            verdict="pass",
            value=0.0,
            threshold=0.0,
            note="as loaded equal as written, bit for bit",
            metrics={"tensors": 812, "bytes": 1_234_000_000},
        ),
        Check(
            name="image/logits",
            modality="image",
            runtime="mlx_vlm",
            verdict="pass",
            value=3.21e-6,
            threshold=1e-4,
            metrics={"positions": 300, "max_abs": 4.1e-5, "kl_mean": 1e-9, "top1": 1.0},
        ),
        Check(
            name="loss",
            modality="text",
            runtime="mlx_vlm",
            verdict="info",
            value=0.01213,
            note="against the original weights",
            metrics={"kl_mean": 0.01213, "kl_p99": 0.0598, "top1": 0.934},
        ),
    ),
).to_json()
FACTS = CardFacts(
    repo_id="someone/MiniCPM-V-4_6-4bit",
    base_model="openbmb/MiniCPM-V-4_6",
    base_revision=COMMIT,
    source_card=SOURCE_CARD,
    source_files=("README.md", "config.json", "LICENSE", "model.safetensors"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    runtimes=("mlx-vlm",),
    quantization="4-bit affine, group size 64, 4.51 bits per weight",
    recipe={"mode": "affine", "bits": 4, "group_size": 64, "method": "rtn"},
    dtype="bfloat16",
    size_bytes=1_234_567_890,
    parameters=1_300_000_000,
    bits_per_weight=7.597,
    drops=(("mtp.*", "multi-token prediction, which the runtime has not"),),
    notes=("The runtime computes GELU in the vision tower by its tanh form.",),
    command="convert --hf-path openbmb/MiniCPM-V-4_6 -q --q-bits 4 --upload-repo",
    versions={"mlx-dayzero": "0.1.0", "mlx": "0.32.4", "mlx-vlm": "0.7.10"},
    plan_hash=PLAN,
    parity=PARITY,
)


def with_facts(**changes: Any) -> CardFacts:
    return dataclasses.replace(FACTS, **changes)


def data(card: str) -> dict[str, Any]:
    metadata: dict[str, Any] = yaml.safe_load(ModelCard(card).data.to_yaml())
    return metadata


def body(card: str) -> str:
    return str(ModelCard(card).text)


def source(front: str) -> CardFacts:
    return with_facts(source_card=f"---\n{front}\n---\n# Source\n")


def html_tokens(markdown: str) -> list[str]:
    """Contents of the raw HTML that a GFM parser sees."""
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(markdown)
    flat = [child for token in tokens for child in (token, *(token.children or ()))]
    return [token.content for token in flat if token.type.startswith("html_")]


def links(markdown: str) -> set[str]:
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(markdown)
    inline = [child for token in tokens for child in (token.children or ())]
    return {str(child.attrs["href"]) for child in inline if child.type == "link_open"}


def headings(markdown: str) -> list[str]:
    """Texts of the headings of level 1 and 2."""
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(markdown)
    opened = [i for i, token in enumerate(tokens) if token.type == "heading_open"]
    return [tokens[i + 1].content for i in opened if tokens[i].tag in ("h1", "h2")]


def test_golden() -> None:
    assert render_card(FACTS) == GOLDEN.read_text(encoding="utf-8")


def test_metadata_repeats_only_what_stays_true(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(render_card(FACTS), encoding="utf-8")
    expected = {
        "library_name": "mlx",
        "base_model": "openbmb/MiniCPM-V-4_6",
        "base_model_relation": "quantized",
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
        "language": ["en", "no"],
        "datasets": ["openbmb/RLAIF-V-Dataset"],
        "tags": ["mlx", "minicpm-v", "vision"],
    }
    assert metadata_load(path) == expected
    assert data(path.read_text(encoding="utf-8")) == expected


def test_body_repeats_nothing_of_the_source_body() -> None:
    assert "The best model" not in render_card(FACTS)


def test_local_folder_has_no_base_and_links_the_copied_licence() -> None:
    card = render_card(with_facts(base_model=None, base_revision=None, repo_id=None))
    assert "base_model" not in data(card)
    assert "base_model_relation" not in data(card)
    assert "converted from a local folder" in card
    assert "[`LICENSE`](LICENSE)" in card
    assert "# MLX checkpoint" in card
    assert "Source commit" not in card


def test_unquantized_conversion_says_so() -> None:
    card = render_card(with_facts(quantization="", recipe={}))
    assert "| Weights | not quantized |" in card
    assert "Recipe" not in card
    assert data(card)["base_model_relation"] == "quantized"


def test_pipeline_tag_falls_back_to_the_facts() -> None:
    assert data(render_card(source("license: mit")))["pipeline_tag"] == "image-text-to-text"
    odd = source("pipeline_tag: '<b>'")
    assert data(render_card(odd))["pipeline_tag"] == "image-text-to-text"


@pytest.mark.parametrize("card", [None, "", "# No metadata", "---\ntags: [a]\n---\n"])
def test_missing_licence_is_left_out_and_said(card: str | None) -> None:
    rendered = render_card(with_facts(source_card=card, source_files=()))
    assert not {"license", "license_name", "license_link"} & set(data(rendered))
    assert "The source states no licence in its card's metadata" in rendered
    assert "The source has no licence file." in rendered


@pytest.mark.parametrize(
    ("link", "files", "expected"),
    [
        ("LICENSE", ("LICENSE",), "LICENSE"),
        ("./LICENSE.md", ("LICENSE.md",), "LICENSE.md"),
        (
            "terms/MODEL LICENSE.txt",
            ("terms/MODEL LICENSE.txt",),
            f"https://huggingface.co/openbmb/MiniCPM-V-4_6/blob/{COMMIT}/terms/MODEL%20LICENSE.txt",
        ),
        ("https://example.com/terms", (), "https://example.com/terms"),
        ("LICENSE", (), None),
        ("javascript:alert(1)", ("javascript:alert(1)",), None),
        ("https://example.com/a b", (), None),
    ],
)
def test_other_licence(link: str, files: tuple[str, ...], expected: str | None) -> None:
    front = f"license: other\nlicense_name: minicpm\nlicense_link: {link!r}"
    facts = dataclasses.replace(source(front), source_files=files)
    if link.startswith("javascript:"):
        facts = dataclasses.replace(facts, base_model=None)
    metadata = data(render_card(facts))
    assert metadata["license"] == "other"
    assert metadata["license_name"] == "minicpm"
    assert metadata.get("license_link") == expected


def test_licence_that_is_no_identifier_is_quoted_not_mapped() -> None:
    card = render_card(source("license: Apache License <b>2.0</b>"))
    assert "license" not in data(card)
    assert 'licence as "Apache License &lt;b&gt;2.0&lt;/b&gt;"' in card


def test_licence_list_and_case() -> None:
    assert data(render_card(source("license: [MIT, Apache-2.0]")))["license"] == [
        "mit",
        "apache-2.0",
    ]


@pytest.mark.parametrize(
    ("front", "problem"),
    [
        ("license: mit\ntags: [a", "it is not valid YAML at line 4"),
        ("license: mit\nlicense: other", "it states license twice"),
        ("- license: mit", "it is not a mapping"),
        ("mit", "it is not a mapping"),
        ("license: mit\na: &a [x]\nb: *a", "it uses YAML aliases"),
        ("a: &a {x: 1}\nlicense: mit\n<<: *a", "it uses YAML aliases"),
        ("license: mit\na: " + "[" * 100_000, "it is nested too deeply"),
        ("license: mit\n[a]: b", "one of its keys is not text"),
        ("license: mit\nx: " + "a" * MAX_METADATA_CHARS, "it is longer than 1,048,576 characters"),
    ],
)
def test_malformed_metadata_is_ignored_and_said(front: str, problem: str) -> None:
    card = render_card(source(front))
    assert "license" not in data(card)
    assert f"The metadata of the source's card was not used: {problem}." in card


def test_yaml_makes_no_objects_and_keeps_text() -> None:
    front = "license: !!python/object/apply:os.system ['exit 1']\nlanguage: [no, 1, null]"
    metadata = read_source_metadata(f"---\n{front}\n---\n")
    assert metadata.license == ("exit 1",)
    assert metadata.language == ("no", "1")
    assert "license" not in data(render_card(source(front)))
    assert data(render_card(source(front)))["language"] == ["no"]


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_source_metadata_gives_a_readable_card(front: str) -> None:
    card = render_card(source(front))
    assert data(card)["library_name"] == "mlx"


def test_pure_python_parser_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = read_source_metadata(SOURCE_CARD)
    monkeypatch.delattr(yaml, "CBaseLoader", raising=False)
    assert read_source_metadata(SOURCE_CARD) == fast
    assert fast.datasets == ("openbmb/RLAIF-V-Dataset",)


HOSTILE = [
    "{{ 7*7 }} {% raw %}",
    "<script>alert(1)</script>",
    "a\n---\nlicense: mit\n---\nb",
    "a | b \\| c",
    "[x](javascript:alert(1)) ![y](z)",
    "``` \n```\n# heading",
    "'; rm -rf ~; '",
    '"\nimport os\n"',
    "\u202egnp.exe\u2028next\x00\x1b[31m",
    "x: &a !!python/none *b",
    "1. one",
    "# heading",
    "x" * 5000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    parity = {
        **PARITY,
        "reference": {text: text},
        "checks": [{**PARITY["checks"][1], "name": text}],
    }
    card = render_card(
        with_facts(
            repo_id=text,
            base_model=text,
            base_revision=text,
            source_files=(text, f"LICENSE-{text}"),
            notes=(text,),
            drops=((text, text),),
            command=text,
            versions={text: text},
            dtype=text,
            quantization=text,
            parity=parity,
        )
    )
    metadata = data(card)
    assert metadata["base_model"] == one_line(text)
    assert metadata["license"] == "apache-2.0"
    prose = body(card)
    assert set(html_tokens(prose)) <= {"<code>", "</code>", *FOLDED}
    assert all(url.startswith(("https://huggingface.co/",)) for url in links(prose))
    assert headings(prose)[1:] == ["Usage", "Parity", "How it was made", "Files", "Licence"]
    snippet = next(iter(re.findall(r"```python\n(.*?)```\n", prose, re.DOTALL)))
    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    load = next(n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "load")
    assert ast.literal_eval(load.args[0]) == one_line(text)
    server = next(line for line in prose.splitlines() if line.startswith("mlx_vlm.server"))
    assert shlex.split(server)[2] == one_line(text)


def test_jinja_in_fields_is_not_evaluated() -> None:
    card = render_card(with_facts(notes=("{{ 7*7 }}",), repo_id="x/{{ 7*7 }}"))
    assert "- {{ 7\\*7 }}" in card
    assert "49" not in body(card)


@given(st.text(max_size=60))
@settings(max_examples=500, deadline=None)
def test_escape_prints_exactly_the_text(text: str) -> None:
    markdown = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    tokens = markdown.parse(str(escape(text)))
    assert {token.type for token in tokens} <= {"paragraph_open", "inline", "paragraph_close"}
    shown = [child for token in tokens for child in (token.children or ())]
    assert {child.type for child in shown} <= {"text"}
    assert "".join(child.content for child in shown) == one_line(text)
    row = markdown.parse(f"| a | b |\n|---|---|\n| {escape(text)} | {code(text)} |\n")
    cells = [row[i + 1] for i, token in enumerate(row) if token.type == "td_open"]
    assert len(cells) == 2
    for cell in cells:
        inert = (child for child in cell.children or () if child.type != "html_inline")
        assert "".join(child.content for child in inert) == one_line(text)


@given(st.text(max_size=60))
@settings(deadline=None)
def test_snippet_filters_cannot_be_left(text: str) -> None:
    assert shlex.split(str(shell(text))) == [one_line(text)]
    assert ast.literal_eval(str(literal(text))) == one_line(text)
    (fence,) = MarkdownIt().parse(str(fenced(text, "bash")))
    assert (fence.type, fence.info, fence.content.strip()) == ("fence", "bash", one_line(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[x](https://huggingface.co/me/a)", "[x](https://huggingface.co/you/b)"),
        ("<https://huggingface.co/me/a/tree/main>", "<https://huggingface.co/you/b/tree/main>"),
        ("See https://huggingface.co/me/a.", "See https://huggingface.co/you/b."),
        ("mlx_lm.generate --model me/a", "mlx_lm.generate --model you/b"),
        ('load("me/a")', 'load("you/b")'),
        ("https://huggingface.co/me/a-x", None),
        ("https://huggingface.co/me/a.x/tree/main", None),
        ("https://huggingface.co/datasets/me/a", None),
        ("https://example.org/me/a", None),
        ("some/me/a", None),
        ("me/a/config.json", None),
    ],
)
def test_another_repo_is_named_wherever_the_old_one_was(text: str, expected: str | None) -> None:
    found = readdressed(text, old="me/a", new="you/b", base_model="acme/tiny")
    assert found == (expected or text)
    assert names(found, "you/b") == names(text, "me/a") == (expected is not None)


def test_parity_states_its_verdict_first() -> None:
    section = render_card(FACTS).split("## Parity\n\n")[1].split("\n## ")[0]
    assert section.startswith("**Verdict: pass.**")
    assert "| loss | text | mlx-vlm | 0.0121 | none | reported | against the" in section
    failing = {**PARITY, "verdict": "fail"}
    assert "**Verdict: fail.**" in render_card(with_facts(parity=failing))


def test_unvalidated_is_said_plainly() -> None:
    card = render_card(with_facts(parity=None))
    assert "Not validated: this checkpoint was not compared with the source." in card
    assert "parity.json" not in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": "other"}, "parity.json is the report of plan other, but this checkpoint was"),
        ({"checks": [{"name": "logits", "verdict": "fail"}]}, "these checks failed: logits"),
        ({"verdict": "maybe"}, "has the verdict maybe"),
    ],
)
def test_report_that_does_not_hold_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CardError, match=message):
        render_card(with_facts(parity={**PARITY, **change}))
    with pytest.raises(CardError, match=r"parity\.json lacks plan"):
        render_card(with_facts(parity={"verdict": "pass", "checks": []}))


def test_template_replaces_the_body_or_one_block(tmp_path: Path) -> None:
    path = tmp_path / "mine.md.j2"
    path.write_text("---\nlicense: wtfpl\n---\n{{ title }} {{ facts.dtype | code }}\n")
    card = render_card(FACTS, template=path)
    assert data(card)["license"] == "apache-2.0"
    assert body(card).strip().endswith("MiniCPM-V-4_6-4bit `bfloat16`")
    path.write_text('{% extends "card.md.j2" %}{% block usage %}See our wiki.\n{% endblock %}')
    card = render_card(FACTS, template=path)
    assert "## Usage\n\nSee our wiki.\n\n## Parity" in card
    assert "mlx_vlm.generate" not in card
    path.write_text("{% macro m(x) %}<i>{{ x }}</i>{% endmacro %}{{ m(facts.notes[0]) }}")
    escaped = render_card(with_facts(notes=("*a* <b>",)), template=path)
    assert escaped.endswith("<i>\\*a\\* &lt;b&gt;</i>\n")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a\n\n{% if %}", 3, "does not parse"),
        ("a\n{{ nothing }}", 2, "'nothing' is undefined"),
        ("a\nb\n{{ ''.__class__ }}", 3, "unsafe"),
        ("{{ facts.versions.clear() }}", 1, "unsafe|not safely callable"),
        ("\n{{ 1 / 0 }}", 2, "division by zero"),
        ('\n{% include "no.j2" %}', 2, "no.j2"),
    ],
)
def test_template_faults_name_file_and_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    path = tmp_path / "bad.md.j2"
    path.write_text(text)
    with pytest.raises(CardError, match=message) as caught:
        render_card(FACTS, template=path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")


def test_unreadable_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"gone\.j2: cannot read the card template: No such file"):
        render_card(FACTS, template=tmp_path / "gone.j2")
    (tmp_path / "bin.j2").write_bytes(b"\xff\xfe")
    with pytest.raises(CardError, match=r"bin\.j2: cannot read .* not UTF-8"):
        render_card(FACTS, template=tmp_path / "bin.j2")


HELP_OF_CONSOLE_SCRIPTS = """
import contextlib, sys
from importlib.metadata import entry_points
for name in list(sys.argv[1:]):
    (script,) = entry_points(group="console_scripts", name=name)
    print(end="\\f", flush=True)
    sys.argv = [name, "--help"]
    with contextlib.suppress(SystemExit):
        script.load()()
"""


def test_commands_and_snippets_exist_in_the_stock_runtimes(tmp_path: Path) -> None:
    """Every flag parses in the stock parsers and every import of every snippet resolves."""
    everything = ("text", "image", "video", "audio")
    cards = [
        render_card(with_facts(modalities=everything, runtimes=("mlx-vlm", "mlx-lm"))),
        render_card(with_facts(modalities=("text", "audio"))),
        render_card(with_facts(sentence_embedding=True)),
    ]
    text = "\n".join(cards)
    commands = {tuple(shlex.split(line)) for line in re.findall(r"(?m)^mlx_.*$", text)}
    names = {command[0] for command in commands}
    assert names == {"mlx_vlm.generate", "mlx_vlm.server", "mlx_lm.generate", "mlx_lm.server"}
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    imports = {
        ast.unparse(node)
        for snippet in snippets
        for node in ast.walk(ast.parse(snippet))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert len(snippets) == 4
    script = tmp_path / "stock.py"
    script.write_text("\n".join(sorted(imports)) + HELP_OF_CONSOLE_SCRIPTS)
    shown = subprocess.run(
        [sys.executable, str(script), *sorted(names)], capture_output=True, text=True, check=True
    ).stdout
    help_texts = dict(zip(sorted(names), shown.split("\f")[1:], strict=True))
    for name, *words in commands:
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", help_texts[name]), f"{name} has no {flag}"
