"""What rows share: the checkpoint's facts, media files, a folder, servers that stay warm."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from validate.acceptance.facts import Facts
from validate.acceptance.media import Media, make_media
from validate.acceptance.model import RowFailure
from validate.acceptance.process import Command
from validate.acceptance.replies import Reply, Sameness, Step, require_same
from validate.acceptance.server import Server
from validate.cases import bounded

QUESTION: Final = "What is in the picture, and what can be heard?"
"""Asked in every row that does not need several."""
TOKENS: Final = 16
"""Length of an answer."""
Json = dict[str, Any]
T = TypeVar("T")


class Bench:
    """The place where the rows of one checkpoint run; a context that ends what was started."""

    def __init__(self, facts: Facts, work: Path, *, limit_s: float = 600.0) -> None:
        self.facts = facts
        self.work = work
        self.limit_s = limit_s
        self.commands: list[str] = []
        """What was run for the row at hand."""
        self._stack = ExitStack()
        self._servers: dict[tuple[str, str], Server] = {}
        self._made: dict[str, Any] = {}

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    @cached_property
    def device(self) -> str:
        """What MLX computes on here, as it names it."""
        core: Any = import_module("mlx.core")
        return str(core.default_device())

    @cached_property
    def media(self) -> Media:
        """Files to look at and listen to."""
        return make_media(self.work, image=self.facts.image)

    def run(self, module: str, *words: str, settings: Mapping[str, str] | None = None) -> str:
        """What a stock program prints; the row names its command."""
        command = Command(module=module, arguments=words, settings=settings or {})
        self.commands.append(str(command))
        return command.run(cwd=self.work, limit_s=self.limit_s)

    def server(
        self,
        runtime: str,
        name: str = "plain",
        *,
        flags: tuple[str, ...] = (),
        settings: Mapping[str, str] | None = None,
    ) -> Server:
        """A running server, started on its first use and kept warm; ``name`` tells them apart."""
        key = (runtime, name)
        if key not in self._servers:
            server = Server(
                runtime,
                self.facts.folder,
                work=self.work,
                limit_s=self.limit_s,
                flags=flags,
                settings=settings,
            )
            self.commands.append(str(server.command))
            self._servers[key] = self._stack.enter_context(server)
        else:
            self.commands.append(str(self._servers[key].command))
        return self._servers[key]

    def plain(self, text: str) -> str:
        """``text`` without the paths of this machine: reports are published."""
        places = {self.work: "TMP", self.facts.folder: "OUT", self.facts.drafter: "DRAFTER"}
        for path in sorted(filter(None, places), key=lambda one: -len(str(one))):
            text = text.replace(str(path), places[path])
        return text

    def once(self, what: str, make: Callable[[], T]) -> T:
        """What ``make`` returns, made on its first use; a failure is kept too."""
        if what not in self._made:
            try:
                self._made[what] = make()
            except RowFailure as failure:
                self._made[what] = failure
        made = self._made[what]
        if isinstance(made, RowFailure):
            raise made
        return cast(T, made)

    def same(self, pairs: Sequence[tuple[str, Reply, Reply]], *, noise: float = 0.0) -> Sameness:
        """Answers that should be the same, held against the rule for this checkpoint's dtype."""
        return require_same(pairs, computing=self.facts.computing, noise=noise)

    def stop_server(self, runtime: str, name: str) -> None:
        """End a server that was started; the next use starts another."""
        server = self._servers.pop((runtime, name), None)
        if server is not None:
            server.close()

    def python(self, runtime: str, job: str) -> Json:
        """What the stock Python calls gave for a job; RowFailure with what they raised."""
        session = self.session(runtime)
        self.commands.append(f"python: from {runtime} import load, generate, stream_generate")
        reply: Json = session["replies"][job]
        if "error" in reply:
            raise RowFailure(str(reply["error"]))
        return reply

    def session(self, runtime: str, *, adapter: Path | None = None) -> Json:
        """All jobs of a runtime in one process; the model is loaded once for all rows."""
        what = f"session of {runtime} {adapter or ''}"
        return self.once(what, lambda: self._ask(runtime, adapter))

    def _ask(self, runtime: str, adapter: Path | None) -> Json:
        jobs = JOBS if runtime == "mlx_vlm" else {k: v for k, v in JOBS.items() if "text" in k}
        if adapter is not None:
            jobs = {"text": JOBS["text"]}
        asked = {
            name: job(self.media if "text" not in name else None)
            for name, job in jobs.items()
            if self._takes(name)
        }
        if adapter is None:
            asked |= self._torch_jobs()
        return self.ask(
            {
                "runtime": runtime,
                "folder": str(self.facts.folder),
                "adapter": str(adapter) if adapter else None,
                "jobs": {
                    name: {"prompt": QUESTION, "max_tokens": TOKENS, **job}
                    for name, job in asked.items()
                },
            }
        )

    def _torch_jobs(self) -> dict[str, Json]:
        """The plain prompts of a parity report, to be continued as torch continued them."""
        limit = len(bounded(range(1 << 16), vocab_size=self.facts.vocab_size))
        return {
            f"torch {name}": {"prompt": one.prompt, "limit": limit, "max_tokens": len(one.tokens)}
            for name, one in self.facts.torch.items()
        }

    def ask(self, request: Json) -> Json:
        """The answer of a Python session in a process of its own."""
        paths = (self.work / "request.json", self.work / "answer.json")
        paths[0].write_text(json.dumps(request), encoding="utf-8")
        words = tuple(str(path) for path in paths)
        command = Command(module="validate.acceptance.child", arguments=words)
        command.run(cwd=self.work, limit_s=self.limit_s)
        answer: Json = json.loads(paths[1].read_text(encoding="utf-8"))
        return answer

    def _takes(self, job: str) -> bool:
        needs_sight = "image" in job or "video" in job or "vision" in job
        facts = self.facts
        return (facts.sees or not needs_sight) and (facts.hears or "audio" not in job)


def reply_of(data: Json, *, ids: bool = False) -> Reply:
    """A reply of the Python session; its tokens are named as the runtime's server names them.

    mlx-lm's tells their ``ids``, mlx-vlm's the bytes of their text.
    """
    names = [str(step[0]) for step in data["steps"]] if ids else data["pieces"]
    return Reply(
        text=data["text"],
        steps=tuple(
            Step(token=name, logprob=step[1], lead=step[2])
            for name, step in zip(names, data["steps"], strict=False)
        ),
        finish=data["finish"],
        prompt_tokens=data["prompt_tokens"],
        completion_tokens=data["completion_tokens"],
    )


def _with(**files: str) -> Callable[[Media | None], Json]:
    """A job with media: keyword is the argument of the runtime, value the file's name in Media."""

    def job(media: Media | None) -> Json:
        return {kind: [str(getattr(media, name))] for kind, name in files.items()}

    return job


JOBS: Final[Mapping[str, Callable[[Media | None], Json]]] = {
    "text": lambda media: {},
    "text whole": lambda media: {"whole": True},
    "image": _with(image="image"),
    "image, other": _with(image="other_image"),
    "audio": _with(audio="audio"),
    "audio, other": _with(audio="other_audio"),
    "image and audio": _with(image="image", audio="audio"),
    "image and audio, other": _with(image="other_image", audio="audio"),
    "video": _with(video="video"),
    "video, other": _with(video="other_video"),
    "vision cache": lambda media: {**_with(image="image")(media), "cached": True},
}
"""What the Python session is asked, by name."""
