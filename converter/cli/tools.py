"""The commands beside converting: twins, maps, cards, uploads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from converter.errors import PlanError, UsageError
from converter.ui import Console, size_text


def twin_command(source: str, out: Path, *, dtype: str, seed: int, max_shard_size: str) -> None:
    """convert twin: a tiny checkpoint of an architecture."""
    from converter.release import open_release
    from validate.twin import TwinError, list_examples, load_example, make_twin, twin_from

    common: dict[str, Any] = {"dtype": dtype, "seed": seed, "max_shard_size": max_shard_size}
    try:
        if source in list_examples():
            info = make_twin(load_example(source), out, **common)
        elif Path(source).is_dir():
            info = twin_from(Path(source), out, **common)
        elif "/" in source:
            release = open_release(source)
            info = make_twin(dict(release.source.config), out, **common)
        else:
            known = ", ".join(list_examples())
            raise UsageError(f"{source}: no folder, hub id or model_type with an example ({known})")
    except TwinError as error:
        raise PlanError([str(error)]) from error
    click.echo(
        f"{info.path}: {info.architecture}, {info.tensors} tensors, {info.parameters:,} "
        f"parameters, {size_text(info.weight_bytes)}, {info.seconds:.1f} s"
    )


def maps_list_command(as_json: bool) -> None:
    """convert maps list: the registry."""
    from arch_maps.registry import find, model_types

    rows = []
    for name in model_types():
        arch = find(name)
        assert arch is not None
        rows.append(
            {
                "model_type": name,
                "parts": list(arch.parts),
                "modalities": list(arch.modalities),
                "runtimes": list(arch.runtimes),
                "layouts": [layout.name for layout in arch.layouts],
                "remarks": list(arch.remarks),
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console as RichConsole
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("model_type", "parts", "modalities", "runtimes", "layouts")
    for column in columns:
        table.add_column(column)
    for row in rows:
        cells = (row[column] for column in columns)
        table.add_row(*(c if isinstance(c, str) else ", ".join(c) for c in cells))
    RichConsole(highlight=False).print(table)


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


def maps_check_command(source: str, revision: str | None) -> None:
    """convert maps check: totality of a map on a release's headers."""
    from converter.plan.match import find_map, match_release
    from converter.release import open_release

    release = open_release(source, revision=revision)
    match = match_release(release.source, find_map(release.source.config))
    click.echo(
        f"{release.name}: {match.arch.model_type}, {match.layout.name} layout: "
        f"{len(release.source.tensors)} tensors make {len(match.rules)} parameters, "
        f"{len(match.drops)} are dropped with a reason"
    )


def card_command(out: Path, *, repo_id: str | None, template: Path | None) -> None:
    """convert card: write the model card."""
    from converter.publish import write_card

    click.echo(str(write_card(out, repo_id=repo_id, template=template)))


def upload_command(out: Path, given: dict[str, Any]) -> None:
    """convert upload: publish a proven output."""
    from converter.naming import repo_name
    from converter.publish import upload_output, write_card

    repo = repo_name(given["upload_repo"] or "", out.resolve().name)
    if given["card_template"] is not None:
        write_card(out, repo_id=repo, template=given["card_template"])
    address = upload_output(
        out,
        repo,
        console=Console(),
        private=given["private"],
        allow_gated=given["allow_gated"],
    )
    click.echo(f"published: {address}")
