"""Errors that a user can mend. Their text is one clear line; tools print it without a traceback."""


class ConfigError(ValueError):
    """Bad arguments or configuration: exit status 2."""


class RunError(RuntimeError):
    """A run that could not start or go on: exit status 1."""
