"""The version of this program, as it is recorded in plans and manifests."""

from importlib.metadata import PackageNotFoundError, version


def program_version() -> str:
    """Version of the installed distribution, or ``0+source`` when run from a plain checkout."""
    try:
        return version("mlx-dayzero")
    except PackageNotFoundError:
        return "0+source"
