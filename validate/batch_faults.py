"""What the stock runtimes do to rows that are padded in a batch, where their code says it."""

from typing import Final

_FAULTS: Final = (
    (
        ("mlx_lm", "mlx_vlm"),
        ("falcon_mamba", "jamba", "mamba", "recurrent_gemma"),
        "its recurrent layers take no mask, so that padding goes into their states",
    ),
    (
        ("mlx_lm",),
        ("olmo_hybrid",),
        "the states of its short convolutions end in the padding of shorter rows",
    ),
    (
        ("mlx_vlm",),
        ("llama4",),
        "its chunks of attention and its temperatures take all rows to be as long as the longest",
    ),
    (
        ("mlx_vlm",),
        ("qwen4_exp",),
        "while a row has padding, every token that is decoded attends to all before it, where the "
        "release has it attend to the chosen blocks",
    ),
)


def batch_fault(runtime: str, model_type: str) -> str:
    """Why rows with padding part in ``runtime``; "" where that is not known."""
    for runtimes, model_types, what in _FAULTS:
        if runtime in runtimes and model_type in model_types:
            return what
    return ""
