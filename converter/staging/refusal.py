"""How the server says no: a status, the code the hub's clients look at, and a sentence."""


class Refusal(Exception):
    """An answer other than success, with the `X-Error-Code` that the hub's client understands."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}

    def response_headers(self) -> dict[str, str]:
        """Headers of the answer; the sentence is repeated there, in printable ASCII."""
        printable = self.message.encode("ascii", "replace").decode()
        sentence = "".join(c if c.isprintable() else " " for c in printable)
        code = {"X-Error-Code": self.code} if self.code else {}
        return {**self.headers, **code, "X-Error-Message": sentence}


def repo_not_found(*, signed_in: bool) -> Refusal:
    """A missing repository and one that is hidden look the same, as on the public hub."""
    if signed_in:
        return Refusal(404, "Repository not found", code="RepoNotFound")
    return Refusal(401, "Invalid username or password.", code="RepoNotFound")


def revision_not_found(revision: str) -> Refusal:
    """No branch or commit has this name."""
    return Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")


def entry_not_found(path: str, *, commit: str | None = None) -> Refusal:
    """No file has this path at this commit."""
    headers = {"X-Repo-Commit": commit} if commit else {}
    return Refusal(404, f"Entry not found: {path}", code="EntryNotFound", headers=headers)
