"""A stock server as a child process on a free loopback port, and a client of its HTTP interface."""

import base64
import http.client
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

from validate.acceptance.model import RowFailure
from validate.acceptance.process import GRACE_S, Command, arguments, end, last_error
from validate.acceptance.replies import Reply, Step

_POLL_S: Final = 0.3
_NEVER: Final = -1000.0
"""Added to a logit: its token is not chosen."""
Json = dict[str, Any]


class Server:
    """``python -m mlx_vlm server`` or ``python -m mlx_lm server`` with one checkpoint."""

    def __init__(
        self,
        runtime: str,
        folder: Path,
        *,
        work: Path,
        limit_s: float,
        flags: tuple[str, ...] = (),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.runtime = runtime
        self.folder = folder
        self.limit_s = limit_s
        self.port = free_port()
        place = arguments("server", model=folder, host="127.0.0.1", port=self.port)
        # Only mlx-vlm caps what it tells of second choices by a flag.
        told = ("--top-logprobs-k", "2") if runtime == "mlx_vlm" else ()
        self.command = Command(
            module=runtime, arguments=(*place, *told, *flags), settings=settings or {}
        )
        self._log_path = work / f"server-{self.port}.log"
        self._log = self._log_path.open("wb")
        self._process = self.command.start(cwd=work, log=self._log)

    def __enter__(self) -> "Server":
        try:
            wait_for(self._url("/health"), self._process, self._log, limit_s=self.limit_s)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ask it to end, so that it writes what it still has to, then end its whole group."""
        end(self._process, grace_s=GRACE_S)
        self._log.close()

    def log(self) -> str:
        """What it said."""
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Json:
        """The JSON of a GET."""
        return self._json(urllib.request.Request(self._url(path)))

    def post(self, path: str, body: Mapping[str, Any]) -> Json:
        """The JSON of a POST; RowFailure with the server's own error."""
        return self._json(self._request(path, body))

    def chat(self, content: Any, *, max_tokens: int, **options: Any) -> Reply:
        """A greedy answer of /v1/chat/completions, with log-probabilities where it tells them."""
        body = self.body(content, max_tokens, options)
        data = self.post("/v1/chat/completions", body)
        choice = data["choices"][0]
        usage = data["usage"]
        details = usage.get("prompt_tokens_details") or {}
        return Reply(
            text=_told(choice["message"]),
            steps=_steps(choice.get("logprobs")),
            finish=str(choice["finish_reason"]),
            prompt_tokens=int(usage["prompt_tokens"]),
            completion_tokens=int(usage["completion_tokens"]),
            cached_tokens=int(details.get("cached_tokens") or 0),
            drafted=int((data.get("timings") or {}).get("draft_n") or 0),
        )

    def stream(self, content: Any, *, max_tokens: int) -> Reply:
        """One streamed answer; RowFailure unless it ends with a reason, the usage and [DONE]."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = self.body(content, max_tokens, options)
        text, finish, usage, done = "", "", None, False
        with self._open(self._request("/v1/chat/completions", body)) as answer:
            for line in answer:
                told = line.decode().strip()
                if not told.startswith("data:"):
                    continue
                told = told.removeprefix("data:").strip()
                if told == "[DONE]":
                    done = True
                    continue
                event = json.loads(told)
                if "error" in event:
                    raise RowFailure(f"the stream broke off: {event['error']}")
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    text += _told(choice["delta"])
                    finish = choice.get("finish_reason") or finish
        if not (finish and usage and done):
            lacks = [w for w, h in (("finish_reason", finish), ("usage", usage)) if not h]
            raise RowFailure(f"the stream ended without {', '.join(lacks) or '[DONE]'}")
        return Reply(text=text, finish=finish, prompt_tokens=int(usage["prompt_tokens"]))

    def together(self, contents: list[Any], *, max_tokens: int) -> list[Reply]:
        """Answers to all at once, each from a thread of its own."""
        with ThreadPoolExecutor(len(contents)) as pool:
            waiting = [pool.submit(self.chat, c, max_tokens=max_tokens) for c in contents]
            return [one.result() for one in waiting]

    def joined(
        self,
        first: Any,
        second: Any,
        *,
        lengths: tuple[int, int],
        after_s: float,
        never: Sequence[int] = (),
    ) -> tuple[list[Reply], bool]:
        """A long answer, and a short one that is asked for while the first is being written.

        ``lengths`` are their tokens; none ends early, for ``never`` are not chosen. ``after_s``:
        seconds after which the first is certainly being written and far from its end. The second
        value: whether the short one, asked for later, ended before the long one, as in a batch.
        """
        asked = [
            partial(self.unending, content, max_tokens=length, never=never)
            for content, length in zip((first, second), lengths, strict=True)
        ]
        with ThreadPoolExecutor(2) as pool:
            long = pool.submit(asked[0])
            time.sleep(after_s)
            short = pool.submit(asked[1])
            done, _ = wait((long, short), return_when=FIRST_COMPLETED)
            return [long.result(), short.result()], long not in done

    def unending(self, content: Any, *, max_tokens: int, never: Sequence[int]) -> Reply:
        """An answer in which the tokens ``never`` are not chosen, so that it does not end early."""
        return self.chat(
            content, max_tokens=max_tokens, logit_bias={str(token): _NEVER for token in never}
        )

    def body(self, content: Any, max_tokens: int, options: Mapping[str, Any]) -> Json:
        """A greedy request about ``content``, a text or a list of parts."""
        return {
            "model": str(self.folder),
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": 2,
            **options,
        }

    def _request(self, path: str, body: Mapping[str, Any]) -> urllib.request.Request:
        return urllib.request.Request(
            self._url(path), json.dumps(body).encode(), {"Content-Type": "application/json"}
        )

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _json(self, request: urllib.request.Request) -> Json:
        with self._open(request) as answer:
            data: Json = json.loads(answer.read())
        return data

    @contextmanager
    def _open(self, request: urllib.request.Request) -> Iterator[Any]:
        """The open answer; RowFailure with the server's own error, also where it breaks off."""
        try:
            with urllib.request.urlopen(request, timeout=self.limit_s) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
            raise RowFailure(f"HTTP {error.code}: {told or last_error(self.log())}") from error
        except TimeoutError as error:
            raise RowFailure(f"no answer within {self.limit_s:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise RowFailure(f"the server broke off: {last_error(self.log())}") from error


def picture_content(path: Path, text: str) -> list[Json]:
    """A message of a picture as a data URI and a question."""
    data = base64.b64encode(path.read_bytes()).decode()
    url = f"data:image/{path.suffix.removeprefix('.').lower()};base64,{data}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]


def _told(message: Mapping[str, Any]) -> str:
    """Thoughts and answer: greedy decoding is compared over both."""
    return str(message.get("reasoning") or "") + str(message.get("content") or "")


def _steps(logprobs: Any) -> tuple[Step, ...]:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return tuple(
        Step(
            token=str(one.get("id", one.get("bytes") or one.get("token"))),
            logprob=float(one["logprob"]),
            lead=_lead([float(top["logprob"]) for top in one.get("top_logprobs") or ()]),
        )
        for one in content or ()
    )


def _lead(top: list[float]) -> float | None:
    ordered = sorted(top, reverse=True)
    return ordered[0] - ordered[1] if len(ordered) > 1 else None


def wait_for(url: str, process: subprocess.Popen[bytes], log: IO[bytes], *, limit_s: float) -> None:
    """Until a server answers; RowFailure with the program's own error when it ends instead."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = Path(log.name).read_text(encoding="utf-8", errors="replace")
            raise RowFailure(f"the server ended: {last_error(said)}")
        try:
            urllib.request.urlopen(url, timeout=limit_s).close()
            return
        except OSError:
            time.sleep(_POLL_S)
    raise RowFailure(f"the server did not start within {limit_s:.0f} s")


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
