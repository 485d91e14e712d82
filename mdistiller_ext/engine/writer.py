"""What an epoch leaves is written while the next one trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only


class Writer:
    """Does a piece of work in a thread beside the training, one at a time."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.work: Future | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin it, when the one before has come to its end.

        Raises:
            Exception: what went wrong in the one before.
        """
        self.wait()
        self.work = self.pool.submit(work)

    def check(self) -> None:
        """Raise what has gone wrong, without waiting."""
        if self.work and self.work.done():
            self.wait()

    def wait(self) -> None:
        """Until all is done; raise what went wrong, once."""
        if work := self.work:
            wait([work])
            self.work = None
            work.result()


def snapshot(content: Any) -> Any:
    """Nested dicts and lists, with a copy in the host's memory of each tensor as it is now."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)


def copied(content: Any) -> Any:
    """Likewise, each tensor where it is."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), content)
