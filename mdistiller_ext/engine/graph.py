"""CUDA graphs of a step, and how they are captured without breaking what runs."""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import torch

from ..errors import RunError
from ..memory import is_out_of_memory, out_of_memory
from ..seeding import host_state

WARM_UP = 2  # steps on a side stream before a capture, as torch.cuda.graph asks for

Launch = tuple[int, int]  # (images of a step, steps)


class NoGraph(Exception):
    """A step that cannot be captured. `Rows.capture` puts back what its trial changed."""


class CaptureError(RunError):
    """A capture that failed half way. Nothing can be captured in this process any more, so that the
    process ends."""


class Graphs:
    """The launches of a step as CUDA graphs.

    Args:
        step: takes a step of so many images. It is tried first, then captured.
        sizes: of the batches of an epoch.
        launches: each kind of launch: a graph repeats its step.
        rewind: called before each trial, so that the images of a step are there.
        device: where the step runs.

    Raises:
        NoGraph: the step waits for the host, draws random numbers there, or fails; it was tried
            all the same, so that what it changes has changed.
        CaptureError: the capture failed.
        RunError: the device's memory is full.
    """

    def __init__(
        self,
        step: Callable[[int], None],
        sizes: Iterable[int],
        launches: Iterable[Launch],
        rewind: Callable[[], None],
        device: torch.device,
    ) -> None:
        self.graphs: dict[Launch, torch.cuda.CUDAGraph] = {}
        stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        before = torch.cuda.current_stream(device)
        stream.wait_stream(before)
        with torch.cuda.device(device), torch.cuda.stream(stream), _no_collection():
            try:
                for size in dict.fromkeys(sizes):
                    for _ in range(WARM_UP):
                        rewind()
                        step(size)
                    drawn = host_state()
                    with _no_synchronisation():
                        rewind()
                        step(size)
                    if host_state() != drawn:  # a graph would repeat the numbers of its capture
                        raise NoGraph("it draws random numbers on the host")
            except NoGraph:
                raise
            except Exception as error:  # whatever a method does that a capture forbids
                if is_out_of_memory(error):
                    raise out_of_memory(error) from error
                raise NoGraph(str(error).split("\n", 1)[0]) from error
            finally:
                before.wait_stream(stream)
            try:
                for size, count in dict.fromkeys(launches):
                    graph = self.graphs[size, count] = torch.cuda.CUDAGraph()
                    rewind()
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()  # what the trials freed is of no use to a graph's pool
                    # Other threads may go on with what a capture forbids in this one.
                    graph.capture_begin(pool, capture_error_mode="thread_local")
                    try:
                        for _ in range(count):
                            step(size)
                    except Exception:
                        with suppress(Exception):  # it says no more than that there was one
                            graph.capture_end()
                        raise
                    graph.capture_end()
            except Exception as error:
                if is_out_of_memory(error):
                    raise out_of_memory(error) from error
                reason = str(error).split("\n", 1)[0]
                raise CaptureError(
                    f"the CUDA graph's capture failed: {reason}; SOLVER.CUDA_GRAPH False trains "
                    f"without"
                ) from error
            finally:
                before.wait_stream(stream)

    def __call__(self, launch: Launch) -> None:
        self.graphs[launch].replay()

    def close(self) -> None:
        """Give back the graphs and their memory; not left to the garbage collector, which could
        run while another graph is captured."""
        for graph in self.graphs.values():
            graph.reset()
        self.graphs.clear()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collection: a graph that dies while another is captured breaks both."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Within it, an operation that waits for the GPU raises a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is called a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
