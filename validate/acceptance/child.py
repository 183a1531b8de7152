"""Runs in a child process: the stock Python calls, as in the runtimes' own examples.

``python -m validate.acceptance.child REQUEST ANSWER``, both JSON files. The request names the
runtime, the folder and jobs; the answer holds what ``load``, ``generate`` and ``stream_generate``
gave for each, or the exception that they raised.
"""

import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

_FRAMES: Final = 8
_WORD: Final = "harbour"
Json = dict[str, Any]


def main() -> None:
    """Answer the request file named first into the file named second."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(answer_all(request)), encoding="utf-8")


def answer_all(request: Json) -> Json:
    """The answer to a whole request: load once, then every job."""
    talk = Vlm(request) if request["runtime"] == "mlx_vlm" else Lm(request)
    answer: Json = {"replies": {}, "prompt": _attempt(talk.prompt_facts)}
    for name, job in request["jobs"].items():
        answer["replies"][name] = _attempt(partial(talk.answer, job))
    return answer


def _attempt(call: Callable[[], Json]) -> Json:
    # Whatever a stock call raises is the finding.
    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


class Vlm:
    """mlx-vlm: ``load``, ``apply_chat_template``, ``generate``, ``stream_generate``."""

    def __init__(self, request: Json) -> None:
        self.stock: Any = import_module("mlx_vlm")
        self.prompts: Any = import_module("mlx_vlm.prompt_utils")
        self.model, self.processor = self.stock.load(request["folder"], request.get("adapter"))
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)

    def answer(self, job: Json) -> Json:
        """Streamed, or ``whole`` in one call, or twice through a feature cache (``cached``).

        With a ``limit`` the prompt is plain text, cut to so many tokens, without a template.
        """
        media, extra = self._media(job)
        options = {"max_tokens": job["max_tokens"], "temperature": 0.0, **media}
        if job.get("limit"):
            ids = self.tokenizer.encode(job["prompt"])[: job["limit"]]
            array: Any = import_module("mlx.core").array
            return self._stream("", {**options, "input_ids": array([ids])})
        prompt = self.prompts.apply_chat_template(
            self.processor,
            self.model.config,
            job["prompt"],
            num_images=len(media.get("image") or ()),
            num_audios=len(media.get("audio") or ()),
            **extra,
        )
        if job.get("whole"):
            done = self.stock.generate(self.model, self.processor, prompt, **options)
            return {"text": done.text, "finish": done.finish_reason}
        if job.get("cached"):
            return self._twice(prompt, options)
        return self._stream(prompt, options)

    def _media(self, job: Json) -> tuple[Json, Json]:
        """Media arguments, a video as the stock command line hands it over, and the template's."""
        media = {kind: job[kind] for kind in ("image", "audio") if job.get(kind)}
        if not job.get("video"):
            return media, {}
        resolve: Any = import_module("mlx_vlm.generate.video").resolve_video_inputs
        found = resolve(self.processor, job["video"], images=media.get("image"), max_frames=_FRAMES)
        if found.videos:
            return {**media, "video": found.videos, "fps": 2.0}, {"video": found.videos, "fps": 2.0}
        return {**media, "image": found.images}, {}

    def _stream(self, prompt: str, options: Json) -> Json:
        chunks = self.stock.stream_generate(self.model, self.processor, prompt, **options)
        return _collected(chunks, self.tokenizer)

    def _twice(self, prompt: str, options: Json) -> Json:
        cache = import_module("mlx_vlm.vision_cache").VisionFeatureCache()
        hits: list[bool] = []
        stock_get = cache.get

        def get(key: Any) -> Any:
            found = stock_get(key)
            hits.append(found is not None)
            return found

        cache.get = get
        first, second = (self._stream(prompt, {**options, "vision_cache": cache}) for _ in "12")
        encodes = any(hasattr(self.model, name) for name in ("encode_image", "encode_images"))
        return {**second, "first": first["text"], "hits": sum(hits), "encodes": encodes}

    def prompt_facts(self) -> Json:
        """What the runtime makes of the chat template and the stop tokens."""
        message = {"role": "user", "content": _WORD}
        rendered = self.prompts.apply_chat_template(self.processor, self.model.config, _WORD)
        stops = self.tokenizer.stopping_criteria.eos_token_ids
        return _prompt_facts(self.processor, self.tokenizer, message, rendered, stops)


class Lm:
    """mlx-lm: ``load``, ``generate``, ``stream_generate``."""

    def __init__(self, request: Json) -> None:
        self.stock: Any = import_module("mlx_lm")
        adapter = request.get("adapter")
        self.model, self.tokenizer = self.stock.load(request["folder"], adapter_path=adapter)

    def _prompt(self, text: str) -> Any:
        if not self.tokenizer.has_chat_template:
            return text
        message = {"role": "user", "content": text}
        return self.tokenizer.apply_chat_template([message], add_generation_prompt=True)

    def answer(self, job: Json) -> Json:
        """Streamed, or ``whole`` in one call; ``limit`` as for mlx-vlm."""
        prompt = self._prompt(job["prompt"])
        if job.get("limit"):
            prompt = self.tokenizer.encode(job["prompt"])[: job["limit"]]
        options = {"max_tokens": job["max_tokens"]}
        if job.get("whole"):
            return {"text": self.stock.generate(self.model, self.tokenizer, prompt, **options)}
        chunks = self.stock.stream_generate(self.model, self.tokenizer, prompt, **options)
        return _collected(chunks, self.tokenizer)

    def prompt_facts(self) -> Json:
        """What the runtime makes of the chat template and the stop tokens."""
        message = {"role": "user", "content": _WORD}
        rendered = _WORD
        if self.tokenizer.has_chat_template:
            rendered = self.tokenizer.apply_chat_template(
                [message], add_generation_prompt=True, tokenize=False
            )
        stops = self.tokenizer.eos_token_ids
        return _prompt_facts(self.tokenizer, self.tokenizer, message, rendered, stops)


def _collected(chunks: Iterable[Any], tokenizer: Any) -> Json:
    """A streamed answer: its text, its tokens, and how much each led the second choice."""
    mx: Any = import_module("mlx.core")
    text = ""
    steps: list[tuple[int, float, float]] = []
    last = None
    for chunk in chunks:
        text += chunk.text
        last = chunk
        if chunk.finish_reason is None or chunk.generation_tokens > len(steps):
            row = mx.sort(chunk.logprobs.astype(mx.float32).reshape(-1))
            logprob = float(chunk.logprobs.reshape(-1)[int(chunk.token)])
            steps.append((int(chunk.token), logprob, float(row[-1] - row[-2])))
    stopped = last is not None and last.finish_reason == "stop"
    return {
        "text": text,
        "steps": steps[:-1] if stopped and steps else steps,
        "finish": last.finish_reason if last is not None else "",
        "prompt_tokens": last.prompt_tokens if last is not None else 0,
        "completion_tokens": last.generation_tokens if last is not None else 0,
        "pieces": [str(list(tokenizer.decode([step[0]]).encode())) for step in steps],
        "so far": [
            tokenizer.decode([step[0] for step in steps[: count + 1]], skip_special_tokens=True)
            for count in range(len(steps))
        ],
    }


def _prompt_facts(processor: Any, tokenizer: Any, message: Json, rendered: str, stops: Any) -> Json:
    """The rendered prompt beside transformers' own, and the token that ends an answer."""
    # mlx-lm wraps the tokenizer of transformers.
    wrapped = type(tokenizer).__module__.startswith("mlx_lm")
    inner = tokenizer._tokenizer if wrapped else tokenizer
    facts: Json = {"word": _WORD, "rendered": rendered, "stops": sorted(int(i) for i in stops)}
    speaker = processor if getattr(processor, "chat_template", None) else inner
    if not getattr(speaker, "chat_template", None):
        return facts
    facts["expected"] = speaker.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=False
    )
    answered = [message, {"role": "assistant", "content": _WORD}]
    whole = speaker.apply_chat_template(answered, tokenize=False)
    special = set(inner.added_tokens_decoder)
    tail = inner.encode(whole[whole.rfind(_WORD) + len(_WORD) :], add_special_tokens=False)
    facts["turn_end"] = next((int(i) for i in tail if i in special), None)
    facts["names"] = {str(i): inner.decode([i]) for i in {*facts["stops"], *special}}
    return facts


if __name__ == "__main__":
    main()
