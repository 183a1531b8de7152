"""Processors of the stock runtimes that are known to fail, told by what they say.

The model behind such a processor is judged with the pictures that the reference's processor made.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class ProcessorFault:
    """A runtime's processor that cannot prepare any picture of these types, and how it fails."""

    runtime: str
    model_types: tuple[str, ...]
    says: str
    """Words of the runtime's error by which the fault is known."""
    what: str


def processor_fault(runtime: str, *, model_type: str, error: str) -> ProcessorFault | None:
    """The documented fault of a runtime's processor that ``error`` shows; None for another."""
    for fault in PROCESSORS:
        ours = fault.runtime == runtime and model_type in fault.model_types
        if ours and fault.says in error:
            return fault
    return None


PROCESSORS: Final = (
    ProcessorFault(
        runtime="mlx_vlm",
        model_types=("llava",),
        says="ImagesKwargs.__init__() got an unexpected keyword argument 'padding'",
        what="mlx-vlm 0.7.10's processor passes the image processor settings of the text, which "
        "transformers 5 refuses",
    ),
)


OWN_TEMPLATES: Final = {
    ("mlx_vlm", "internvl_chat"): "mlx-vlm 0.7.10 writes conversations of this type by a template "
    "of its own, whatever the release brings: its prompts are not the release's",
}
"""(runtime, model_type) whose processor does not read the release's chat template, and what so."""
UNSPOKEN: Final = {
    ("mlx_vlm", "moondream3"): "mlx-vlm 0.7.10 hands a conversation of this type to transformers "
    "as bare text, which transformers refuses from 5.24 on: mlx_vlm.generate needs an earlier one",
}
"""(runtime, model_type) that may raise where a conversation is written, and what is so."""
