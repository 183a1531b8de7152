"""Make a twin: a tiny, complete checkpoint of a release's architecture, from its config alone."""

import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from validate.twin.errors import TwinError
from validate.twin.families import family_of
from validate.twin.family import Json
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
    deviation); sizes stay the twin's.  TwinError for an unknown architecture, a config transformers
    rejects, a dtype other than float32, bfloat16 or float16, or an ``out`` that holds files.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise TwinError(f"a twin cannot be made in {dtype!r}; choose one of {', '.join(DTYPES)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise TwinError(f"{out} is not empty; a twin is written to a new or empty folder")
    family = family_of(str(config.get("model_type")))
    shrunk, plan = shrink_config(config, family, sizes)
    _set_dtype(shrunk, dtype)
    model = _build(shrunk, dtype, seed)

    out.mkdir(parents=True, exist_ok=True)
    with _no_progress_bar():
        model.save_pretrained(out, max_shard_size=max_shard_size)
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
        parameters=sum(tensor.numel() for tensor in model.parameters()),
        weight_bytes=sum(file.stat().st_size for file in weights),
        sees_images=family.sees_images,
        seconds=time.perf_counter() - started,
    )


def _count_tensors(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        return len(opened.keys())


def _build(config: Json, dtype: str, seed: int) -> "PreTrainedModel":
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    model_type, architecture = config["model_type"], config["architectures"][0]
    model_class: Any = getattr(transformers, str(architecture), None)
    known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not known or model_type not in transformers.CONFIG_MAPPING:
        raise TwinError(
            f"transformers {transformers.__version__} has no {architecture} of type {model_type!r},"
            " so its twin cannot be built; models that bring their own code are not supported"
        )
    try:
        settings = transformers.CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(config))
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
    randomise(model, seed=seed)
    built: PreTrainedModel = model.to(getattr(torch, dtype)).eval()
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
