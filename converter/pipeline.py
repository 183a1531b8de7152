"""The conversion as its steps: open, plan, fetch, execute, finish, prove, publish."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from arch_maps.config import stored_dtype
from arch_maps.ops import RowReader, sources
from arch_maps.registry import ArchMap
from converter.adapter import fuse, read_adapter
from converter.adapter.torch_folder import fused_folder
from converter.allocate import require_reachable
from converter.allocating import allocated
from converter.calibrated import statistics_of
from converter.decode import DecodingReader, decoded
from converter.earlier import earlier_outputs
from converter.errors import PlanError, UsageError
from converter.execute import CheckedReader, Job, execute
from converter.execute.folder import (
    explain,
    locked,
    publish,
    sharing,
    sync_tree,
    work_folder,
)
from converter.execute.journal import NAME as JOURNAL
from converter.execute.parts import (
    forget,
    forget_parts,
    outputs_of,
    record,
    recorded,
)
from converter.kv import check_planned
from converter.manifest import read_manifest, write_manifest
from converter.maps import MapChoice, choose_map, load_map
from converter.mtp import drafter_folder, plan_drafter
from converter.naming import output_name
from converter.plan import Plan, build_plan
from converter.plan.back import build_back_plan
from converter.plan.match import match_release
from converter.plan.rotate import FLAG as ROTATE
from converter.recorded import kept_facts, recorded_plan
from converter.refusals import (
    require_memory,
    require_place,
    require_plain,
    require_quantized,
    require_separable,
    require_space,
    require_streamable,
    require_written_map,
)
from converter.release import Release, fetch, open_release
from converter.request import Converted, Planned, Request
from converter.runtime_map import check_reload
from converter.sidecars import copy_sidecars, made_files, write_json
from converter.source import Reader, Source
from converter.ui import Console

__all__ = ["Converted", "Planned", "Request", "convert", "output_folders", "plan_request"]


def plan_request(
    request: Request,
    console: Console | None = None,
    *,
    release: Release | None = None,
    measure: bool = True,
    going_on: bool = False,
) -> Planned:
    """Decide everything from headers; raises PlanError with every problem.

    Only a recipe with a target size reads weights, and says so on ``console``; unless they are to
    ``measure``, its plan is a draft with one format for all. ``going_on`` with what earlier runs
    made, formats that a finished output has by the same draft are taken from there, and an output
    that is in the way is refused now. ``release`` is what the request names, where its headers have
    been read already.
    """
    torch = any(recipe.target == "torch" for recipe in request.recipes)
    back = request.dequantize or torch
    release = release or open_release(
        request.hf_path,
        revision=request.revision,
        allow_mlx=back,
        cache=request.cache,
        gguf=request.gguf,
    )
    if request.stream:
        require_streamable(request, release)
    if release.source.mlx is None and back:
        require_quantized(release, torch=torch)
        back = False
    view = decoded(release.source, arch=_stated_map(release.source, request.maps))
    source = view.source
    arch = choose_map(source, request.maps)
    plans: list[Plan] = []
    drafts: dict[str, Plan] = {}
    fusion = None
    if back and request.adapter_path is not None:
        raise UsageError("--adapter-path is fused into a torch release: leave -d and --to out")
    if back:
        require_written_map(release, request.maps)
        if any(options.rotate_values for options in request.recipes):
            raise UsageError(f"{ROTATE}: starts from a torch release, not from an MLX checkpoint")
        kept = kept_facts(release)
        for options in request.recipes:
            asked = replace(options, dequantize=False)  # which is what this plan does anyway
            if options.target == "mlx":  # the weights stay as they are
                asked = replace(asked, rotate_values=kept.get("rotated", False))
            plans.append(build_back_plan(source, arch, asked, origin=release.origin, **kept))
    else:
        match = match_release(source, arch)
        origin = release.origin
        require_plain(request, view)
        if request.adapter_path is not None:
            adapter = read_adapter(request.adapter_path)
            fusion = fuse(source, match, adapter, origin=origin, name=release.name)
            source, origin = fusion.source, {**origin, "adapter": adapter.record()}
            release = replace(release, name=f"{release.name}-{adapter.name}")
        for options in request.recipes:
            given_up = options.dequantize and view.settings is not None
            options = replace(options, dequantize=given_up)
            plan = build_plan(source, match, options, origin=origin, view=view)
            plans.append(plan)
            if options.targeted:
                require_reachable(plan)
        console = console or Console(quiet=True)
        targeted = [at for at, plan in enumerate(plans) if measure and plan.options.targeted]
        if targeted and going_on:
            drafted = Planned(
                release=release, source=source, plans=tuple(plans), view=view, arch=arch
            )
            folders = output_folders(request, drafted)
            build = partial(build_plan, source, match, origin=origin, view=view)
            for at in tuple(targeted):
                plan, out = plans[at], folders[at]
                found = recorded_plan(plan, out, release.content(), build)
                if found is None or request.overwrite:
                    require_place(request, out, release)
                    continue
                console.say(f"allocation: {out} has the formats for this target already")
                drafts[plan.hash], plans[at] = plan, found
                targeted.remove(at)
        require_memory([plans[at] for at in targeted])  # before hours of choosing formats
        for at in targeted:
            with console.progress("download", unit="bytes") as tick:
                release = fetch(release, progress=tick)
            source = replace(source, root=release.source.root, files=release.source.files)
            options = allocated(
                plans[at],
                release,
                fusion,
                data=request.calibration_data,
                console=console,
                workers=request.thread_count,
                trust_remote_code=request.trust_remote_code,
            )
            chosen = build_plan(source, match, options, origin=origin, view=view)
            drafts[plans[at].hash] = plans[at]
            plans[at] = replace(chosen, draft=plans[at].hash)
        if not request.maps.written:
            for plan in plans:
                check_reload(plan, arch.runtimes[:1], model_file=request.maps.model_file)
    if request.mtp and back:
        raise UsageError("--mtp takes a drafter out of a torch release: leave -d and --to out")
    return Planned(
        release=release,
        source=source,
        plans=tuple(plans),
        view=view,
        arch=arch,
        fusion=fusion,
        kv=(
            tuple(check_planned(plans[0], request.kv, model_file=request.maps.model_file))
            if request.kv is not None
            else ()
        ),
        drafters=tuple(
            plan_drafter(source, plan, draft=drafts.get(plan.draft), origin=release.origin)
            for plan in (plans if request.mtp else ())
        ),
    )


def output_folders(request: Request, planned: Planned) -> list[Path]:
    """Where each plan's output goes; raises UsageError when two would share a folder."""
    dtype = stored_dtype(planned.source.config)
    name = planned.release.name
    names = [output_name(name, p.options, dtype=dtype, kept=p.kept) for p in planned.plans]
    if request.mlx_path is not None and request.names:
        folders = [request.mlx_path / name for name in request.names]
    elif request.mlx_path is None:
        folders = [Path(name) for name in names]
    elif len(names) == 1:
        folders = [request.mlx_path]
    else:
        folders = [request.mlx_path / name for name in names]
    if len(set(folders)) != len(folders):
        raise UsageError("--variants: two of them are the same; name each one once")
    return folders


def convert(
    request: Request, console: Console, *, planned: Planned | None = None
) -> list[Converted]:
    """Plan, fetch, execute and finish; the outputs are whole when this returns.

    ``planned`` is what plan_request gave for this request, where that was asked before.

    A request for one part makes its shards and finishes nothing: the result is empty, and the
    same request without ``part`` makes what is left and the outputs of it.
    """
    if request.part is not None:
        require_separable(request)
    planned = planned or plan_request(request, console, going_on=True)
    targets = output_folders(request, planned)
    drafters = [drafter_folder(out) for out in targets] if planned.drafters else []
    plans, folders = (*planned.plans, *planned.drafters), [*targets, *drafters]
    done = earlier_outputs(
        plans,
        folders,
        release=planned.release,
        overwrite=request.overwrite,
        keep_judged=request.keep_judged,
        studied=request.kv is not None,
    )
    for out, finished in zip(folders, done, strict=True):
        if finished is None:
            require_place(request, out, planned.release)
            with explain(out):
                out.parent.mkdir(parents=True, exist_ok=True)
        else:
            console.say(f"{out}: is finished already, by the same plan")
    require_memory([plan for plan, made in zip(plans, done, strict=True) if made is None])
    console.planned(plans, folders)
    for line in planned.kv:
        console.say(line)
    with console.progress("download", unit="bytes") as tick:
        release = fetch(
            planned.release,
            weights=_files_read(request, planned),
            stream=request.stream,
            progress=tick,
        )
    source = _relocated(planned, release)
    todo = [
        (plan, out)
        for plan, out, finished in zip(plans, folders, done, strict=True)
        if finished is None
    ]
    if todo:
        require_space(todo)
        made_files(release.local(), release.sidecars)  # fails now, not once the weights are written
        with release.source.open() as reader:  # which knows in the second pass what is vouched for
            for group in (targets, drafters):  # each is one pass over its own tensors
                members = [(plan, out) for plan, out in todo if out in group]
                if members:
                    _execute_all(request, console, planned, release, source, reader, members)
    if request.part is not None:
        return []
    beside = [*([None] * len(targets)), *(targets if drafters else [])]
    return [
        Converted(
            plan=plan,
            manifest=read_manifest(out),
            folder=out,
            release=release,
            arch=planned.arch,
            target=target,
            fusion=planned.fusion,
            reused=before is not None,
        )
        for plan, out, target, before in zip(plans, folders, beside, done, strict=True)
    ]


def _files_read(request: Request, planned: Planned) -> set[str] | None:
    """The weight files that a part reads; None where all are, or where that is not known."""
    if request.part is None or planned.view.coded or planned.fusion is not None:
        return None
    files = planned.source.tensors
    return {
        files[leaf.name].file
        for plan in planned.plans
        for out in outputs_of(plan, request.part.shards(plan))
        for leaf in sources(out.expr)
    }


def _execute_all(
    request: Request,
    console: Console,
    planned: Planned,
    release: Release,
    source: Source,
    reader: Reader,
    todo: Sequence[tuple[Plan, Path]],
) -> None:
    from contextlib import ExitStack

    fused: AbstractContextManager[Path | None] = nullcontext()
    if planned.fusion is not None and any(plan.options.calibration for plan, _ in todo):
        beside, workers = todo[0][1], request.thread_count
        fused = fused_folder(release, planned.fusion, beside=beside, workers=workers)
    with fused as folder:
        statistics = [
            statistics_of(
                plan,
                release,
                data=request.calibration_data,
                beside=out,
                console=console,
                trust_remote_code=request.trust_remote_code,
                folder=folder,
            )
            for plan, out in todo
        ]
    part, stamp = request.part, release.stamp()
    with ExitStack() as stack:
        jobs, known = [], []
        for (plan, out), calibrated in zip(todo, statistics, strict=True):
            work = work_folder(out, plan.hash)
            stack.enter_context(locked(work) if part is None else sharing(work, part.name))
            known.append(recorded(work, plan, stamp))
            shards = plan.shards if part is None else part.shards(plan)
            left = tuple(shard for shard in shards if shard.file not in known[-1])
            forget(work, {shard.file for shard in left})
            name = "" if part is None else part.name
            jobs.append(Job(plan, work, calibrated, shards=left, part=name))
        rows: RowReader = reader
        if planned.view.coded:
            rows = DecodingReader(reader, planned.view)
        if planned.fusion is not None:
            rows = stack.enter_context(planned.fusion.open(rows))
        try:
            with console.progress("convert", unit="units") as tick:
                digests = execute(
                    jobs,
                    source,
                    reader=rows,
                    stamp=stamp,
                    workers=request.thread_count,
                    progress=tick,
                    checked=reader if isinstance(reader, CheckedReader) else None,
                )
        except PlanError:
            for job in jobs:  # a damaged source: nothing of it is worth resuming
                if part is None:
                    shutil.rmtree(job.work, ignore_errors=True)
            raise
        for job, (plan, out), made, before in zip(jobs, todo, digests, known, strict=True):
            with explain(job.work):
                if part is not None:
                    whole = {**before, **made}
                    mine = {shard.file: whole[shard.file] for shard in part.shards(plan)}
                    record(job.work, part, plan, stamp, mine)
                    continue
                _finish(job.work, plan, release, request, {**before, **made})
                publish(job.work, out)


def _finish(
    work: Path, plan: Plan, release: Release, request: Request, digests: Mapping[str, str]
) -> None:
    """Everything but the weights, the manifest last; the work folder is an output afterwards."""
    from model_cards.metadata import repeatable

    write_json(work / "config.json", plan.config)
    write_json(work / "model.safetensors.index.json", plan.index())
    sidecars = copy_sidecars(release.local(), release.sidecars, work)
    own = request.maps.model_file if "model_file" in plan.config else None
    if own is not None:
        (work / own.name).write_bytes(own.read_bytes())
    write_manifest(
        work,
        plan,
        command=request.commands.get(plan.hash, request.command),
        source_config=release.source.config,
        source_card=repeatable(release.card()),
        content=release.content(),
        digests=digests,
        names=sorted(
            {
                "config.json",
                "model.safetensors.index.json",
                *sidecars,
                *([own.name] if own is not None else []),
            }
        ),
    )
    sync_tree(work)
    (work / JOURNAL).unlink()
    forget_parts(work)


def _relocated(planned: Planned, release: Release) -> Source:
    if release.root is None or planned.release.root is not None:
        return planned.source
    return replace(planned.source, root=release.source.root, files=release.source.files)


def _stated_map(source: Source, maps: MapChoice) -> ArchMap | None:
    """The user's own map, for schemes that need one to know shapes; None for the registry's."""
    return load_map(maps.file, source.config) if maps.file is not None else None
