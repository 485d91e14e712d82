"""A teacher that answers from its table, and which methods can live with that."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch


class TabledTeacher:
    """Lets a teacher answer from the table in a method of the toolkit, which calls it.

    It takes the place of the network's `forward`, so that state dict and modules stay. For any
    other image, and for features, the network runs.

    Attributes:
        live_calls: how often the network ran after all.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.live, self.live_calls = teacher.forward, 0
        self.image: Tensor | None = None
        teacher.forward = self  # type: ignore[method-assign, assignment]

    @contextmanager
    def answering(self, image: Tensor, rows: Tensor) -> Iterator[None]:
        """Within it, images (B, 3, H, W) have these logits (B, C)."""
        self.image, self.rows = image, rows
        try:
            yield
        finally:
            self.image = None

    def __call__(self, image: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        if image is self.image:
            return self.rows, _Features(partial(self._run, image))
        return self._run(image)

    def _run(self, image: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        self.live_calls += 1
        with torch.no_grad():
            return self.live(image)


class _Features(Mapping[str, Any]):
    """A network's features, computed when someone asks for them."""

    def __init__(self, run: Callable[[], tuple[Tensor, Mapping[str, Any]]]) -> None:
        self.run = run
        self.features: Mapping[str, Any] | None = None

    def _computed(self) -> Mapping[str, Any]:
        if self.features is None:
            _, self.features = self.run()
        return self.features

    def __getitem__(self, name: str) -> Any:
        return self._computed()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._computed())

    def __len__(self) -> int:
        return len(self._computed())


def features_taken(distiller: nn.Module, batch: Batch) -> set[str]:
    """Of which networks, "teacher" or "student", a method takes more than the logits of `batch`.

    Found by a training step's forward of a copy.
    """
    trial: Any = copy.deepcopy(distiller).train()
    tabled, student = TabledTeacher(trial.teacher), trial.student
    asked: set[str] = set()
    live: Any = student.forward

    def watched(image: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        logits, features = live(image)

        def run() -> tuple[Tensor, Mapping[str, Any]]:
            asked.add("student")
            return logits, features

        return logits, _Features(run)

    devices = [batch.image.device] if batch.image.is_cuda else []
    with torch.random.fork_rng(devices):
        logits = trial.teacher(batch.image)[0].detach()
        tabled.live_calls = 0
        student.forward = watched
        with tabled.answering(batch.image, logits):
            trial(image=batch.image, target=batch.target, index=batch.index, epoch=1)
    return asked | ({"teacher"} if tabled.live_calls else set())
