"""What a run shows while it goes on: TensorBoard events, wandb, the progress bar."""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar
from tqdm import tqdm
from yacs.config import CfgNode

from ..errors import ConfigError, brief
from ..files import writing
from .loop import Meter


def watched() -> bool:
    """Whether somebody sees a progress bar. A stream that is closed is None."""
    return sys.stderr is not None and sys.stderr.isatty()


class Events:
    """Scalars of each epoch for TensorBoard, and for wandb when LOG.WANDB asks for it.

    The files are derived from the run's history: a resumed run writes them anew, so that no
    epoch is there twice and none is missing. They are written in this thread: in SummaryWriter's
    own a full disk is not noticed, until its queue is full and the run stands still.

    Args:
        wandb_id: of the run there, which a resumed run goes on with; None without wandb.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        cfg: CfgNode,
        history: Sequence[dict[str, float]],
        wandb_id: str | None = None,
    ):
        self.folder = folder
        self.wandb = _wandb_run(cfg, name, wandb_id) if wandb_id else None
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            self.writer = RecordWriter(str(folder / f"events.out.tfevents.{int(time.time())}"))
            self._write(file_version="brain.Event:2")
        for epoch in history:
            self._tensorboard(epoch)

    def add(self, epoch: dict[str, float]) -> None:
        self._tensorboard(epoch)
        if self.wandb:
            self.wandb.log(epoch, step=int(epoch["epoch"]))

    def _tensorboard(self, epoch: dict[str, float]) -> None:
        with writing(self.folder):
            for name, value in epoch.items():
                if name != "epoch":
                    self._write(step=int(epoch["epoch"]), summary=scalar(name, value))
            self.writer.flush()

    def _write(self, **content: Any) -> None:
        self.writer.write(Event(wall_time=time.time(), **content).SerializeToString())

    def close(self, status: int = 0) -> None:
        """End them, with the exit status of a command: 0 for a run that is finished."""
        with suppress(OSError):  # every epoch was flushed
            self.writer.close()
        if self.wandb:
            self.wandb.finish(exit_code=status)


def _wandb_run(cfg: CfgNode, name: str, wandb_id: str) -> Any:
    """A run of wandb beside those of this process's other runs.

    Raises:
        ConfigError: wandb is not installed, or has none, as without a login.
    """
    try:
        import wandb

        return wandb.init(
            project=cfg.EXPERIMENT.PROJECT,
            name=name,
            id=wandb_id,
            resume="allow",
            reinit="create_new",
            config=dict(cfg),
        )
    except ImportError as error:
        raise ConfigError(
            "LOG.WANDB: True, but wandb is not installed: pip install wandb"
        ) from error
    except Exception as error:  # of its own kinds
        raise ConfigError(f"LOG.WANDB: True, but wandb says: {brief(str(error))}") from error


class Progress:
    """A live bar for the epoch, with the time left for the run; nothing where no one looks.

    Without `show` there is no bar: reading the meter would make one run of several wait.
    """

    REFRESH = 0.5  # seconds between two readings of the device
    test = "test"  # what the run evaluates on

    def __init__(self, steps: int, epochs: int, first_epoch: int, show: bool) -> None:
        self.steps, self.epochs, self.first, self.show = steps, epochs, first_epoch, show
        self.start = self.read_at = time.perf_counter()
        self.bar: tqdm | None = None

    @contextmanager
    def filling(self, total: int) -> Iterator[tqdm]:
        """A bar for the teacher's answers of an epoch; its time is no part of the run's pace."""
        start = time.perf_counter()
        with tqdm(
            total=total,
            desc="teacher",
            disable=not (self.show and watched()),
            leave=False,
        ) as bar:
            yield bar
        self.start += time.perf_counter() - start

    def open(self, epoch: int) -> None:
        self.epoch_start = time.perf_counter()
        self.bar = tqdm(
            total=self.steps,
            desc=f"epoch {epoch}/{self.epochs}",
            disable=not (self.show and watched()),
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {remaining} left{postfix}",
        )

    def __call__(self, meter: Meter) -> None:
        assert self.bar is not None
        now = time.perf_counter()
        if not self.show:
            return
        if now - self.read_at < self.REFRESH and meter.step < self.steps:
            return
        self.read_at = now
        so_far = meter.read()
        self.bar.set_postfix_str(
            f"loss {so_far['loss']:.3f}, top-1 {so_far['train_top1']:.1f} %, "
            f"{meter.images / (now - self.epoch_start):.0f} images/s, "
            f"run {self.left(meter.epoch - 1 + meter.step / self.steps)} left",
            refresh=False,
        )
        self.bar.update(meter.step - self.bar.n)

    def left(self, epochs_done: float) -> timedelta:
        """The time the rest of the run takes at its pace so far."""
        done = epochs_done - (self.first - 1)
        pace = (time.perf_counter() - self.start) / max(done, 1e-9)
        return timedelta(seconds=round(pace * (self.epochs - epochs_done)))

    def close(self, epoch: dict[str, float]) -> None:
        """Replace the bar by a line that stays."""
        assert self.bar is not None
        self.bar.close()
        hits = epoch.get("teacher_table_hits")
        table = "" if hits is None else f"table {hits:.0f} %  "
        test = f"{self.test} {epoch['test_top1']:.2f} %  " if "test_top1" in epoch else ""
        if "test_ema_top1" in epoch:
            test += f"of the average {epoch['test_ema_top1']:.2f} %  "
        terms = " ".join(f"{k[5:]} {v:.3f}" for k, v in epoch.items() if k.startswith("loss_"))
        print(
            f"epoch {epoch['epoch']:>3}/{self.epochs}  loss {epoch['loss']:.3f} ({terms})  "
            f"train {epoch['train_top1']:.2f} %  {test}"
            f"{epoch['images_per_s']:.0f} images/s  {table}{self.left(epoch['epoch'])} left",
            flush=True,
        )
