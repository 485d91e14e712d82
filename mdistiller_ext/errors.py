"""Errors that a user can mend. Their text is one clear line; tools print it without a traceback."""

import re
from typing import Any

LONGEST = 120  # characters of a value


class ConfigError(ValueError):
    """Bad arguments or configuration: exit status 2."""


class RunError(RuntimeError):
    """A run that could not start or go on: exit status 1."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to stop: exit status 128 and the signal's number, as a shell's."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def brief(value: Any) -> str:
    """A value for a message: in printable characters, on one line, and cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        text = f"{type(value).__name__} of thousands of digits"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def counted(number: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def bare(key: Any) -> str:
    """A key for a message: without quotes where it looks like one."""
    return key if isinstance(key, str) and re.fullmatch(r"[\w.]+", key) else brief(key)
