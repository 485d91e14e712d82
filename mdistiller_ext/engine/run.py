"""One run: its epochs, one by one, and what it leaves in its folder."""

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import Batch, empty_classes
from ..data.mixing import mixed
from ..errors import ConfigError, RunError, Stopped
from ..files import save
from ..inert import inert
from ..memory import is_out_of_memory, out_of_memory
from ..sections import Parts
from ..seeding import epoch_draws, epoch_generator, random_state, set_random_state
from ..solver import rates
from ..teacher import Weights
from . import chain
from .build import few
from .environment import changes
from .evaluation import confusion, fidelity, logits_of, numbers, performance, predict, unsteady
from .events import Events, Progress
from .facts import data_facts, method_facts, no_gain, session_facts, teacher_facts
from .folder import LATEST, check_history, fitting, plain, save_state
from .loop import Epoch, HeldOut
from .record import by_class, peak_memory, summary, write_record
from .shared import Shared
from .trainer import Trainer
from .writer import Writer, snapshot


class Finished(NamedTuple):
    """A run that had come to its end before."""

    record: dict[str, Any]
    folder: Path


class Run:
    """The state of a run: everything that `latest` holds. `fit` trains it.

    Args:
        trainer: what an ended run of the same kind has left, to be used again.
        alone: whether the process trains nothing else at the same time.
    """

    def __init__(
        self,
        parts: Parts,
        folder: Path,
        shared: Shared,
        weights: Weights | None,
        state: dict[str, Any] | None,
        trainer: Trainer | None = None,
        alone: bool = True,
    ) -> None:
        self.parts, self.solver, self.folder, self.shared = parts, parts.solver, folder, shared
        self.device, self.stop, self.world = shared.device, shared.stop, shared.world
        self.alone = alone
        self.writer = Writer()
        for line in inert(parts.cfg):
            print(f"warning: {line}")
        self.train_set, self.test_set = shared.data(parts)
        for line in empty_classes(self.train_set, self.test_set):
            print(f"warning: {line}")
        if trainer:
            trainer.renew(parts)
        self.trainer = trainer or Trainer(parts, shared, weights)
        for role in ("student", "teacher") if weights else ("student",):
            network = getattr(self.trainer.distiller, role)
            if reason := unsteady(network, few(self.train_set).image):
                print(f"warning: the {role} {reason}: its accuracy will be another next time")
        for line in no_gain(parts, shared, self.trainer, alone):
            print(f"warning: {line}")
        self.meter, self.table = self.trainer.meter, self.trainer.table
        self.history = state["history"] if state else []
        self.kept = len(self.history)  # epochs that `latest` holds
        self.spent = 0.0  # seconds, of an epoch that was stopped in the middle
        self.prefetched = 0  # of the teacher's logits of the next epoch, missing so far
        self.hits: dict[str, float] = {}
        self.planned = 0  # the last epoch that was planned
        # Rows draw nothing from the global generators: `latest` keeps the state after the initial
        # weights.
        self.random = self.trainer.random
        self.meter.start(len(self.history) + 1)
        if state:
            self._go_on(state)
        self.logits_teacher = self._teacher_logits(weights) if weights else None
        self.teacher_sha256 = weights.sha256 if weights else None
        self.logits_student: Tensor | None = None  # on the test set, of the last evaluation
        self.record: dict[str, Any] = {}
        self.sessions = self._sessions(state)
        self.facts: dict[str, Any] = {
            "name": folder.name,
            "seed": self.solver.SEED,
            "environments": self.sessions,
            "method": method_facts(parts),
            "teacher": teacher_facts(parts, weights, self.logits_teacher, self.test_set),
            "student": {
                "name": parts.networks.STUDENT,
                "parameters": sum(p.numel() for p in self.student.parameters()),
            },
            "chain": chain.facts(parts.cfg),
            "data": data_facts(parts, self.train_set, self.test_set),
            "config": plain(parts.cfg),
        }

    @property
    def student(self) -> nn.Module:
        return self.trainer.distiller.student

    @property
    def epoch(self) -> int:
        """The epoch that is trained now or next, counted from 1."""
        return len(self.history) + 1

    @property
    def ended(self) -> bool:
        return len(self.history) >= self.solver.EPOCHS

    def _go_on(self, state: dict[str, Any]) -> None:
        """From what `latest` holds.

        Raises:
            ConfigError: the run would have begun otherwise, or another number of processes has
                stopped it.
            RunError: it does not fit.
        """
        begun = [{"epoch": self.epoch, **state["planned"]}] if state["planned"] else []
        check_history([*self.history, *begun], self._planned, self.folder)
        if state["meter"] and self.world.size > 1:
            raise ConfigError(
                f"{self.folder}: one process stopped it within epoch {self.epoch}: "
                f"expected one process to go on"
            )
        with fitting(self.folder):
            self.trainer.load_state_dict(state)
            self.random = state["random"]
            set_random_state(self.random)
        self.spent = state["spent"]
        print(f"{self.folder}: going on after {self._progress(self.meter.step)}")

    def _sessions(self, state: dict[str, Any] | None) -> list[dict[str, Any]]:
        """The environments of the sessions so far, this one last."""
        before = state["environments"] if state else []
        session = {
            "first_epoch": self.epoch,
            **session_facts(self.parts, self.shared),
        }
        if self.parts.log.WANDB:
            earlier = (found for s in before if (found := s.get("wandb")))
            session["wandb"] = next(earlier, secrets.token_hex(8))
        if before and (apart := changes(before[-1], session)):
            print(
                f"{self.folder}: goes on under other conditions, so that a study leaves it out: "
                f"{'; '.join(apart)}"
            )
        return [*before, session]

    @contextmanager
    def recorded(self, **session: Any) -> Iterator[None]:
        """The run's training takes place within it: the record says how far it is and how it ends.

        An exception is recorded. Stopped saves the state within the epoch.

        Args:
            session: what else the record says of the session.
        """
        self.sessions[-1] |= session
        set_random_state(self.random)  # what comes before may have drawn
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.events = None
        if self.world.first:
            place, wandb_id = self.folder / "train.events", self.sessions[-1].get("wandb")
            self.events = Events(place, self.folder.name, self.parts.cfg, self.history, wandb_id)
        shown = self.alone and self.world.first
        self.progress = Progress(self.meter.steps, self.solver.EPOCHS, self.epoch, shown)
        self.progress.test = "held out" if self.parts.dataset.HOLDOUT else "test"
        self._write_record("running")
        status = 1
        try:
            yield
            self.writer.wait()
            self._write_record("finished", **self._results())
            status = 0
            self.record = self.world.tell(self.record)
        except BaseException as error:
            if is_out_of_memory(error):
                error = out_of_memory(error)
            status = 1
            if isinstance(error, KeyboardInterrupt):
                status = 128 + getattr(error, "signum", signal.SIGINT)
            self._leave(error)
            raise
        finally:
            if self.table:
                self.table.flush()
            if self.events:
                self.events.close(status)

    def _leave(self, error: BaseException) -> None:
        """Save and record what an exception leaves.

        Raises:
            RunError, Stopped: in place of `error`, with what the folder keeps.
        """
        stopped, step = isinstance(error, KeyboardInterrupt), 0
        # A full disk must not hide what happened first.
        with suppress(RunError):
            self.writer.wait()
        whole = self.kept == len(self.history)
        del self.history[self.kept :]
        with suppress(RunError):
            if whole and self.meter.step and isinstance(error, Stopped):
                self._check_weights()
                save_state(self._state(), self.folder)
                step = self.meter.step
        with suppress(RunError):
            self._write_record("interrupted" if stopped else "failed", error=str(error))
        kept = f"{self.folder} keeps the state after {self._progress(step)}"
        if not os.path.exists(self.folder / LATEST):  # False, too, where it may not be asked
            kept = f"{self.folder} keeps no state"
        if isinstance(error, RunError):
            raise RunError(f"{error}; {kept}") from error
        if stopped:
            said = f"{str(error) or 'interrupted'}; {kept}; go on with --resume"
            raise Stopped(said, getattr(error, "signum", signal.SIGINT)) from None

    def plan(self) -> Epoch:
        """The epoch that comes: its order, views, schedule and, where it can, teacher logits."""
        epoch = self.epoch
        self.started = time.perf_counter() - self.spent
        (index, view), sizes = self._keys(epoch)
        index, view = index[self.meter.images :], view[self.meter.images :]
        teacher = None
        if self.table:
            before = self.table.misses
            with self.progress.filling(len(index)) as bar:

                def told(count: int) -> None:
                    bar.update(count)
                    self._check_stop()

                teacher = self.table.logits(index, view, told)
            if epoch > self.planned:  # not of an epoch that is trained anew
                missing, self.prefetched = self.prefetched + self.table.misses - before, 0
                share = 100 * (len(index) - missing) / max(1, len(index))
                self.hits = {"teacher_table_hits": share}
        elif self.logits_teacher is not None and not self.alone:
            # Beside other runs the step has no place for a teacher.
            batches = self.train_set.batches(index, view, self.parts.test_batch)
            teacher = logits_of(self.trainer.distiller.teacher, batches)
        self.planned = epoch
        self.progress.open(epoch)
        return Epoch(
            epoch,
            self._rates(epoch),
            self.trainer.distiller.schedule(epoch),
            index,
            view,
            sizes[self.meter.step :],
            teacher,
            self._uniforms(epoch),
            self._held_out(epoch),
            partial(self._mixed, epoch),
        )

    def begin(self) -> None:
        """Before the first step of an epoch that was planned: what came before is no part of its
        pace, and what the table lacks of the next epoch may be computed between the steps."""
        self.filling = time.perf_counter() - self.started - self.spent
        if self.table and self.table.resident and self.epoch < self.solver.EPOCHS:
            self.prefetched += self.table.prefetch(*self._keys(self.epoch + 1)[0])

    def _keys(self, epoch: int) -> tuple[tuple[Tensor, Tensor], list[int]]:
        """(images, views) of an epoch in this process, in order, and the sizes of its steps."""
        keys = self.train_set.draw(epoch_generator(self.solver.SEED, epoch))
        (index, view), sizes = self.world.divide(keys, self.solver.BATCH_SIZE)
        return (index, view), sizes

    def count(self, size: int, steps: int) -> None:
        """Count the steps of a launch, of `size` images each."""
        for _ in range(steps):
            self.meter.count(size)

    def launched(self, size: int, steps: int) -> None:
        """After a launch of this run alone."""
        self.count(size, steps)
        self.stepped()

    def stepped(self) -> None:
        """After each step, or each launch of some: compute some of what `begin` asked for, show how
        far the run is, and heed a signal to stop."""
        if self.table:
            self.table.work()
        self.progress(self.meter)
        self.spent = time.perf_counter() - self.started
        self.writer.check()
        self._check_stop()

    def end_epoch(self) -> None:
        """Read the meter, evaluate, and keep the epoch.

        Raises:
            RunError: a loss, a weight or a figure is not finite.
        """
        epoch, metrics = self.epoch, self.meter.read()
        seconds = time.perf_counter() - self.started
        try:
            self._check_weights()
            test_metrics = {}
            due = epoch % self.parts.log.EVAL_EVERY == 0 or epoch == self.solver.EPOCHS
            if due and self.world.first:
                test_metrics = numbers(self._evaluate())
        except RunError as error:
            raise RunError(f"after epoch {epoch}: {error}") from error
        figures = {
            "epoch": epoch,
            **self._planned(epoch),
            **metrics,
            **{f"test_{key}": value for key, value in test_metrics.items()},
            **self.hits,
            "images_per_s": self.meter.images / (seconds - self.filling),
            "seconds": time.perf_counter() - self.started,
        }
        # Of several processes all have the history, and later the record, of the first.
        self.history.append(self.world.tell(figures))
        self.meter.start(epoch + 1)
        self.spent = 0.0
        self._save()
        if self.events:
            self.events.add(self.history[-1])
            self.progress.close(self.history[-1])

    def may_stop(self) -> None:
        """Between two epochs: heed a signal, in all processes of the run at once."""
        if signum := self.world.largest(self.stop.signum):
            self.stop.signum = signum
        if not self.ended:
            self.stop.check()

    @property
    def finite(self) -> bool:
        """Whether the losses of the epoch and the weights are finite."""
        try:
            self.meter.read()
        except RunError:
            return False
        return self.trainer.finite

    def restore(self, kept: dict[str, Any]) -> None:
        """Go back to a state that `trainer.state_dict` gave in this epoch."""
        self.meter.start(self.epoch)
        self.trainer.load_state_dict(kept)

    def _planned(self, epoch: int) -> dict[str, float]:
        """The learning rate of the epoch's last step and what the method schedules."""
        method = self.trainer.distiller
        lr = self._rates(epoch)[-1]
        return {"lr": lr, **(method.planned if self.parts.ours else method.schedule)(epoch)}

    def _rates(self, epoch: int) -> list[float]:
        return rates(self.solver, epoch, self.meter.steps)

    def _uniforms(self, epoch: int) -> Tensor | None:
        """The epoch's random numbers by image, (N, draws); None for a method without."""
        draws = self.trainer.draws
        if not draws:
            return None
        generator = epoch_generator(self.solver.SEED, epoch, 2)
        return torch.rand(len(self.train_set), draws, generator=generator).to(self.device)

    def _held_out(self, epoch: int) -> Callable[[int], HeldOut | None]:
        """Held-out images and their labels, of the epoch's steps in which the method takes some."""
        every, solver = self.trainer.held_every, self.solver
        if not every:
            return lambda step: None
        keys = self.test_set.draw(epoch_generator(solver.SEED, epoch, 4))
        parts = list(zip(*(key.split(solver.BATCH_SIZE) for key in keys), strict=True))

        def held_out(step: int) -> HeldOut | None:
            if step % every:
                return None
            batch = self.test_set.batch(*parts[step // every % len(parts)])
            return batch.image, batch.target

        return held_out

    def _mixed(self, epoch: int, step: int, batch: Batch) -> Batch:
        """A step's batch, its images mixed if they are to be."""
        solver = self.solver
        if not (solver.MIXUP or solver.CUTMIX):
            return batch
        draws = epoch_draws(solver.SEED, epoch, 5, step)
        return mixed(batch, self.parts.classes, solver.MIXUP, solver.CUTMIX, draws)

    def _predict(self, network: nn.Module) -> Tensor:
        size = self.parts.test_batch
        # On a GPU small batches are all launching.
        return predict(
            network, self.test_set, max(size, 2500) if self.device.type == "cuda" else size
        )

    def _check_weights(self) -> None:
        if fault := self.trainer.fault():
            raise RunError(fault)

    def _teacher_logits(self, weights: Weights) -> Tensor:
        """The teacher's logits on the test set, (N, C)."""
        evaluate = partial(self._predict, self.trainer.distiller.teacher)
        # A method of the toolkit may change its teacher.
        return (
            self.shared.teacher_logits(self.parts, weights, evaluate)
            if self.parts.ours
            else evaluate()
        )

    def _evaluate(self) -> dict[str, Tensor]:
        self.logits_student = logits = self._predict(self.student)
        measured = performance(logits, self.test_set.targets)
        if self.logits_teacher is not None:
            measured |= fidelity(logits, self.logits_teacher)
        if average := self.trainer.average:
            found = performance(self._predict(average.module), self.test_set.targets)
            measured |= {f"ema_{name}": value for name, value in found.items()}
        return measured

    def _results(self) -> dict[str, Any]:
        """What the record of a finished run says beside its epochs."""
        if not self.world.first:
            return {}
        if self.logits_student is None:  # it lacked only its last record
            self.logits_student = self._predict(self.student)
        found = confusion(self.logits_student, self.test_set.targets)
        return {"by_class": by_class(found.tolist())}

    def _check_stop(self) -> None:
        """Heed a signal where nothing is half done; of several processes each would stop at
        another step."""
        if self.world.size == 1:
            self.stop.check()

    def _progress(self, step: int) -> str:
        within = f" and step {step} of {self.meter.steps} of the next" if step else ""
        return f"epoch {len(self.history)}{within}"

    def _save(self) -> None:
        """Write the epoch's checkpoints and record while the next one trains.

        `latest` comes after the others, it is what a resumed run starts from.
        """
        epoch = len(self.history)
        if not self.world.first:
            self.kept = epoch
            return
        state, record = self._state(), self._record("running")
        whole = state["model"].items()
        student = {k.removeprefix("student."): v for k, v in whole if k.startswith("student.")}
        average = {k.removeprefix("module."): v for k, v in state["average"].items()}
        average.pop("n_averaged", None)
        names = ["student_last"]
        if record.get("best_epoch") == epoch:
            names.append("student_best")
        if epoch % self.parts.log.SAVE_CHECKPOINT_FREQ == 0:
            names.append(f"student_{epoch}")

        def write() -> None:
            save({"model": student}, *(self.folder / name for name in names))
            if average:
                save({"model": average}, self.folder / "student_ema")
            save_state(state, self.folder)
            self.kept = epoch
            write_record(self.folder / "record.json", record)

        self.writer.start(write)

    def _state(self) -> dict[str, Any]:
        """What a run goes on from, as it is now."""
        return {
            "epoch": len(self.history),
            **snapshot(self.trainer.state_dict()),
            "random": random_state() if self.alone else self.random,
            "environments": self.facts["environments"],
            "history": list(self.history),
            "spent": self.spent,
            "planned": self._planned(self.epoch) if self.meter.step else {},
            "config": self.facts["config"],
            "teacher_sha256": self.teacher_sha256,
        }

    def _write_record(self, status: str, **more: Any) -> None:
        record = self._record(status, **more)
        if self.world.first:
            write_record(self.folder / "record.json", record)

    def _record(self, status: str, **more: Any) -> dict[str, Any]:
        self.record = self.facts | {
            "status": status,
            **more,
            **summary(self.history),
            "wall_seconds": sum(epoch["seconds"] for epoch in self.history),
            "peak_memory_bytes": peak_memory(self.device),
            "teacher_table": self.table.facts() if self.table else None,
            "epochs": list(self.history),
        }
        return self.record
