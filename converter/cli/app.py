"""The entry point; what a command needs is imported when it runs, so that --help is instant."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from converter.cli import options as opt
from converter.cli.batch import batch
from converter.cli.errors import run


@click.group(invoke_without_command=True, context_settings={"max_content_width": 100})
@opt.source(required=False)
@opt.recipe
@opt.mapping
@opt.output
@opt.stream
@opt.kv_cache
@opt.publishing
@opt.proof
@click.version_option(package_name="mlx-dayzero", prog_name="convert")
@click.pass_context
def cli(context: click.Context, /, **given: Any) -> None:
    """Turn a Hugging Face release into a proven MLX checkpoint, and publish it.

    Without a subcommand this converts: it plans from headers, streams the weights, runs the MLX
    runtime against the torch reference, writes a model card, and uploads if asked to.
    """
    source = context.get_parameter_source
    asked = any(source(name) is ParameterSource.COMMANDLINE for name in given)
    if context.invoked_subcommand is not None:
        if asked:
            raise click.UsageError(
                f"put the options after the subcommand: convert {context.invoked_subcommand} "
                "--hf-path ..."
            )
        return
    if asked and not given["hf_path"]:
        raise click.UsageError("--hf-path is missing: a hub id, a folder or a GGUF file to convert")
    if not asked:
        click.echo(context.get_help())
        context.exit(2)
    from converter.cli.convert import convert_command

    convert_command(given)


@cli.command()
@opt.source()
@opt.recipe
@opt.mapping
@opt.kv_cache
@click.option("--workers", type=click.IntRange(1, 256), help="Threads; default: one per core.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole plan as JSON.")
def plan(**given: Any) -> None:
    """Decide a conversion from headers alone and show it; no weights are read."""
    from converter.cli.convert import plan_command

    plan_command(given)


@cli.command()
@opt.source()
@click.option("--mlx-path", type=click.Path(path_type=Path), required=True, help="The checkpoint.")
@opt.map_file
@opt.adapter
@opt.judging
@click.option("--json", "as_json", is_flag=True, help="Print parity.json.")
def validate(**given: Any) -> None:
    """Run an existing MLX checkpoint, whoever made it, against its torch release."""
    from converter.cli.convert import validate_command

    validate_command(given)


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
def verify(out: Path) -> None:
    """Check every file of an output against its manifest, offline."""
    from converter.cli.convert import verify_command

    verify_command(out)


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@opt.kv_cache
@click.option("--calibration-data", type=click.Path(path_type=Path), help="Text to measure on.")
@click.option("--trust-remote-code", is_flag=True, help="Run the output's own model code.")
@click.option("--json", "as_json", is_flag=True, help="Print kv_cache.json.")
def kv(out: Path, **given: Any) -> None:
    """Choose and measure KV-cache settings for a finished output, and write them to its config."""
    from converter.cli.convert import kv_command

    kv_command(out, given)


@cli.command()
@click.argument("outputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@opt.source(required=False)
@opt.adapter
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text; default: a shipped one.")
@click.option("--length", type=click.IntRange(16), default=512, show_default=True, help="Tokens.")
@click.option("--windows", type=click.IntRange(1), default=16, show_default=True, help="At most.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with charts here.")
@click.option("--record", is_flag=True, help="Show the figures on the outputs' own pages, too.")
def compare(outputs: tuple[Path, ...], **given: Any) -> None:
    """Set outputs of one release side by side: size, KL, perplexity, and plain rounding's."""
    from converter.cli.convert import compare_command

    compare_command(outputs, given)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The page with charts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what is compared as JSON.")
def report(runs: tuple[Path, ...], html: Path, as_json: bool) -> None:
    """Set finished runs side by side: outputs, or their parity.json; nothing is run again."""
    from converter.cli.tools import report_command

    report_command(runs, html=html, as_json=as_json)


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--only", multiple=True, metavar="ROW", help="Rows whose titles contain this.")
@click.option(
    "--draft-model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A converted drafter to decode with.",
)
@click.option(
    "--image",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A picture to ask about, in place of a generated one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print acceptance.json.")
def accept(out: Path, **given: Any) -> None:
    """Drive a checkpoint, whoever made it, through the stock runtimes as people use them."""
    from converter.cli.accept import accept_command

    accept_command(out, **given)


@cli.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the weights.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, other weights.")
@click.option(
    "--max-shard-size", default="5GB", show_default=True, help="As transformers writes shards."
)
def twin(source: str, out: Path, dtype: str, seed: int, max_shard_size: str) -> None:
    """Make a tiny checkpoint of the architecture of SOURCE: a folder, hub id, or type[:variant]."""
    from converter.cli.tools import twin_command

    twin_command(source, out, dtype=dtype, seed=seed, max_shard_size=max_shard_size)


@cli.group()
def maps() -> None:
    """The architectures that can be converted."""


@maps.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print what is known of each as JSON.")
def maps_list(as_json: bool) -> None:
    """Every mapped model_type."""
    from converter.cli.tools import maps_list_command

    maps_list_command(as_json)


@maps.command(name="show")
@click.argument("model_type")
def maps_show(model_type: str) -> None:
    """What a map does, on the shipped example config of that type."""
    from converter.cli.tools import maps_show_command

    maps_show_command(model_type)


@maps.command(name="check")
@click.argument("source")
@click.option("--revision", help="Branch, tag or commit of a hub release.")
@opt.map_file
def maps_check(source: str, revision: str | None, map_file: Path | None) -> None:
    """Whether a release's headers and a runtime's parameters are accounted for, one by one."""
    from converter.cli.tools import maps_check_command

    maps_check_command(source, revision, map_file)


@maps.command(name="draft")
@click.argument("source")
@click.option("--revision", help="Branch, tag or commit of a hub release.")
@click.option("--out", type=click.Path(path_type=Path), help="The file; default: print it.")
def maps_draft(source: str, revision: str | None, out: Path | None) -> None:
    """Write a first map of an unmapped release, from what a runtime's loader does to it."""
    from converter.cli.tools import maps_draft_command

    maps_draft_command(source, revision, out)


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--upload-repo", "repo_id", help="The repo that the card names.")
@opt.card_template
def card(out: Path, repo_id: str | None, card_template: Path | None) -> None:
    """Write the model card of a finished output."""
    from converter.cli.tools import card_command

    card_command(out, repo_id=repo_id, template=card_template)


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@opt.publishing
def upload(out: Path, **given: Any) -> None:
    """Upload a finished output that has a passing report."""
    from converter.cli.tools import upload_command

    upload_command(out, given)


@cli.command()
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), required=True, help="Where the repos are."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8090,
    show_default=True,
    help="0: any free one; the address is printed.",
)
def hub(folder: Path, port: int) -> None:
    """Serve a staging hub on loopback: the hub's protocol over a folder, without accounts."""
    from converter.staging import serve

    serve(folder, port=port)


cli.add_command(batch)


def main() -> None:
    """Run the command line and exit with the status of what happened."""
    # Imports, headers and plans make objects that stay; looking through them for garbage each
    # time seven hundred have come takes a tenth of a short run.
    gc.set_threshold(100_000)
    status = run(lambda: cli.main(standalone_mode=False))
    gc.freeze()  # nor need the interpreter look for garbage in all of it on its way out
    sys.exit(status)
