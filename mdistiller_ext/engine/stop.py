"""Being asked to stop: by a terminal, by `kill`, by a scheduler such as Slurm."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, ClassVar

from ..errors import Stopped

# Slurm sends SIGTERM, and before it what its --signal names, by custom SIGUSR1.
# A terminal that is closed sends SIGHUP. Windows has the first two.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class StopSignals:
    """Within it, the first of SIGNALS is noted, and acted on where nothing is half done.

    A second one has its usual effect, and one that is ignored stays so, as SIGINT in the background
    of a shell. Outside the main thread, where Python allows no handlers, nothing is ever noted.

    Attributes:
        signum: of the signal that was noted, or 0. One within another begins with the other's.
    """

    entered: ClassVar[list["StopSignals"]] = []  # of the main thread, the innermost last

    def __init__(self) -> None:
        self.signum = 0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.signum = self.entered[-1].signum if self.entered else 0
            self.entered.append(self)
            if not self.signum:
                heeded = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
                self.before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        if self in self.entered:
            self.entered.remove(self)

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def check(self, *_: Any) -> None:
        """Raise Stopped if a signal was noted. Arguments are ignored: it serves as a callback."""
        if self.signum:
            raise Stopped(f"stopped by {signal.Signals(self.signum).name}", self.signum)
