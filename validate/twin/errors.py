"""The one error a caller of this package can cause."""


class TwinError(ValueError):
    """No twin can be made from this config, or not there; the message says what to change."""
