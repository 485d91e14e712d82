"""Runs whose students are stacked: their steps are taken at once, each by its own rules."""

from collections.abc import Iterator

import torch

from ..models import Stack
from .graph import DeviceSteps, Launches

Launch = tuple[int, int]  # (images of a step, steps)


class Stacked:
    """Runs of one process that wait for each other, so that they come to their steps together.

    Each run asks for its next launch and goes on when it was made. The runs that are the least far
    in their epoch go first: all of them at once if they are all there are, else one by one until
    they have caught up. So a run may end, fail or go on from anywhere at any time; those that are
    left are stacked anew.

    Args:
        form: "grouped" or "vmap": of a `Stack`; "branches": a forward pass each, side by side.
        compiled: whether a stack's pass is compiled.
    """

    def __init__(self, form: str, compiled: bool) -> None:
        self.form, self.compiled = form, compiled
        self.asked: dict[DeviceSteps, Launch | None] = {}  # by the runs that have begun
        self.launches: Launches | None = None

    def turn(self, run: DeviceSteps, launch: Launch) -> Iterator[None]:
        """Advanced until the launch was made."""
        self.asked[run] = launch
        try:
            while self.asked[run]:
                yield
                self._advance()
        finally:
            if run in self.asked:
                self.asked[run] = None

    def leave(self, run: DeviceSteps) -> None:
        """Let the others no longer wait for a run."""
        self.asked.pop(run, None)

    def _advance(self) -> None:
        asked = {run: launch for run, launch in self.asked.items() if launch}
        if len(asked) < len(self.asked):
            return  # one is evaluating
        least = min(run.meter.step for run in asked)
        due = {run: launch for run, launch in asked.items() if run.meter.step == least}
        if len(due) == len(asked) and len(set(due.values())) == 1:
            self._together([*due])(*next(iter(due.values())))
        else:
            for run, launch in due.items():
                run.alone(*launch)
        self.asked |= dict.fromkeys(due)

    def _together(self, runs: list[DeviceSteps]) -> Launches:
        """The launches of these runs, made anew when they are others than before."""
        if self.launches is None or {*self.launches.rows} != {*runs}:
            self.launches = stack = None  # first of all, give up the memory of their graphs
            if self.form != "branches":
                students = [run.distiller.student for run in runs]
                stack = Stack(students, self.form, self.compiled)
            self.launches = Launches(runs, stack)
            device = runs[0].cursor.device
            if device.type == "cuda":
                with torch.cuda.device(device):
                    self.launches.capture(device)
        return self.launches
