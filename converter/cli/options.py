"""Options shared by commands; names follow mlx_lm.convert and mlx_vlm.convert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _all(*decorators: Decorator) -> Decorator:
    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def source(*, required: bool = True) -> Decorator:
    """Where the release is."""
    return _all(
        click.option(
            "--hf-path",
            "--model",
            "hf_path",
            required=required,
            help="Hub id, folder or GGUF file.",
        ),
        click.option(
            "--gguf-file", help="The GGUF file to convert, where the release has several."
        ),
        click.option("--revision", help="Branch, tag or commit of a hub release."),
        click.option("--trust-remote-code", is_flag=True, help="Run the release's own code."),
    )


recipe = _all(
    click.option(
        "--dtype",
        type=click.Choice(["float16", "bfloat16", "float32"]),
        help="Stored type of unquantized weights; default: what the release declares.",
    ),
    click.option("-q", "--quantize", is_flag=True, help="Quantize."),
    click.option("--q-bits", type=int, help="2 3 4 5 6 8; default 4 for affine."),
    click.option("--q-group-size", type=int, help="32 64 128; default 64 for affine."),
    click.option(
        "--q-mode",
        type=click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"]),
        default="affine",
        show_default=True,
        help="Integers with scale and bias, or microscaled floats of one width and group size.",
    ),
    click.option(
        "--q-method",
        type=click.Choice(["rtn", "mlx", "search", "imatrix", "gptq", "autoround"]),
        default="rtn",
        show_default=True,
        help="mlx: the bytes of mx.quantize; rtn: codes from the stored scale and bias; search: "
        "scale and bias by least squares; imatrix: weighted by activations; gptq: errors made up "
        "for by later columns; autoround: those codes and grids tuned block by block (affine).",
    ),
    click.option(
        "--calibration-data",
        type=click.Path(path_type=Path),
        help="Text file or folder for imatrix, gptq, autoround and the KV cache; default: a small "
        "built-in text.",
    ),
    click.option("--calibration-sequences", type=click.IntRange(1), help="Default: 64."),
    click.option("--calibration-length", type=click.IntRange(8), help="Tokens each; default: 512."),
    click.option(
        "--tuning-iterations",
        type=click.IntRange(1),
        help="Steps of autoround in each block; default: 200.",
    ),
    click.option("--quant-predicate", help="A stock mixed recipe such as mixed_4_6."),
    click.option(
        "--q-target-bpw",
        type=click.FloatRange(1, 32),
        help="Choose the format of each matrix for this many bits per weight; reads the weights.",
    ),
    click.option("--q-target-size", help="The same for a size of the weight files, such as 4.2GB."),
    click.option(
        "--kv-rotate-values",
        is_flag=True,
        help="Fold a rotation of every head into value and output projections, so that any "
        "runtime's quantized cache loses less.",
    ),
    click.option("-d", "--dequantize", is_flag=True, help="Plain weights from an MLX checkpoint."),
    click.option(
        "--to",
        "target",
        type=click.Choice(["mlx", "torch"]),
        default="mlx",
        show_default=True,
        help="torch: the release's own names and layouts, from a converted checkpoint.",
    ),
    click.option("--variants", help="Several outputs from one read, such as bf16,8bit,4bit,mxfp4."),
)

map_file = click.option(
    "--map-file",
    type=click.Path(path_type=Path),
    help="Your own map: a Python file that defines MAP. It is executed.",
)

adapter = click.option(
    "--adapter-path",
    type=click.Path(path_type=Path),
    help="LoRA or DoRA (PEFT's layout or mlx-lm's) that is fused into the release's weights.",
)

mapping = _all(
    click.option(
        "--map",
        "map_by",
        type=click.Choice(["runtime"]),
        help="runtime: let a stock runtime's own loader stand for a map that is not written yet.",
    ),
    map_file,
    click.option(
        "--model-file",
        type=click.Path(path_type=Path),
        help="MLX model code that the output brings along, for a type that no runtime has.",
    ),
    adapter,
    click.option(
        "--mtp",
        is_flag=True,
        help="Make a drafter of the release's multi-token-prediction layers, in OUT-mtp.",
    ),
)

output = _all(
    click.option("--mlx-path", type=click.Path(path_type=Path), help="Output folder."),
    click.option("--overwrite", is_flag=True, help="Replace a finished output."),
    click.option(
        "--shard",
        metavar="I/N",
        help="Make only this part of the output's shards, in a folder that other machines see; "
        "the command without it finishes the output.",
    ),
    click.option("--workers", type=click.IntRange(1, 256), help="Threads; default: one per core."),
    click.option("--quiet", is_flag=True, help="No progress, errors and results only."),
)

stream = click.option(
    "--stream",
    is_flag=True,
    help="Read the weights from the hub while converting, so that they never lie on this disk.",
)

card_template = click.option(
    "--card-template",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Your own Jinja2 model card.",
)

publishing = _all(
    click.option(
        "--upload-repo",
        is_flag=False,
        flag_value="",
        default=None,
        help="Publish; without a value the name is derived.",
    ),
    click.option("--private", is_flag=True, help="Create the repo as private."),
    click.option("--allow-gated", is_flag=True, help="Publish a conversion of a gated release."),
    click.option(
        "--allow-unproven",
        is_flag=True,
        help="Publish what no torch class could be found for; card and manifest say so.",
    ),
    card_template,
)

kv_cache = _all(
    click.option(
        "--kv-quant-scheme",
        type=click.Choice(["uniform", "turboquant", "auto"]),
        help="Study the KV cache and write settings into config.json; auto measures every layer.",
    ),
    click.option(
        "--kv-bits",
        type=float,
        help="Default 4. For auto the average over all layers, norms and scales included.",
    ),
    click.option("--kv-group-size", type=click.Choice(["32", "64", "128"]), help="For uniform."),
)

judging = _all(
    click.option(
        "--draft-for",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="The converted model that a drafter is judged beside.",
    ),
    click.option(
        "--kl-threshold", type=float, help="Fail when quantizing costs more mean KL than this."
    ),
    click.option(
        "--memory-limit",
        envvar="MLX_DAYZERO_MEMORY_LIMIT",
        metavar="SIZE",
        help="Validate block by block, with weights from the disk, what needs more than this, such "
        "as 6GiB; default: the memory that is available.",
    ),
)

proof = _all(
    judging,
    click.option("--no-validate", is_flag=True, help="Skip the parity report (no upload then)."),
)
