"""How steps are captured, with a stand-in for the GPU."""

import gc
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import CPU, reads
from test_rows import BATCH, CLASSES, left, planned, row, train_rows

from mdistiller_ext.engine.graph import CaptureError, Graphs, NoGraph
from mdistiller_ext.engine.loop import Meter
from mdistiller_ext.engine.rows import Rows
from mdistiller_ext.engine.writer import copied
from mdistiller_ext.errors import RunError


class Gpu:
    """A stand-in for torch.cuda: what is called, in order. Its graphs run the steps again."""

    def __init__(self, monkeypatch):
        self.calls, self.mode, self.capturing, self.steps = [], "default", False, []
        gpu = self

        class Stream:
            def __init__(self, name="side stream"):
                self.name = name if isinstance(name, str) else "side stream"

            def wait_stream(self, other):
                gpu.calls.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def capture_begin(self, pool, capture_error_mode):
                gpu.calls.append(f"capture into {pool}")
                self.steps = gpu.steps = []
                gpu.capturing = True

            def capture_end(self):
                gpu.capturing = False

            def replay(self):
                for step in self.steps:
                    step()

            def reset(self):
                gpu.calls.append("reset")

        usual = Stream("usual stream")
        for name, value in {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "current_stream": lambda device: usual,
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
            "graph_pool_handle": lambda: "one pool",
            "get_sync_debug_mode": lambda: gpu.mode,
            "set_sync_debug_mode": lambda mode: setattr(gpu, "mode", mode),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def take(self, step):
        """A step, which a capture records instead."""
        (self.steps.append if self.capturing else lambda step: step())(step)


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


FULL = "CUDA out of memory. Tried to allocate 2.50 GiB"
LAUNCHES = [(8, 2), (8, 1), (8, 1), (6, 1)]


def test_each_kind_of_step_is_tried_and_each_launch_captured(gpu):
    tried = []
    graphs = Graphs(lambda size: tried.append((size, gpu.mode)), [8, 6], LAUNCHES, int, CPU)
    trials = [(8, "default")] * 2 + [(8, "error")] + [(6, "default")] * 2 + [(6, "error")]
    assert tried == trials + [(8, "default")] * 3 + [(6, "default")]
    assert gpu.calls[0] == "side stream waits for usual stream"
    captures = [call for call in gpu.calls if call.startswith("capture")]
    assert captures == ["capture into one pool"] * 3
    assert gpu.calls[-1] == "usual stream waits for side stream"
    graphs.close()
    assert gpu.calls[-3:] == ["reset"] * 3 and not graphs.graphs


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (RuntimeError("waits\nfor it"), NoGraph, "^waits$"),
        (torch.OutOfMemoryError(FULL), RunError, "^out of memory: 2.50 GiB more .*--together"),
        (RuntimeError("CUDA error: out of memory"), RunError, "^out of memory: take a smaller"),
    ],
)
def test_a_trial_that_fails_means_no_graph_but_where_memory_is_full(gpu, error, raised, message):
    def step(size):
        raise error

    with pytest.raises(raised, match=message) as caught:
        Graphs(step, [8], LAUNCHES, int, CPU)
    assert not isinstance(caught.value, CaptureError)
    assert not any(call.startswith("capture") for call in gpu.calls)
    assert gpu.calls[-1] == "usual stream waits for side stream" and gpu.mode == "default"


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, lambda: torch.rand(1), lambda: torch.randperm(3)]
)
def test_a_step_that_draws_on_the_host_is_not_captured(gpu, draw):
    with pytest.raises(NoGraph, match="draws random numbers on the host"):
        Graphs(lambda size: draw(), [8], LAUNCHES, int, CPU)
    Graphs(lambda size: None, [8], LAUNCHES, int, CPU)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("invalidated\nmore"), "capture failed: invalidated; SOLVER.CUDA_GRAPH False"),
        (torch.OutOfMemoryError(FULL), "^out of memory: 2.50 GiB more"),
    ],
)
def test_an_error_within_a_capture_is_never_taken_for_no_graph(gpu, error, message):
    def step(size):
        if gpu.capturing:
            raise error

    with pytest.raises(RunError, match=message):
        Graphs(step, [8], LAUNCHES, int, CPU)
    assert gc.isenabled()


def test_nothing_is_collected_while_something_is_captured(gpu):
    """A cycle that holds a graph, as a run that failed leaves one, must not die in a capture."""
    died = []

    class Old:
        def __init__(self):
            self.me = self

        def __del__(self):
            died.append(gpu.capturing)

    def step(size):
        Old()
        [[] for _ in range(3000)]  # enough that Python would collect

    before = gc.get_threshold()
    gc.set_threshold(10, 1, 1)
    try:
        Graphs(step, [8], [(8, 50)], int, CPU)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert len(died) == 53 and not any(died)


def test_a_capture_leaves_no_trace_in_the_runs(gpu):
    """One of them is within an epoch. Captured steps are then the steps as they are."""
    rows, data = [row("DKD_DAT", n)[0] for n in range(2)], row("DKD_DAT")[1]
    others = [row("DKD_DAT", n)[0] for n in range(2)]
    programs = [Rows(own, data, BATCH, CLASSES, "grouped", nullcontext) for own in (rows, others)]
    live = programs[0].step
    programs[0].step = lambda size: gpu.take(lambda: live(size))
    for number in (1, 2):
        epochs = [planned(own, data, number, seed) for seed, own in enumerate(others)]
        before = copied([left(own) for own in rows])
        programs[0].capture()
        torch.testing.assert_close([left(own) for own in rows], before, rtol=0, atol=0)
        for own, other in zip(rows if number == 2 else [], others, strict=False):
            assert own.meter.read() == other.meter.read()  # the sums of the epoch before
        for program, own in zip(programs, (rows, others), strict=True):
            train_rows(program, own, epochs)
        for found, expected in zip(rows, others, strict=True):
            torch.testing.assert_close(left(found), left(expected), rtol=0, atol=0)
            assert found.meter.read() == expected.meter.read()
    programs[0].close()
    assert programs[0].graphs is None


def test_a_meter_is_read_at_once():
    """Counts come back as whole numbers."""
    meter = Meter(1, 2)
    losses = {"loss_ce": torch.tensor(1.5), "loss_kd": torch.tensor(0.25)}
    monitor = {"dat_kl": torch.tensor(0.5), "dat_images": torch.tensor(3)}
    meter.update(torch.tensor([0, 1, 1]), torch.eye(3), losses, monitor)
    meter.count(3)
    with reads() as waited:
        found = meter.read()
    assert waited.count("cpu") == 1
    means = {"loss": 1.75, "loss_ce": 1.5, "loss_kd": 0.25, "train_top1": 100 * 2 / 3}
    assert found == {**means, "dat_kl": 0.5, "dat_images": 3}
    assert type(found["dat_images"]) is int
