"""Errors that a user can mend. Their text is one clear line; tools print it without a traceback."""


class ConfigError(ValueError):
    """Bad arguments or configuration: exit status 2."""


class RunError(RuntimeError):
    """A run that could not start or go on: exit status 1."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to stop: exit status 128 and the signal's number, as a shell's."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
