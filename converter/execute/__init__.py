"""Executing plans: streaming, resumable, and the same bytes on any machine."""

from converter.execute.run import Job, execute

__all__ = ["Job", "execute"]
