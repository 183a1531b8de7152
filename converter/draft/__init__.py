"""``convert maps draft``: a first map of an unmapped release, from what a runtime's loader does."""

from __future__ import annotations

from dataclasses import dataclass

from arch_maps.facts import Facts
from arch_maps.rules import Drop
from converter.draft.groups import group
from converter.draft.near import nearest
from converter.draft.sizes import Sizes
from converter.draft.text import Sheet, file_text
from converter.runtime_map import described, runtime_config, trace_release
from converter.source import Source
from validate.probe import defaults_of


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafted file and what it could not say for sure."""

    model_type: str
    text: str
    dropped: tuple[Drop, ...]
    remarks: tuple[str, ...]


def draft(source: Source) -> Draft:
    """Draft the map of a release from its headers; PlanError where no loader can be followed."""
    loader = trace_release(source)
    config = runtime_config(dict(source.config), Facts(source.config))
    sizes = Sizes(config, loader.traced.runtime)
    grouped = group(loader.rules)
    remarks = [
        f"{'.'.join(filter(None, field))} could not be varied: sizes that hang on it are numbers"
        for field in sizes.unvaried
    ]
    remarks += [
        f"the runtime takes {name} = {value!r} where config.json is silent"
        for name, value in sorted(defaults_of(config, runtime=loader.traced.runtime).items())
    ]
    sheet = Sheet(
        model_type=str(source.config["model_type"]),
        config=source.config,
        grouped=grouped,
        drops=loader.drops,
        sizes=sizes,
        prefix="",
        runtimes=[name.replace("_", "-") for name in loader.read_by],
        title=loader.traced.title,
        near=nearest(loader.rules),
        remarks=remarks,
        **described(loader.rules),
    )
    return Draft(sheet.model_type, file_text(sheet), loader.drops, tuple(remarks))
