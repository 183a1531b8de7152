"""What a checkpoint declares about itself: which rows apply to it is decided from this alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from validate.cases import TEXT_FILES, load_cases
from validate.loaded import weight_dtypes
from validate.modalities import hears, sees
from validate.reference import read_config
from validate.runtime import is_generative, runtimes_for

PROCESSOR_FILES: Final = ("preprocessor_config.json", "processor_config.json")
"""Where a release says how pictures and sounds are prepared."""
_NARROW: Final = frozenset({"BF16", "F16", "U32"})
"""Dtype codes of weights with which a runtime computes in 16 bits; U32 holds packed codes."""


@dataclass(frozen=True, kw_only=True)
class Continued:
    """A plain prompt, and the tokens that torch wrote after it, greedily."""

    prompt: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    """What torch gave each of them, nats; none in reports of earlier versions."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The declarations of one checkpoint, and what else was handed to the run."""

    folder: Path
    config: Mapping[str, Any]
    runtimes: tuple[str, ...]
    """Stock runtimes that have a model for it."""
    template: str
    """The chat template, empty where there is none."""
    tokens: Mapping[str, int]
    """Added tokens by their text."""
    stop_ids: tuple[int, ...]
    """Ids at which generation has to stop, by generation_config.json, else by config.json."""
    computing: str
    """``float32`` where no weight is stored narrower, else ``16 bits``."""
    torch: Mapping[str, "Continued"] = field(default_factory=dict)
    """How torch went on with the plain prompts of the parity report, by the prompts' names."""
    lacks_processor: bool = False
    """No file says how media are prepared, though the release brought one, or may have."""
    drafter: Path | None = None
    image: Path | None = None
    """A picture of the user's, in place of the generated one."""

    @classmethod
    def read(
        cls, folder: Path, *, drafter: Path | None = None, image: Path | None = None
    ) -> "Facts":
        """The facts of a folder; ReferenceError when it has no readable config.json."""
        config = read_config(folder)
        return cls(
            folder=folder,
            config=config,
            runtimes=runtimes_for(config, folder),
            template=_template(folder),
            tokens=_added_tokens(folder),
            stop_ids=_stop_ids(config, _read(folder / "generation_config.json")),
            computing="16 bits" if set(weight_dtypes(folder)) & _NARROW else "float32",
            torch=_torch(_read(folder / "parity.json")),
            lacks_processor=_lacks_processor(folder),
            drafter=drafter,
            image=image,
        )

    @property
    def model_type(self) -> str:
        """The release's type."""
        return str(self.config.get("model_type"))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows."""
        return int(self.text_config.get("vocab_size") or self.config.get("vocab_size") or 1)

    @property
    def sees(self) -> bool:
        """Whether it takes pictures."""
        return sees(self.config)

    @property
    def hears(self) -> bool:
        """Whether it takes sounds."""
        return hears(self.config)

    @property
    def writes(self) -> bool:
        """Whether it writes text by itself: no encoder, and no drafter of another model."""
        drafts = "dflash_config" in self.config or "assistant" in self.model_type
        return is_generative(self.config) and not drafts

    @property
    def head_dim(self) -> int | None:
        """Width of an attention head, where the config says or implies it."""
        text = self.text_config
        if text.get("head_dim"):
            return int(text["head_dim"])
        if text.get("hidden_size") and text.get("num_attention_heads"):
            return int(text["hidden_size"]) // int(text["num_attention_heads"])
        return None


def _torch(report: Mapping[str, Any]) -> dict[str, Continued]:
    """From the rows ``greedy`` of a report; both runtimes were held against the same tokens."""
    prompts = {(c.modality, c.name): c.text for c in load_cases(*TEXT_FILES) if c.text}
    found = {}
    for check in report.get("checks") or ():
        for case in check["cases"] if check["name"] == "greedy" else ():
            text = prompts.get((check["modality"], case["name"]))
            tokens = case["metrics"].get("reference")
            if text and tokens:
                name = f"{check['modality']} {case['name']}"
                found[name] = Continued(
                    prompt=text,
                    tokens=tuple(map(int, tokens.split())),
                    logprobs=tuple(map(float, case["series"].get("logprob", ()))),
                )
    return found


def _lacks_processor(folder: Path) -> bool:
    if any((folder / name).is_file() for name in PROCESSOR_FILES):
        return False
    # A few releases bring none: the manifest of a conversion lists what there was.
    listed = _read(folder / "conversion.json").get("files")
    return listed is None or any(name in listed for name in PROCESSOR_FILES)


def _template(folder: Path) -> str:
    for name in ("chat_template.jinja", "chat_template.json"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    for name in ("processor_config.json", "tokenizer_config.json"):
        found = _read(folder / name).get("chat_template")
        if found:
            return found if isinstance(found, str) else json.dumps(found)
    return ""


def _added_tokens(folder: Path) -> dict[str, int]:
    added = _read(folder / "tokenizer.json").get("added_tokens") or ()
    return {str(token["content"]): int(token["id"]) for token in added}


def _stop_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    text = config.get("text_config")
    places = (generation, config, text if isinstance(text, Mapping) else {})
    for place in places:
        ids = place.get("eos_token_id")
        if ids is not None:
            return tuple(int(i) for i in (ids if isinstance(ids, list) else [ids]))
    return ()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return data if isinstance(data, dict) else {}
