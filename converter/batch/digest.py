"""The digest of a run: a JSON POST to a webhook, a mail, or both; never a reason to fail."""

from __future__ import annotations

import json
import smtplib
import ssl
import urllib.request
from collections.abc import Callable, Mapping
from email.message import EmailMessage
from typing import Any, Final
from urllib.parse import urlsplit

from converter.batch.watchlist import Digest, Mail

TIMEOUT_S: Final = 20.0


def send_digest(digest: Digest, summary: Mapping[str, Any], *, say: Callable[[str], None]) -> None:
    """Send a run's summary wherever the watch list says; what fails is said and left at that."""
    from converter.hub.errors import redact

    body = json.loads(redact(json.dumps({"text": text_of(summary), **summary})))
    if digest.webhook is not None:
        host = urlsplit(digest.webhook).hostname  # the rest of such an address is a secret
        try:
            _post(digest.webhook, body)
        except (OSError, ValueError) as error:
            say(f"digest: {host} did not take it: {type(error).__name__}")
    if digest.mail is not None:
        try:
            _mail(digest.mail, body)
        except (OSError, smtplib.SMTPException) as error:
            say(f"digest: {digest.mail.host} did not take the mail: {type(error).__name__}")


def text_of(summary: Mapping[str, Any]) -> str:
    """A run's summary for people: what is new, then what needs somebody."""
    lines = [
        f"{summary['watchlist']}: {len(summary['published'])} published, "
        f"{len(summary['failed'])} failed, status {summary['status']}"
    ]
    lines += [f"published {job['address']}" for job in summary["published"]]
    lines += [
        f"{job['state']} {job['target']} ({job['class']}): {job['reason'].splitlines()[0]}"
        for job in summary["failed"]
    ]
    lines += [f"not looked at: {problem}" for problem in summary["problems"]]
    return "\n".join(lines)


def _post(url: str, body: Mapping[str, Any]) -> None:
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError("a webhook is an http or https address")
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S):
        pass


def _mail(mail: Mail, body: Mapping[str, Any]) -> None:
    message = EmailMessage()
    message["Subject"] = str(body["text"]).splitlines()[0]
    message["From"] = mail.sender
    message["To"] = ", ".join(mail.to)
    message.set_content(str(body["text"]))
    with smtplib.SMTP(mail.host, mail.port, timeout=TIMEOUT_S) as server:
        if mail.starttls:
            server.starttls(context=ssl.create_default_context())
        if mail.user is not None:
            server.login(mail.user, mail.password or "")
        server.send_message(message)
