"""Make a twin: a tiny, complete checkpoint of a release's architecture, from its config alone."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from arch_maps.registry import map_name
from validate.stand_ins import stand_in
from validate.torch_faults import mend
from validate.twin.errors import TwinError
from validate.twin.families import family_of
from validate.twin.family import Json
from validate.twin.mapped import mapped_weights
from validate.twin.randomise import randomise
from validate.twin.shrink import DEFAULT_SIZES, Sizes, shrink_config
from validate.twin.tokenizer import write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES: Final = ("float32", "bfloat16", "float16")
DTYPE_FIELDS: Final = ("dtype", "torch_dtype")


@dataclass(frozen=True, kw_only=True)
class TwinInfo:
    """What was written: sizes in elements and bytes of weights, seconds of wall clock."""

    path: Path
    model_type: str
    architecture: str
    config: Json
    tensors: int
    parameters: int
    weight_bytes: int
    sees_images: bool
    from_map: bool
    """Named and shaped by the map, because transformers has no class of this architecture."""
    seconds: float


def twin_from(
    source: str | Path,
    out: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str = "5GB",
    sizes: Sizes = DEFAULT_SIZES,
) -> TwinInfo:
    """The twin of a folder's config.json; of its other files only the processor's facts are read.

    TwinError when the folder has no readable config.json, and as :func:`make_twin`.
    """
    folder = Path(source)
    config = _read_json(folder / "config.json")
    return make_twin(
        config,
        out,
        dtype=dtype,
        seed=seed,
        processor_source=folder,
        max_shard_size=max_shard_size,
        sizes=sizes,
    )


def make_twin(
    config: Json,
    out: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    processor_source: Path | None = None,
    max_shard_size: str = "5GB",
    sizes: Sizes = DEFAULT_SIZES,
) -> TwinInfo:
    """Write the twin of ``config`` to the new or empty folder ``out``; same arguments, same bytes.

    ``processor_source`` is a folder whose processor files lend the facts that a twin keeps (mean,
    deviation); sizes stay the twin's.  An architecture that transformers lacks is made from its
    map.  TwinError for one that has no map either, a config transformers rejects, a dtype other
    than float32, bfloat16 or float16, or an ``out`` that holds files.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise TwinError(f"a twin cannot be made in {dtype!r}; choose one of {', '.join(DTYPES)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise TwinError(f"{out} is not empty; a twin is written to a new or empty folder")
    family = family_of(str(map_name(config)))
    shrunk, plan = shrink_config(config, family, sizes)
    _set_dtype(shrunk, dtype)
    from_map = not _has_class(shrunk)
    make = _from_map if from_map or family.by_map else _from_class
    save, parameters = make(shrunk, dtype, seed)

    out.mkdir(parents=True, exist_ok=True)
    save(out, max_shard_size)
    # The source's spelling, not the one transformers would write: the config map must read it.
    _write_json(out / "config.json", shrunk)
    write_tokenizer(out, plan, family, vocab_size=sizes.vocab)
    for name, settings in family.processor(shrunk).items():
        facts = _facts(processor_source, name)
        _write_json(out / name, facts | settings)
    (out / "generation_config.json").unlink(missing_ok=True)
    if family.stop_tokens:
        stop = [plan.id_of(token) for token in family.stop_tokens]
        ids: Json = {"eos_token_id": stop, "pad_token_id": plan.id_of("<|endoftext|>")}
        _write_json(out / "generation_config.json", {"do_sample": False, **ids})

    weights = sorted(out.glob("*.safetensors"))
    return TwinInfo(
        path=out,
        model_type=shrunk["model_type"],
        architecture=shrunk["architectures"][0],
        config=shrunk,
        tensors=sum(_count_tensors(file) for file in weights),
        parameters=parameters,
        weight_bytes=sum(file.stat().st_size for file in weights),
        sees_images=family.sees_images,
        from_map=from_map,
        seconds=time.perf_counter() - started,
    )


def _count_tensors(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        return len(opened.keys())


def _has_class(config: Json) -> bool:
    """Whether transformers itself has the architecture; code of a release's own does not count."""
    import transformers

    other = stand_in(config)
    name = other.architecture if other else str(config["architectures"][0])
    model_class: Any = getattr(transformers, name, None)
    return isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)


Save = Callable[[Path, str], None]
"""Writes the weights to a folder in shards of at most that size."""


def _from_class(config: Json, dtype: str, seed: int) -> tuple[Save, int]:
    """The weights of transformers' own model, and how many parameters they are."""
    model = _build(config, dtype, seed)

    def save(out: Path, max_shard_size: str) -> None:
        with _no_progress_bar():
            model.save_pretrained(out, max_shard_size=max_shard_size)

    return save, sum(tensor.numel() for tensor in model.parameters())


def _from_map(config: Json, dtype: str, seed: int) -> tuple[Save, int]:
    """The weights that the map asks for, and how many parameters they are."""
    import torch
    import transformers
    from huggingface_hub import save_torch_state_dict

    try:
        drawn = mapped_weights(config, seed=seed)
    except TwinError as error:
        raise TwinError(
            f"transformers {transformers.__version__} has no {config['architectures'][0]} of type "
            f"{config['model_type']!r} to make a twin with, so it is made from the map: {error}"
        ) from error
    weights = {name: value.to(getattr(torch, dtype)) for name, value in drawn.items()}

    def save(out: Path, max_shard_size: str) -> None:
        facts = {"format": "pt"}
        save_torch_state_dict(weights, out, max_shard_size=max_shard_size, metadata=facts)

    return save, sum(value.numel() for value in weights.values())


def _build(config: Json, dtype: str, seed: int) -> "PreTrainedModel":
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    model_type, architecture = config["model_type"], config["architectures"][0]
    model_class: Any = getattr(transformers, architecture)
    mend(str(model_type))
    try:
        # Some releases run known code under a type of their own; saving goes by the class's type.
        known = model_class.config_class
        named = {**copy.deepcopy(config), "model_type": known.model_type}
        settings = known.from_dict(named)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(settings)
    except (
        *(AttributeError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError),
        StrictDataclassError,
    ) as error:
        raise TwinError(
            f"transformers {transformers.__version__} cannot build a {architecture} from the "
            f"shrunk config; the family of {model_type!r} must adjust what is named here: {error}"
        ) from error
    randomise(model, seed=seed, gains=family_of(str(model_type)).gains)
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():  # some towers hold complex rotations
            value.data = value.data.to(getattr(torch, dtype))
    built: PreTrainedModel = model.eval()
    return built


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Silence transformers' bar: a twin is written in less time than it takes to draw one."""
    import transformers

    logging: Any = transformers.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _set_dtype(config: Json, dtype: str) -> None:
    """Name ``dtype`` wherever the source names one, and at the top in any case."""
    for value in config.values():
        if isinstance(value, dict) and any(name in value for name in DTYPE_FIELDS):
            _set_dtype(value, dtype)
    present = [name for name in DTYPE_FIELDS if name in config]
    for name in present or DTYPE_FIELDS[:1]:
        config[name] = dtype


def _facts(folder: Path | None, name: str) -> Json:
    if folder is None or not (folder / name).is_file():
        return {}
    return _read_json(folder / name)


def _read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TwinError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TwinError(f"{path} holds no JSON object")
    return value


def _write_json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
