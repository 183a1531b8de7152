"""The Gradio chat of mlx-vlm, used in a headless Chromium as a person would."""

import json
from typing import Final

from validate.acceptance import needs
from validate.acceptance.bench import QUESTION, Bench
from validate.acceptance.browser import Page
from validate.acceptance.model import Found, Row, RowFailure
from validate.acceptance.process import Command, end
from validate.acceptance.server import free_port, wait_for

_ASK: Final = """
(() => {
  const box = document.querySelector('.multimodal-textbox textarea, textarea');
  if (!box) return false;
  const set = Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set;
  set.call(box, QUESTION);
  box.dispatchEvent(new Event('input', {bubbles: true}));
  return true;
})()
"""
_SEND: Final = """
(() => {
  const button = document.querySelector('.submit-button, button[aria-label="Send"]');
  if (!button || button.disabled) return false;
  button.click();
  return true;
})()
"""
_SAID: Final = """
[...document.querySelectorAll('[data-testid="bot"]')].map(e => e.innerText).join('\\n')
"""
_DONE: Final = "tokens @"
"""The chat ends every answer with a line of figures."""


def _answers(bench: Bench) -> Found:
    port = free_port()
    command = Command(
        module="mlx_vlm",
        arguments=("chat_ui", "--model", str(bench.facts.folder)),
        settings={
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "BROWSER": "true",  # it opens one by itself; the page is looked at below
        },
    )
    bench.commands.append(str(command))
    with (bench.work / "chat-ui.log").open("w+b") as log:
        process = command.start(cwd=bench.work, log=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/", process, log, limit_s=bench.limit_s)
            return _talk(bench, f"http://127.0.0.1:{port}/")
        finally:
            end(process)


def _talk(bench: Bench, url: str) -> Found:
    with Page(url, chromium=str(needs.chromium()), work=bench.work) as page:
        ask = _ASK.replace("QUESTION", json.dumps(QUESTION))
        page.until(ask, "the chat shows no text box", limit_s=bench.limit_s)
        page.until(_SEND, "the question cannot be sent", limit_s=bench.limit_s)
        done = f"({_SAID.strip()}).includes({json.dumps(_DONE)})"
        page.until(done, "the chat gave no finished answer", limit_s=bench.limit_s)
        said = str(page.evaluate(_SAID)).strip()
        wrong = page.errors()
    if wrong:
        raise RowFailure(f"the page reports: {'; '.join(wrong)}")
    return Found(note=f"it answers in the browser: {said[:120]!r}")


ROWS: Final = (
    Row(
        name="chat UI",
        runtime="mlx_vlm",
        rule="a question typed into the page in a headless Chromium gets a finished answer, and "
        "the page reports no error",
        run=_answers,
        needs=(needs.has_browser,),
    ),
)
