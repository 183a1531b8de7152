"""What every proof imports, loaded once in the server that children are forked from."""

import contextlib
import importlib

from validate.runtime import prepare_mlx

prepare_mlx()
for _name in (
    "converter.batch.work",
    "huggingface_hub",
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.generation",
    "mlx_lm",
    "mlx_vlm",
    "validate.parity",
    "validate.reference",
    "validate.report",
    "validate.twin",
    "quant.weights",
):
    with contextlib.suppress(Exception):  # a child that needs it will say what is wrong
        importlib.import_module(_name)
