"""The commands that convert, plan and judge."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from converter.cli.preflight import preflight
from converter.cli.proving import memory_limit, prove_and_publish, require_pass
from converter.cli.tools import write_text
from converter.errors import UsageError
from converter.execute.parts import Part
from converter.kv import KvAsked
from converter.manifest import read_manifest, verify
from converter.maps import MapChoice
from converter.memory import size_of
from converter.pipeline import Request, convert, plan_request
from converter.plan import Options
from converter.source.header import paused_gc
from converter.ui import Console, plan_tables, plan_width, size_text, verdict_text
from converter.variants import named_variant
from quant.calibrate.text import (
    DEFAULT_LENGTH,
    DEFAULT_SEQUENCES,
    Calibration,
    calibration_of,
)
from quant.recipe import CALIBRATED, QuantSpec

_CALIBRATION = ("calibration_data", "calibration_sequences", "calibration_length")


def convert_command(given: dict[str, Any]) -> None:
    """convert --hf-path ...: everything, in order."""
    memory_limit(given)  # a misspelt size is refused before hours of work
    if given["upload_repo"] is not None and given["no_validate"]:
        raise UsageError("--no-validate: nothing is uploaded without a passing report")
    console = Console(quiet=given["quiet"])
    _check_kv(given)
    request = request_from(given)
    checked = preflight(request, given, console)
    outputs = convert(request, console, planned=checked.planned)
    if request.part is not None:
        console.say(f"made: part {given['shard']}")
        return
    for output in outputs:
        console.say(f"converted: {output.folder}")
        if given["kv_quant_scheme"] is not None and output.target is None:
            _study_kv(output.folder, given, console)
    quantized = all(output.plan.decoding is not None for output in outputs)
    if not given["no_validate"] and (quantized or not _back(given)):
        given = {**given, "account": checked.account}
        prove_and_publish(outputs, given, console, request.thread_count)
    else:
        for output in outputs:
            click.echo(str(output.folder))


@paused_gc()
def plan_command(given: dict[str, Any]) -> None:
    """convert plan: show what would be done."""
    _check_kv(given)
    request = request_from({**given, "mlx_path": None, "overwrite": False})
    planned = plan_request(request, Console(quiet=given["as_json"]))
    if given["as_json"]:
        data = [plan.to_json() for plan in (*planned.plans, *planned.drafters)]
        click.echo(json.dumps(data[0] if len(data) == 1 else data, indent=1))
        return
    width = plan_width()
    for plan in (*planned.plans, *planned.drafters):
        click.echo(plan_tables(plan, workers=request.thread_count, width=width), nl=False)
    for line in planned.kv:
        click.echo(line)


def validate_command(given: dict[str, Any]) -> None:
    """convert validate: the parity report of an existing checkpoint."""
    from converter.adapter.output import reference_of_output
    from converter.maps import map_of_output
    from converter.proof import prove, prove_drafter
    from converter.release import fetch, open_release

    console = Console()
    out: Path = given["mlx_path"]
    if not out.is_dir():
        raise UsageError(f"--mlx-path {out}: no such folder")
    release = fetch(
        open_release(given["hf_path"], revision=given["revision"], gguf=given["gguf_file"])
    )
    if given["draft_for"] is not None:
        report = prove_drafter(out, target=given["draft_for"], console=console)
    else:
        trust = given["trust_remote_code"]
        arch = map_of_output(out, release.source, given["map_file"], trust_remote_code=trust)
        with reference_of_output(out, release, arch, given["adapter_path"]) as reference:
            report = prove(
                out,
                source=reference,
                console=console,
                kl_threshold=given["kl_threshold"],
                trust_remote_code=trust,
                arch=arch,
                memory_limit=memory_limit(given),
            )
    if given["as_json"]:
        click.echo(json.dumps(report, indent=1))
    else:
        click.echo(verdict_text(report, out))
    require_pass(report, out)


def kv_command(out: Path, given: dict[str, Any]) -> None:
    """convert kv: settings for the KV cache of a finished output."""
    from converter.publish import write_card

    scheme = given["kv_quant_scheme"] or "auto"
    given = {**given, "kv_quant_scheme": scheme, "quiet": given["as_json"]}
    _check_kv(given)
    report = _study_kv(out, given, Console(quiet=given["quiet"]))
    if (out / "README.md").is_file():
        write_card(out, repo_id=read_manifest(out).card_of)
    if given["as_json"]:
        click.echo(json.dumps(report, indent=1))


def compare_command(outputs: tuple[Path, ...], given: dict[str, Any]) -> None:
    """convert compare: outputs of one release side by side."""
    from converter.comparing import Comparison, compare, record_comparison
    from validate.checks import finite
    from validate.compare_report import comparison_html, print_comparison

    report = compare(
        Comparison(
            outputs=outputs,
            hf_path=given["hf_path"],
            revision=given["revision"],
            gguf=given["gguf_file"],
            text=given["text"],
            length=given["length"],
            windows=given["windows"],
            adapter_path=given["adapter_path"],
            trust_remote_code=given["trust_remote_code"],
        ),
        Console(quiet=given["as_json"]),
    )
    if given["as_json"]:
        click.echo(json.dumps(finite(report), indent=1))
    else:
        print_comparison(report)
    if given["html"] is not None:
        try:
            write_text(given["html"], comparison_html(report), flag="--html")
        except OSError as error:
            raise UsageError(f"--html {given['html']}: {error.strerror}") from error
    if given["record"]:
        record_comparison(outputs, report)


def verify_command(out: Path) -> None:
    """convert verify: every file against the manifest."""
    count, size = verify(out)
    click.echo(f"{out}: {count} files, {size_text(size)}, all as the manifest says")


def request_from(given: dict[str, Any]) -> Request:
    """The request that a command line makes; raises UsageError for contradictions."""
    return Request(
        hf_path=given["hf_path"],
        mlx_path=given["mlx_path"],
        revision=given["revision"],
        gguf=given["gguf_file"],
        recipes=tuple(_recipes(given)),
        dequantize=given["dequantize"],
        overwrite=given["overwrite"],
        keep_judged=_publishes(given),
        workers=given.get("workers"),
        calibration_data=given["calibration_data"],
        trust_remote_code=given["trust_remote_code"],
        maps=MapChoice(
            runtime=given["map_by"] == "runtime",
            file=given["map_file"],
            model_file=given["model_file"],
        ),
        adapter_path=given["adapter_path"],
        mtp=given["mtp"],
        kv=_kv_asked(given),
        part=None if given.get("shard") is None else _part(given),
        stream=bool(given.get("stream")),
        command=command_text(sys.argv[1:]),
    )


def _publishes(given: dict[str, Any]) -> bool:
    """Whether there is a card or an upload to make, for which finished outputs are gone on with."""
    carded = given.get("card_template") is not None
    return given.get("upload_repo") is not None or (
        carded and not given.get("no_validate") and not _back(given)
    )


def _part(given: dict[str, Any]) -> Part:
    """The part that --shard names; UsageError for flags that are about the whole output."""
    whole = [f"--{n.replace('_', '-')}" for n in ("upload_repo", "kv_quant_scheme") if given[n]]
    if whole or given["upload_repo"] == "":
        raise UsageError(
            f"--shard: {(*whole, '--upload-repo')[0]} is for the command that finishes the output"
        )
    return Part.parse(given["shard"])


def command_text(arguments: Sequence[str]) -> str:
    """The command as it is recorded and published: folders by their names, not their paths."""
    named = [Path(word).name if os.path.isabs(word) else word for word in arguments]
    return shlex.join(["convert", *(word for word in named if word)])


def _check_kv(given: dict[str, Any]) -> None:
    from converter.kv import check_flags, check_text

    group = given["kv_group_size"]
    check_flags(given["kv_quant_scheme"], given["kv_bits"], int(group) if group else None)
    if given["kv_quant_scheme"] and given.get("target") == "torch":
        raise UsageError("--kv-quant-scheme: a torch checkpoint has no MLX cache")
    if given["kv_quant_scheme"]:
        check_text(given["calibration_data"])


def _kv_asked(given: dict[str, Any]) -> KvAsked | None:
    if given.get("kv_quant_scheme") is None:
        return None
    group = given["kv_group_size"]
    return KvAsked(
        scheme=given["kv_quant_scheme"],
        bits=given["kv_bits"],
        group=int(group) if group else None,
    )


def _study_kv(out: Path, given: dict[str, Any], console: Console) -> dict[str, Any]:
    from converter.kv import study_output, summary_text

    console.say(f"kv cache: {out}")
    group = given["kv_group_size"]
    report = study_output(
        out,
        scheme=given["kv_quant_scheme"],
        bits=given["kv_bits"],
        group=int(group) if group else None,
        text=given["calibration_data"],
        console=console,
        trust_remote_code=given["trust_remote_code"],
    )
    console.say(summary_text(report))
    return report


def _back(given: dict[str, Any]) -> bool:
    return bool(given["dequantize"]) or given["target"] == "torch"


def _recipes(given: dict[str, Any]) -> list[Options]:
    try:
        if given["variants"] is not None:
            return _variants(given)
        target = _target(given)
        quantize = given["quantize"] or bool(given["quant_predicate"]) or bool(target)
        if not quantize and (named := _quantizing(given)):
            raise UsageError(f"{named[0]}: has no effect without -q")
        if quantize and given["dequantize"]:
            raise UsageError("-q and -d contradict each other")
        quant = None
        if quantize:
            quant = QuantSpec.make(
                given["q_mode"], given["q_bits"], given["q_group_size"], given["q_method"]
            )
        return [
            Options(
                dtype=given["dtype"],
                quant=quant,
                predicate=given["quant_predicate"],
                target=given["target"],
                dequantize=given["dequantize"],
                calibration=_calibration(given, quant, target=bool(target)),
                iterations=given["tuning_iterations"],
                rotate_values=given["kv_rotate_values"],
                **target,
            )
        ]
    except ValueError as error:
        raise UsageError(str(error)) from error


def _quantized(given: dict[str, Any], quant: QuantSpec) -> Options:
    return Options(
        dtype=given["dtype"],
        quant=quant,
        calibration=_calibration(given, quant),
        iterations=given["tuning_iterations"],
        rotate_values=given["kv_rotate_values"],
    )


def _target(given: dict[str, Any]) -> dict[str, Any]:
    """What the flags say about a size to choose formats for; nothing where they ask for none."""
    if given["q_target_bpw"] is None and given["q_target_size"] is None:
        return {}
    own = [f for f in _quantizing(given) if f in ("--q-bits", "--q-mode")]
    own += ["--quant-predicate"] if given["quant_predicate"] else []
    if own:
        raise UsageError(f"{own[0]}: --q-target-bpw and --q-target-size choose it themselves")
    size = (
        None
        if given["q_target_size"] is None
        else size_of(given["q_target_size"], "--q-target-size")
    )
    return {
        "target_bits": given["q_target_bpw"],
        "target_bytes": size,
        "target_group_size": given["q_group_size"],
    }


def _calibration(
    given: dict[str, Any], quant: QuantSpec | None, *, target: bool = False
) -> Calibration | None:
    """What the flags say about calibration text, None where nothing needs any.

    A ``target`` takes text for its own sake, where it is given.
    """
    asked = target and any(given[name] is not None for name in _CALIBRATION)
    if quant is None or (quant.method not in CALIBRATED and not asked):
        if named := [f"--{n.replace('_', '-')}" for n in _idle(given) if given[n] is not None]:
            raise UsageError(
                f"{named[0]}: has no effect without --q-method imatrix, gptq or autoround"
            )
        return None
    return calibration_of(
        given["calibration_data"],
        sequences=given["calibration_sequences"] or DEFAULT_SEQUENCES,
        length=given["calibration_length"] or DEFAULT_LENGTH,
    )


def _idle(given: dict[str, Any]) -> list[str]:
    """The flags about calibration, but for a text that caches are measured on."""
    studied = given.get("kv_quant_scheme") is not None
    return [name for name in _CALIBRATION if not studied or name != "calibration_data"]


def _quantizing(given: dict[str, Any]) -> list[str]:
    """The flags that only say how to quantize, where they are not at their defaults."""
    defaults = {
        "q_bits": None,
        "q_group_size": None,
        "q_mode": "affine",
        "q_method": "rtn",
        "tuning_iterations": None,
        **dict.fromkeys(_idle(given)),
    }
    return [
        f"--{name.replace('_', '-')}" for name, value in defaults.items() if given[name] != value
    ]


def _variants(given: dict[str, Any]) -> list[Options]:
    own = [flag for flag in _quantizing(given) if flag in ("--q-bits", "--q-mode")]
    own += ["-q"] if given["quantize"] else []
    own += ["--quant-predicate"] if given["quant_predicate"] else []
    own += ["-d"] if given["dequantize"] else []
    own += ["--q-target-bpw"] if given["q_target_bpw"] is not None else []
    own += ["--q-target-size"] if given["q_target_size"] is not None else []
    own += ["--to"] if given["target"] != "mlx" else []
    if own:
        raise UsageError(f"--variants names its own quantization; leave {', '.join(own)} out")
    recipes = []
    for name in given["variants"].split(","):
        try:
            dtype, quant = named_variant(
                name.strip(), group_size=given["q_group_size"], method=given["q_method"]
            )
        except ValueError as error:
            raise UsageError(f"--variants: {error}") from error
        if quant is None:
            turned = given["kv_rotate_values"]
            recipes.append(Options(dtype=dtype, dequantize=True, rotate_values=turned))
        else:
            recipes.append(_quantized(given, quant))
    if all(options.calibration is None for options in recipes):
        _calibration(given, None)
        if given["tuning_iterations"] is not None:
            raise UsageError("--tuning-iterations: has no effect without --q-method autoround")
    return recipes
