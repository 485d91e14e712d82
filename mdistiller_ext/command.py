"""How the command-line tools start and fail: at once, with one clear line and an exit status."""

import argparse
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO

from .errors import ConfigError, RunError
from .toolkit.forks import fork_hint


class Lasting:
    """A stream that may lose its reader, as a pipe into `head`, or find its disk full: what is
    printed then is lost, and nothing else is.

    Attributes:
        error: why the rest is lost; a reader that went away is no error.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.error = stream, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._lasting():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self.stream.flush()

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if not isinstance(error, BrokenPipeError):
                self.error = f"the output from here on is lost: {error.strerror}"


def path(word: str) -> Path:
    """The type of an argument that names a file or folder: ~ is home in --output=~/here, too."""
    return Path(os.path.expanduser(word))


def existing(word: str) -> Path:
    """The type of one that is there: a slip is told without waiting."""
    try:
        path(word).stat()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{word}: {error.strerror}") from error
    return path(word)


def new_file(word: str) -> Path:
    """The type of one that will be written: a slip in its folder is told without waiting."""
    return existing(str(path(word).parent)) / path(word).name


class Parser(argparse.ArgumentParser):
    """One that knows the options of the toolkit's forks."""

    def error(self, message: str) -> NoReturn:
        super().error(message + "".join(map(fork_hint, message.split())))


def run(name: str, prog: str, words: Sequence[str] | None = None) -> NoReturn:
    """Run a module of `commands`; `words` are sys.argv's where none are given."""
    # A thread that waits for its sisters spins for long by default: beside another busy process,
    # training falls to a tenth. Spinning shortly costs nothing on a quiet machine.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    module = import_module(f".commands.{name}", __package__)
    words = sys.argv[1:] if words is None else words
    action = words[0] if words and words[0] in getattr(module, "ACTIONS", {}) else ""
    parser = Parser(
        prog,
        description=module.ACTIONS[action] if action else module.__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    module.arguments(parser, *([action] if action else []))
    run_tool(module.main, parser, words)


def run_tool(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    words: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the arguments, run `main`, exit.

    The status is 0, 2 for bad arguments or config, 1 for a failure, 128 + a signal's number.
    Importing torch takes seconds. A tool leaves that, and all that does it, to its `main`: --help
    and bad arguments need none of it, and Ctrl-C ends it like the rest.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # one that is closed, or another's
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    parser.set_defaults(prog=parser.prog)
    output, errors = (stream and Lasting(stream) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(output), redirect_stderr(errors), ExitStack() as last:
        for stream in filter(None, (errors, output)):
            last.callback(stream.flush)
        # With a space before it, a value as -5e-2 is not taken for an option.
        words = [
            re.sub(r"^-(?=\.?\d)", " -", w) for w in (sys.argv[1:] if words is None else words)
        ]
        args = parser.parse_intermixed_args(words)
        args.opts = [word.lstrip(" ") for word in getattr(args, "opts", ())]
        status, message = 0, ""
        try:
            import numpy  # noqa: F401 - of a Ctrl-C while torch imports it, torch takes no notice

            main(args)
            if output:
                output.flush()
                if output.error:
                    raise RunError(output.error)
        except KeyboardInterrupt as stop:
            status = 128 + getattr(stop, "signum", signal.SIGINT)
            message = str(stop) or "interrupted"
        except Exception as error:
            status, message = 2 if isinstance(error, ConfigError) else 1, str(error)
            if not isinstance(error, (ConfigError, RunError, OSError)):
                message = f"unexpected {type(error).__name__}: {error} (--debug shows where)"
            if args.debug:
                traceback.print_exc()
        name = parser.prog.rpartition("/")[2]
        for line in message.splitlines():
            print(f"{name}: error: {line}", file=sys.stderr)
        sys.exit(status)
