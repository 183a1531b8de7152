"""The commands beside converting: twins, maps, cards, uploads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import click

from converter.atomic import write_named
from converter.errors import PlanError, UsageError
from converter.execute.folder import explain
from converter.ui import Console, size_text

_PIPED_WIDTH: Final = 200
"""Columns of what no terminal shows."""


def write_text(path: Path, text: str, *, flag: str) -> None:
    """Write a file at the place that ``flag`` names, whole or not at all; raises ConvertError."""
    with explain(path, flag):
        write_named(path, text)


def twin_command(source: str, out: Path, *, dtype: str, seed: int, max_shard_size: str) -> None:
    """convert twin: a tiny checkpoint of an architecture."""
    from converter.release import open_release
    from validate.twin import (
        TwinError,
        list_examples,
        list_variants,
        load_example,
        make_twin,
        twin_from,
    )

    common: dict[str, Any] = {"dtype": dtype, "seed": seed, "max_shard_size": max_shard_size}
    try:
        if source in (*list_examples(), *list_variants()):
            info = make_twin(load_example(source), out, **common)
        elif Path(source).is_dir():
            info = twin_from(Path(source), out, **common)
        elif "/" in source:
            release = open_release(source)
            info = make_twin(dict(release.source.config), out, **common)
        else:
            known = ", ".join((*list_examples(), *list_variants()))
            raise UsageError(f"{source}: no folder, hub id or model_type with an example ({known})")
    except TwinError as error:
        raise PlanError([str(error)]) from error
    click.echo(
        f"{info.path}: {info.architecture}, {info.tensors} tensors, {info.parameters:,} "
        f"parameters, {size_text(info.weight_bytes)}, {info.seconds:.1f} s"
    )
    if info.from_map:
        click.echo("transformers has no class of it: names and shapes are the map's own")


def maps_list_command(as_json: bool) -> None:
    """convert maps list: the registry, and what was measured of each type."""
    from arch_maps.evidence import Evidence, evidence
    from arch_maps.registry import find, model_types

    rows = []
    measured = evidence()
    for name in model_types():
        arch = find(name)
        assert arch is not None
        found = measured.get(name, Evidence())
        rows.append(
            {
                "model_type": name,
                "parts": list(arch.parts),
                "modalities": list(arch.modalities),
                "runtimes": list(arch.runtimes),
                "layouts": [layout.name for layout in arch.layouts],
                "fixtures": list(found.fixtures),
                "twins": list(found.twins),
                "to torch": found.restored,
                "parity": found.parity,
                "errors": list(found.errors),
                "remarks": list(arch.remarks),
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console as RichConsole
    from rich.table import Table

    console = RichConsole(highlight=False)
    if not console.is_terminal:  # a file or a pipe is as wide as it has to be
        console.width = _PIPED_WIDTH
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["model_type", "parts", "modalities", "fixtures", "twins", "to torch", "parity"]
    if console.width < _PIPED_WIDTH // 2:
        columns.remove("parts")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("model_type", "parity"))
    for row in rows:
        cells = (row[column] for column in columns)
        table.add_row(*(c if isinstance(c, str) else ", ".join(c) for c in cells))
    console.print(table)
    passed = sum(row["parity"] == "pass" for row in rows)
    unproven = sum(row["parity"] == "unproven" for row in rows)
    click.echo(
        f"{len(rows)} types: {passed} compute what torch computes, {unproven} have no torch class "
        "to compare with (--json for errors, layouts, runtimes and remarks)"
    )


def maps_show_command(model_type: str) -> None:
    """convert maps show: a map's rules on its example config."""
    from arch_maps.facts import Facts, spell_shape
    from arch_maps.ops import describe
    from converter.plan.match import find_map
    from validate.twin import list_examples, load_example

    arch = find_map({"model_type": model_type})
    if model_type not in list_examples():
        raise UsageError(f"{model_type}: has no example config to show the map with")
    tensors = arch.expand(Facts(load_example(model_type)), arch.layouts[0])
    for rule in tensors.rules:
        shape = spell_shape(rule.expr.shape)
        click.echo(f"{rule.target} {shape} {rule.kind}/{rule.part} <- {describe(rule.expr)}")
    for drop in tensors.drops:
        click.echo(f"dropped {drop.name}: {drop.reason}")


def maps_check_command(source: str, revision: str | None, file: Path | None) -> None:
    """convert maps check: totality of a map on a release's headers, both sides."""
    from converter.decode import decoded
    from converter.maps import MapChoice, choose_map
    from converter.plan import Options, build_plan
    from converter.plan.match import match_release
    from converter.release import open_release
    from converter.runtime_map import check_reload
    from quant.recipe import QuantSpec

    release = open_release(source, revision=revision)
    view = decoded(release.source)
    arch = choose_map(view.source, MapChoice(file=file))
    match = match_release(view.source, arch)
    click.echo(
        f"{release.name}: {match.arch.model_type}, {match.layout.name} layout: "
        f"{len(view.source.tensors)} tensors make {len(match.rules)} parameters, "
        f"{len(match.drops)} are dropped with a reason"
    )
    recipes = {"plain": Options()}
    if any(rule.quantizable and int(rule.expr.shape[-1]) % 64 == 0 for rule in match.rules):
        recipes["4-bit"] = Options(quant=QuantSpec.make("affine", 4, 64))
    for name, options in recipes.items():
        plan = build_plan(view.source, match, options, view=view)
        titles = check_reload(plan, arch.runtimes)
        click.echo(f"{name}: every parameter is loaded as it is written by {', '.join(titles)}")


def maps_draft_command(source: str, revision: str | None, out: Path | None) -> None:
    """convert maps draft: a first map from what a runtime's loader does."""
    from converter.decode import decoded
    from converter.draft import draft
    from converter.release import open_release

    release = open_release(source, revision=revision)
    drafted = draft(decoded(release.source).source)
    if out is None:
        click.echo(drafted.text, nl=False)
    else:
        if out.exists():
            raise UsageError(f"--out {out}: exists already")
        write_text(out, drafted.text, flag="--out")
        click.echo(str(out))
    for drop in drafted.dropped:
        click.echo(f"dropped {drop.name}: {drop.reason}", err=True)


def report_command(places: tuple[Path, ...], *, html: Path, as_json: bool) -> None:
    """convert report: runs side by side, from the reports that they left."""
    from converter.reporting import gather
    from validate.checks import finite
    from validate.runs import print_runs, runs_html

    found = gather(places)
    write_text(html, runs_html(found["runs"]), flag="--html")
    if as_json:
        click.echo(json.dumps(finite(found), indent=1, ensure_ascii=False))
    else:
        print_runs(found["runs"])
        click.echo(str(html))


def card_command(out: Path, *, repo_id: str | None, template: Path | None) -> None:
    """convert card: write the model card."""
    from converter.publish import write_card

    click.echo(str(write_card(out, repo_id=repo_id, template=template)))


def upload_command(out: Path, given: dict[str, Any]) -> None:
    """convert upload: publish a proven output."""
    from converter.naming import repo_name, require_repo_name
    from converter.publish import upload_output, write_card

    repo = repo_name(given["upload_repo"] or "", out.resolve().name)
    require_repo_name(repo, "--upload-repo")
    if given["card_template"] is not None:
        write_card(out, repo_id=repo, template=given["card_template"])
    address = upload_output(
        out,
        repo,
        console=Console(),
        private=given["private"],
        allow_gated=given["allow_gated"],
        allow_unproven=given["allow_unproven"],
    )
    click.echo(f"published: {address}")
