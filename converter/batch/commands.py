"""The command that makes one job's output by hand, as its manifest and card tell it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from converter.batch.orders import Order, Part
from converter.pipeline import Planned
from converter.plan import Options


def commands_of(order: Order, parts: Sequence[Part], planned: Planned) -> dict[str, str]:
    """The commands by plan; a drafter's is its output's, which makes both."""
    told = {}
    for at, (part, plan) in enumerate(zip(parts, planned.plans, strict=True)):
        given_up = plan.options.dequantize
        command = command_of(order.repo, order.commit, part, dequantize=given_up)
        for one in (plan, *planned.drafters[at : at + 1]):
            told[one.hash] = command
    return told


def command_of(repo: str, commit: str, part: Part, *, dequantize: bool) -> str:
    """The whole command for a job of a release, without anything that a watch list calls it.

    ``dequantize`` says whether the release has a quantization that the output gives up: -d is
    refused where there is none. An adapter and a text of one's own are told by their names, not
    by where they lie.
    """
    asked = part.asked
    words = ["convert", "--hf-path", repo, "--revision", commit, *_flags(asked.options)]
    words += ["--dequantize"] if dequantize else []
    if asked.options.calibration is not None and part.policy.calibration_data is not None:
        words += ["--calibration-data", Path(part.policy.calibration_data).name]
    if asked.adapter is not None:
        words += ["--adapter-path", str(asked.adapter["name"])]
    words += ["--mtp"] if asked.mtp else []
    return shlex.join(words)


def _flags(options: Options) -> Iterator[str]:
    """The flags that ask for these options, sizes at their defaults included."""
    if options.dtype is not None:
        yield from ("--dtype", options.dtype)
    quant = options.quant
    if quant is not None:
        if options.target_bytes is not None:
            yield from ("--q-target-size", str(options.target_bytes))
        elif options.target_bits is not None:
            yield from ("--q-target-bpw", str(options.target_bits))
        elif quant.mode == "affine":
            yield from ("--quantize", "--q-bits", str(quant.bits))
        else:
            yield from ("--quantize", "--q-mode", quant.mode)
        size = options.target_group_size if options.targeted else quant.group_size
        if size is not None and quant.mode == "affine":
            yield from ("--q-group-size", str(size))
        if quant.method != "rtn":
            yield from ("--q-method", quant.method)
    if options.predicate is not None:
        yield from ("--quant-predicate", options.predicate)
    if options.tuning is not None:
        yield from ("--tuning-iterations", str(options.tuning.iterations))
    if options.calibration is not None:
        yield from ("--calibration-sequences", str(options.calibration.sequences))
        yield from ("--calibration-length", str(options.calibration.length))
    if options.rotate_values:
        yield "--kv-rotate-values"
