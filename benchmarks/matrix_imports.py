"""Imported once by the fork server, so that a twin costs seconds and not imports."""

import os

from validate.runtime import prepare_mlx

# A twin is whole; some of the runtimes' processors would ask the hub for another tokenizer first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
prepare_mlx()

import mlx_lm.utils  # noqa: E402, F401
import mlx_vlm.utils  # noqa: E402, F401
import numba  # noqa: E402, F401
import torch  # noqa: E402, F401
import transformers  # noqa: E402, F401
