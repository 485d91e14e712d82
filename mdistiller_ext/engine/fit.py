"""Training: one run by the plain loop or as a captured program, or K runs as the rows of one."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from yacs.config import CfgNode

from ..distillers import RECIPES, source
from ..errors import ConfigError, RunError
from ..memory import is_out_of_memory
from ..models import ARCHITECTURES
from ..solver import plain_only
from .graph import CaptureError, NoGraph
from .rows import Rows, method
from .run import Finished, Run
from .stop import StopSignals
from .trainer import Trainer, kind
from .writer import copied


def fit(run: Run) -> None:
    """Train a run to its end: on a GPU as a captured program of one row, else by the plain loop."""
    program = captured(run)
    try:
        with run.recorded(cuda_graph=program is not None, stack="none"):
            while not run.ended:
                epoch = run.plan()
                run.begin()
                if program:
                    program.take_epoch({0: epoch}, run.meter.step, run.launched)
                else:
                    run.trainer.train_epoch(epoch, run.stepped)
                run.end_epoch()
                run.may_stop()
    finally:
        if program:
            program.close()


def captured(run: Run) -> Rows | None:
    """A run's program as a CUDA graph; None where it takes the plain loop."""
    trainer, name = run.trainer, run.parts.networks.TYPE
    if run.device.type != "cuda" or not run.solver.CUDA_GRAPH or trainer.replica:
        return None
    if trainer.held_every:
        print(f"{name} runs without a CUDA graph: not all of its steps are alike")
        return None
    if plain := plain_only(run.solver):
        print(f"{name} runs without a CUDA graph: {plain}")
        return None
    program = build_rows([trainer], "none")
    try:
        program.capture()
    except NoGraph as reason:
        print(f"{name} runs without a CUDA graph: {reason}")
        return None
    return program


def build_rows(trainers: Sequence[Trainer], form: str, answers: bool = False) -> Rows:
    """The program of some runs; those of one method are neighbours.

    Args:
        answers: whether an epoch brings teacher logits without a table, too.
    """
    first = trainers[0]
    told = any(trainer.table or (answers and trainer.weights) for trainer in trainers)
    return Rows(
        trainers,
        first.data,
        first.solver.BATCH_SIZE,
        first.classes if told else 0,
        form,
        first.autocast,
        compiled=first.solver.COMPILE and len(trainers) > 1,
    )


def stack_form(cfg: CfgNode, device: torch.device) -> str:
    """How runs of this config are stacked when several are trained; "none": one after the other.

    Raises:
        ConfigError: SOLVER.STACK names a form that the config's method or student does not allow.
    """
    form = cfg.SOLVER.STACK
    if form == "none" or (form == "auto" and device.type != "cuda"):
        return "none"
    if reason := _unstackable(cfg):
        if form != "auto":
            raise ConfigError(f"SOLVER.STACK: {form} is not allowed: {reason}: expected auto, none")
        return "none"
    return "grouped" if form == "auto" else form


def _unstackable(cfg: CfgNode) -> str:
    """Why a run cannot share a program with others, or ""."""
    node = cfg.DISTILLER
    if reason := plain_only(cfg.SOLVER):
        return reason
    if node.STUDENT not in ARCHITECTURES:
        return f"{node.STUDENT} is no CIFAR ResNet"
    if node.TYPE == "NONE":
        return ""
    if source(node) != "ext" or node.TYPE not in RECIPES:
        return f"{node.TYPE} is no composition of a loss and policies"
    if any(policy.held_every for policy in RECIPES[node.TYPE].read(cfg[node.TYPE]).policies):
        return f"{node.TYPE} takes images that are held out in some of its steps"
    return ""


Job = tuple[int, CfgNode, str]  # number, config, name
# (config, name, the trainer of the run before) -> the run, while its folder is locked
Open = Callable[[CfgNode, str, Trainer | None], AbstractContextManager[Run | Finished]]
Results = dict[int, dict[str, Any] | BaseException]


class Seat:
    """A row of a program. Its runs follow each other, those of one kind in the same tensors.

    Attributes:
        number: of the run's job.
        run: None in a row that rests: it is computed at rate 0, and what it holds means nothing.
        trainer: of the run, or of the one before.
    """

    def __init__(self) -> None:
        self.number = -1
        self.run: Run | None = None
        self.trainer: Trainer | None = None
        self.contexts = ExitStack()  # what the run has entered

    def take(self, queue: list[Job], results: Results, open_run: Open) -> None:
        """Begin the next run of the queue that has not ended before."""
        while queue and not self.run:
            # One that can go on in the same tensors, if there is one.
            fits = (job for job in queue if self.trainer and self.trainer.kind == kind(job[1]))
            job = next(fits, queue[0])
            queue.remove(job)
            self.number, cfg, name = job
            try:
                run = self.contexts.enter_context(open_run(cfg, name, self.trainer))
            except Exception as error:
                results[self.number] = without_traceback(error)
                continue
            if isinstance(run, Finished):
                results[self.number] = run.record
                self.leave()
            else:
                self.run, self.trainer = run, run.trainer

    def record(self, results: Results, **session: Any) -> None:
        """Begin the record of a run that has taken the seat."""
        if run := self.run:
            recorded = run.recorded(**session)
            self.attempt(partial(self.contexts.enter_context, recorded), results)
        if self.run and self.run.ended:  # it lacked only its last record
            self.finish(results)

    def attempt(self, act: Callable[[], Any], results: Results) -> Any:
        """What `act` returns; None if it fails, which ends this run and no other."""
        try:
            return act()
        except Exception as error:
            self.fail(error, results)
            return None

    def end_epoch(self, results: Results) -> None:
        """End the epoch of the run, and the run after its last one."""
        if run := self.run:
            self.attempt(run.end_epoch, results)
            if self.run and run.ended:
                self.finish(results)

    def finish(self, results: Results) -> None:
        assert self.run is not None
        run, error = self.run, self.leave()
        results[self.number] = without_traceback(error) if error else run.record

    def fail(self, error: BaseException, results: Results) -> None:
        results[self.number] = without_traceback(self.leave(error) or error)

    def leave(self, error: BaseException | None = None) -> BaseException | None:
        """End the run, by an error if there is one. Returns the error as the run words it."""
        self.run, contexts, self.contexts = None, self.contexts, ExitStack()
        try:
            with contexts:
                if error:
                    raise error
        except BaseException as worded:
            return worded
        return None


def without_traceback(error: BaseException) -> BaseException:
    """An error to keep: its tracebacks would keep the networks of the run that failed."""
    chain: list[BaseException | None] = [error]
    for cause in chain:
        if cause:
            cause.__traceback__ = None
            chain += [e for e in (cause.__cause__, cause.__context__) if e not in chain]
    return error


def fit_rows(
    jobs: Sequence[Job], count: int, form: str, stop: StopSignals, open_run: Open
) -> Results:
    """Train runs of one student, data set and solver, `count` at once, as rows of a program.

    They begin their epochs together. A run that goes on within an epoch finishes that one by the
    plain loop, unless all are at the same step. Where a run ends or fails, the next one takes its
    row.

    Args:
        form: of a `Stack`.

    Returns:
        By number the record of each job, or its error, which stops no other.

    Raises:
        Stopped: a signal came; the runs are saved as they were after the steps of the moment.
    """
    queue, results = list(jobs), Results()
    seats, program = [Seat() for _ in range(count)], None
    try:
        while True:
            free, trainers = [s for s in seats if not s.run], [s.trainer for s in seats]
            for seat in free:
                seat.take(queue, results, open_run)
            if not any(seat.run for seat in seats):
                return results
            # A run that goes on in the tensors of the one before has its program already.
            if program is None or [seat.trainer for seat in seats] != trainers:
                if program:
                    program.close()
                program = None  # its memory goes before the next one asks for more
                seats = _in_order(seats)
                program = _program(seats, form)
            graph = program.graphs is not None
            for seat in free:
                seat.record(results, cuda_graph=graph, stack=form, together=len(seats))
            _catch_up(seats, results)
            _one_epoch(program, seats, form, results)
            if queue or any(seat.run for seat in seats):
                stop.check()
    except BaseException as error:
        for seat in seats:
            if seat.run:
                seat.fail(error, results)
        if isinstance(error, CaptureError) or not isinstance(error, Exception):
            raise
        # An error of the program, as full memory: the queue would meet it, too.
        return results | {number: without_traceback(error) for number, *_ in queue}
    finally:
        if program:
            program.close()


def _in_order(seats: Sequence[Seat]) -> list[Seat]:
    """The seats that have ever had a run, those of one method beside each other."""
    methods: list[Any] = []
    found = []
    for seat in seats:
        if seat.trainer:
            own = method(seat.trainer.distiller)
            if own not in methods:
                methods.append(own)
            found.append((methods.index(own), seat))
    return [seat for _, seat in sorted(found, key=itemgetter(0))]


def _program(seats: Sequence[Seat], form: str) -> Rows:
    trainers = [seat.trainer for seat in seats if seat.trainer]
    program = build_rows(trainers, form, answers=True)
    if program.index.is_cuda and trainers[0].solver.CUDA_GRAPH:
        try:
            program.capture()
        except NoGraph as reason:
            print(f"{len(seats)} runs at once without a CUDA graph: {reason}")
    return program


def _catch_up(seats: Sequence[Seat], results: Results) -> None:
    """Let runs that are within an epoch finish it alone, unless all are at the same step."""
    if len({seat.run.meter.step for seat in seats if seat.run}) > 1:
        for seat in seats:
            if (run := seat.run) and run.meter.step:
                seat.attempt(partial(_plain_epoch, run), results)
                seat.end_epoch(results)


def _plain_epoch(run: Run) -> None:
    epoch = run.plan()
    run.begin()
    run.trainer.train_epoch(epoch, run.stepped)


def _one_epoch(program: Rows, seats: Sequence[Seat], form: str, results: Results) -> None:
    """An epoch of all runs, and its end."""
    plans = {seat: seat.attempt(seat.run.plan, results) for seat in seats if seat.run}
    active = {seat: seat.run for seat in seats if seat.run}
    if not active:
        return
    for seat in active:
        seat.attempt(active[seat].begin, results)
    # With dense convolutions, what is not finite in a row reaches those that share them.
    mixing, failed = form != "grouped", False
    kept = {seat: copied(seat.trainer.state_dict()) for seat in seats if seat.trainer}

    def launched(size: int, count: int) -> None:
        for run in active.values():
            run.count(size, count)
        for seat in active:
            if seat.run:
                seat.attempt(seat.run.stepped, results)

    rows = {row: plans[seat] for row, seat in enumerate(seats) if seat in active}
    first = next(iter(active.values())).meter.step
    try:
        program.take_epoch(rows, first, launched)
    except Exception as error:  # as of a loss of one's own
        if isinstance(error, RunError) or is_out_of_memory(error):
            raise
        failed = True
    for seat in seats:
        if (run := seat.run) and (failed or (mixing and not run.finite)):
            # Alone it shows whose fault it was.
            run.restore(kept[seat])
            seat.attempt(partial(_plain_epoch, run), results)
        seat.end_epoch(results)
        if seat in kept and seat.trainer and not seat.run and not seat.trainer.finite:
            seat.trainer.load_state_dict(kept[seat])  # a row that rests must be finite
