"""Executing plans: streaming, resumable, and the same bytes on any machine."""

from converter.execute.run import CheckedReader, Job, execute

__all__ = ["CheckedReader", "Job", "execute"]
