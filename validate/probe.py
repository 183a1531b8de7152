"""The parameters that a runtime's model would have under another config, weights aside."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from arch_maps.ops import Shape
from validate.runtime import RuntimeRefusal, prepare_mlx
from validate.unfilled import unfilled


def parameter_shapes(config: Mapping[str, Any], *, runtime: str) -> dict[str, Shape]:
    """Shape of each parameter by path; RuntimeRefusal where the model cannot be built.

    MLX makes no array before it is used, so a model of any size costs only its names.
    """
    prepare_mlx()
    from mlx.utils import tree_flatten

    settings = copy.deepcopy(dict(config))
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), unfilled():
            model = _lm(settings) if runtime == "mlx_lm" else _vlm(settings)
        arrays: dict[str, Any] = dict(tree_flatten(model.parameters()))
        return {path: tuple(array.shape) for path, array in arrays.items()}
    except Exception as error:  # whatever the runtime's constructor makes of a strange config
        raise RuntimeRefusal(f"{runtime}: {type(error).__name__}: {error}") from error
    finally:
        logging.disable(logging.NOTSET)


def defaults_of(config: Mapping[str, Any], *, runtime: str) -> dict[str, Any]:
    """What the runtime's config class fills in, by dotted name, where config.json is silent."""
    prepare_mlx()
    found: dict[str, Any] = {}
    classes = _config_classes(dict(config), runtime)
    for section, cls in classes.items():
        nested = config.get(section) if section else config
        stated = nested if isinstance(nested, Mapping) else {}
        for name, value in vars(cls()).items() if _default_constructible(cls) else ():
            plain = isinstance(value, bool | int | float | str) or value is None
            if plain and name not in stated and not name.startswith("_"):
                found[f"{section}.{name}".lstrip(".")] = value
        for name, declared in getattr(cls, "__dataclass_fields__", {}).items():
            default = declared.default
            plain = isinstance(default, bool | int | float | str)
            if plain and name not in stated:
                found.setdefault(f"{section}.{name}".lstrip("."), default)
    return found


def _default_constructible(cls: Any) -> bool:
    with contextlib.suppress(Exception):
        cls()
        return True
    return False


def _config_classes(config: dict[str, Any], runtime: str) -> dict[str, Any]:
    if runtime == "mlx_lm":
        from mlx_lm.utils import _get_classes

        return {"": _get_classes(config)[1]}
    from mlx_vlm.utils import get_model_and_args

    package, _ = get_model_and_args(config)
    names = {"": "ModelConfig", "text_config": "TextConfig", "vision_config": "VisionConfig"}
    found = {section: getattr(package, name, None) for section, name in names.items()}
    present = {"", *(name for name in names if isinstance(config.get(name), Mapping))}
    return {section: cls for section, cls in found.items() if cls and section in present}


def _lm(config: dict[str, Any]) -> Any:
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(config)
    return model_class(arguments.from_dict(config))


def _vlm(config: dict[str, Any]) -> Any:
    utils: Any = import_module("mlx_vlm.utils")
    package, _ = utils.get_model_and_args(config)
    for section in ("text_config", "vision_config", "audio_config"):
        config.setdefault(section, {})
    settings = package.ModelConfig.from_dict(config)
    parts = ["text", "vision", "perceiver", "projector", "audio"]
    return package.Model(utils.update_module_configs(settings, package, config, parts))
