"""Imported once by the fork server, so that a twin costs seconds and not imports."""

from validate.runtime import prepare_mlx

prepare_mlx()

import mlx_lm.utils  # noqa: E402, F401
import mlx_vlm.utils  # noqa: E402, F401
import numba  # noqa: E402, F401
import torch  # noqa: E402, F401
import transformers  # noqa: E402, F401
