"""Errors of the user's own network, which are the user's to read."""

from __future__ import annotations


class ModelError(ValueError):
    """An exception of a network, or of the code that builds it, in one line; it is the cause."""


def described(error: Exception, longest: int | None = None) -> str:
    """The message of an exception in one line, with its type unless the message says enough."""
    message, kind = " ".join(str(error).split())[:longest], type(error).__name__
    if message and isinstance(error, RuntimeError | ValueError | AssertionError):
        return message
    return f"{kind}: {message}" if message else kind
