"""From a config to a finished run, or several: folders, locks and teachers."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from yacs.config import CfgNode

from ..config import load_cfg
from ..data import facts, identity, is_own, trained_on
from ..errors import ConfigError, RunError
from ..files import discard_parts, load, write_atomically, writing
from ..memory import is_out_of_memory, out_of_memory
from ..models import pretrained
from ..plugins import import_modules
from ..sections import Parts
from ..teacher import PRETRAINED, Weights, digest, fetch_weights, kept_at, load_weights
from . import chain
from .fit import Job, fit, fit_rows, stack_form, without_traceback
from .folder import (
    ANEW,
    default_name,
    differences,
    earlier_state,
    finished_before,
    plain,
    set_aside,
)
from .graph import CaptureError
from .identity import found_weights, other_inputs
from .record import read_record
from .replicas import World
from .run import Finished, Run
from .shared import Shared
from .stop import StopSignals
from .trainer import Trainer, kind

LEFT_OUT = ("HOLDOUT", "HOLDOUT_SEED", "LIMIT")  # keys of DATASET: what is not trained on
LOCK_WAIT = 10.0  # seconds: what holds a run's folder may just have been told to stop


def train(
    cfg: CfgNode,
    name: str,
    device: torch.device,
    *,
    resume: bool = False,
    world: World | None = None,
    weights: Weights | None = None,
    patience: float | None = None,
    fresh: bool = False,
    former: str = "",
) -> tuple[dict[str, Any], Path]:
    """Train as a config says, in the folder LOG.PREFIX/EXPERIMENT.PROJECT/name.

    The processes of `world`, each of which calls this, share every batch. A teacher's `weights`
    that are not given are looked for. A folder that another process works in is waited for, at
    most `patience` seconds, by default LOCK_WAIT. Of a run that is finished already its record is
    returned, if config, teacher, images and code are those of this call. With `fresh` what the
    folder holds is moved to NAME,old1 beside it, and a run begins. A `former` name is that of the
    folder of a run that goes on and is called `name` from now on.

    Returns:
        The record and the folder.

    Raises:
        ConfigError: the folder holds a run already and `resume` is false, or that run's config,
            teacher or images differ, or of a finished run the code of modules of one's own.
        RunError: another process works in the folder, data or weights are not to be had, or the
            loss became non-finite. What was saved stays as it is.
        Stopped: a signal came; the run is saved as it was after the step of the moment.
    """
    with StopSignals() as stop:
        shared = Shared(device, stop, world)
        with opened(cfg, name, None, shared, resume, weights, patience, fresh, former) as run:
            if isinstance(run, Run):
                fit(run)
            return run.record, run.folder


def train_many(
    jobs: Sequence[tuple[CfgNode, str]],
    device: torch.device,
    *,
    resume: bool = False,
    together: int | None = None,
) -> list[dict[str, Any] | BaseException]:
    """Train several runs in this process; each is the run that `train` would make of it.

    Data and teacher tables are shared. Those of one student, data set and SOLVER are trained at
    once, as SOLVER.STACK says, the others one after the other.

    Args:
        jobs: (config, name) of each run.
        together: how many are trained at once; the others follow. By default all.

    Returns:
        Their records, in order; the exception of one that failed, which stops no other.

    Raises:
        ConfigError: SOLVER.STACK of one of them names a form that it does not allow.
        CaptureError: a CUDA graph's capture failed.
        Stopped: a signal came; the runs are saved as they were after the steps of the moment.
    """
    results: dict[int, Any] = {}
    with StopSignals() as stop:
        shared = Shared(device, stop)
        for group in _alike(jobs, device):
            if len(group) > 1:
                form = stack_form(group[0][1], device)
                opens = partial(opened, shared=shared, resume=resume, alone=False)
                count = min(together or len(group), len(group))
                results |= fit_rows(group, count, form, stop, opens)
                continue
            for number, cfg, name in group:
                try:
                    with opened(cfg, name, None, shared=shared, resume=resume) as run:
                        if isinstance(run, Run):
                            fit(run)
                        results[number] = run.record
                except CaptureError:
                    raise
                except Exception as error:
                    results[number] = without_traceback(error)
    return [results[number] for number in range(len(jobs))]


def _alike(jobs: Sequence[tuple[CfgNode, str]], device: torch.device) -> list[list[Job]]:
    """The jobs in groups of those that can be rows of one program."""
    groups: dict[str, list[Job]] = {}
    for number, (cfg, name) in enumerate(jobs):
        key = str(number)
        if stack_form(cfg, device) != "none":
            parts = Parts.read(cfg)
            solver = replace(parts.solver, SEED=0)
            key = repr((parts.networks.STUDENT, parts.dataset, solver))
        groups.setdefault(key, []).append((number, cfg, name))
    return list(groups.values())


@contextmanager
def opened(
    cfg: CfgNode,
    name: str,
    trainer: Trainer | None,
    shared: Shared,
    resume: bool,
    weights: Weights | None = None,
    patience: float | None = None,
    fresh: bool = False,
    former: str = "",
    alone: bool = True,
) -> Iterator[Run | Finished]:
    """A run, new or as it was left, while its folder is locked.

    Args:
        trainer: what the run before has left; it is used again if it fits.
    """
    import_modules(cfg.EXPERIMENT.IMPORT)  # in a process that did not read the config
    home, world = Path(cfg.LOG.PREFIX, cfg.EXPERIMENT.PROJECT), shared.world
    folder = home / (former or name)
    with ExitStack() as stack:
        state = record = None
        if world.first:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                lock = _locked(folder, LOCK_WAIT if patience is None else patience, shared.stop)
                stack.callback(_leave, folder, lock)
                discard_parts(folder)
            if fresh:
                set_aside(folder)
            record = finished_before(cfg, folder, resume)
            state = None if record else earlier_state(cfg, folder, resume)
            before = record or state
            if before and (apart := other_inputs(cfg, before, shared, weights)):
                which = "finished" if record else "stopped"
                raise ConfigError(f"{folder} holds a {which} run of {', '.join(apart)}: {ANEW}")
            if former and not record:
                with writing(home / name):
                    folder.rename(home / name)
        if former and not world.tell(record):
            folder = home / name
        if record := world.tell(record):
            print(f"{folder}: finished already")
            yield Finished(record, folder)
            return
        try:
            weights = None if cfg.DISTILLER.TYPE == "NONE" else weights or _teacher(cfg, shared)
            if world.tell(state is not None) and not world.first:
                state = load(folder / "latest")
            if state and weights:
                _same_teacher(weights, state["teacher_sha256"], folder)
            if trainer and (trainer.kind != kind(cfg) or trainer.weights is not weights):
                trainer = None
            run = Run(Parts.read(cfg), folder, shared, weights, state, trainer, alone)
        except BaseException as error:
            if former and world.first:  # it does not go on
                folder.rename(home / former)
            if is_out_of_memory(error):
                raise out_of_memory(error) from error
            raise
        if former:
            print(f"{home / former}: is called {name} from now on")
        yield run


def _locked(folder: Path, patience: float, stop: StopSignals) -> FileLock:
    """The lock of a folder, taken; a signal to stop is heeded while it is waited for.

    Raises:
        RunError: another process had it all the time.
    """
    lock, end = FileLock(folder / "lock"), time.monotonic() + patience
    while True:
        try:
            lock.acquire(timeout=min(1.0, max(0.0, end - time.monotonic())))
            return lock
        except Timeout:
            stop.check()
            if time.monotonic() >= end:
                raise RunError(f"{folder} is in use by another process") from None


def _leave(folder: Path, lock: FileLock) -> None:
    """Release a folder's lock; a run that never began leaves no folder."""
    with suppress(OSError):
        if os.listdir(folder) == ["lock"]:
            shutil.rmtree(folder)
    lock.release()


def _same_teacher(weights: Weights, expected: str, folder: Path) -> None:
    if weights.sha256 != expected:
        raise ConfigError(
            f"{weights.file}: not the teacher that {folder} was trained with "
            f"(sha256 {weights.sha256}, expected {expected})"
        )


def teacher_weights(cfg: CfgNode, device: torch.device) -> Weights:
    """The teacher's weights: found, trained as DISTILLER.TEACHER_CFG says, or downloaded."""
    return _teacher(cfg, Shared(device, StopSignals()))


def _teacher(cfg: CfgNode, shared: Shared) -> Weights:
    node = cfg.DISTILLER
    if node.ASSISTANTS:
        first = shared.world.first  # the others wait for it
        file = shared.world.tell(chain.assistant(cfg, shared.device) if first else None)
        network = chain.link(cfg).DISTILLER.STUDENT
        return shared.once(load_weights(file)._replace(network=network))
    if node.TEACHER_CKPT == PRETRAINED:
        known = facts(cfg.DATASET)
        state = pretrained(node.TEACHER, known.classes, known.side)
        return shared.once(Weights(state, Path(node.TEACHER), digest(state)))
    file = teacher_file(cfg, shared.device, shared.world)
    if line := _of_other_images(cfg, file, shared):
        print(f"warning: {line}")
    return shared.weights(file)


def _of_other_images(cfg: CfgNode, file: Path, shared: Shared) -> str:
    """A line on a teacher that was trained here on images that have changed since, or ""."""
    kept, node = file.with_suffix(".json"), cfg.DATASET
    # Neither is the teacher's, and with either the images are others than it was told.
    if node.HOLDOUT or node.PADDING >= 0 or not (is_own(node.TYPE) and kept.exists()):
        return ""
    before = read_record(kept)["environments"][-1].get("data")
    if before in (None, shared.fingerprint(node)):
        return ""
    return f"{file}: this teacher was trained on other images or labels: remove it to train it anew"


def teacher_file(cfg: CfgNode, device: torch.device, world: World) -> Path:
    file = None
    if world.first:
        file = found_weights(cfg)
        if file and (line := other_config(cfg, file)):
            print(f"warning: {line}")
        if not file and cfg.DISTILLER.TEACHER_CFG:
            file = train_teacher(cfg, device)
        file = file or fetch_weights(cfg.DISTILLER.TEACHER, identity(cfg.DATASET))
    return world.tell(file)


def other_config(cfg: CfgNode, file: Path) -> str:
    """A line on a teacher that was trained here by another DISTILLER.TEACHER_CFG, or ""."""
    kept, node = file.with_suffix(".json"), cfg.DISTILLER
    if not node.TEACHER_CFG or node.TEACHER_CKPT or not kept.exists():
        return ""
    apart = differences(read_record(kept)["config"], plain(teacher_config(cfg)))
    if not apart:
        return ""
    return (
        f"{file}: this teacher was trained by another config than {node.TEACHER_CFG}: "
        f"{'; '.join(apart)}: remove it to train it anew"
    )


def teacher_config(cfg: CfgNode) -> CfgNode:
    """DISTILLER.TEACHER_CFG with the run's folders and images.

    Raises:
        ConfigError: it does not train the teacher of this run.
    """
    name, dataset = cfg.DISTILLER.TEACHER, cfg.DATASET.TYPE
    data = _of_data(cfg, "ROOT", "SIDE", "MEAN", "STD", *LEFT_OUT)
    where = cfg.DISTILLER.TEACHER_CFG
    try:
        teacher_cfg = load_cfg(where, ["LOG.PREFIX", cfg.LOG.PREFIX, *data])
    except ConfigError as error:
        faults = [fault.removeprefix(f"--cfg {where}: ") for fault in str(error).splitlines()]
        lines = [f"DISTILLER.TEACHER_CFG {where}: {fault}" for fault in faults]
        raise ConfigError("\n".join(lines)) from error
    if teacher_cfg.DISTILLER.TYPE != "NONE" and teacher_cfg.DISTILLER.TEACHER_CFG:
        raise ConfigError(  # it could lead back here, and wait for itself
            f"DISTILLER.TEACHER_CFG: {where} has a DISTILLER.TEACHER_CFG too, expected a config "
            f"that trains without a teacher or names DISTILLER.TEACHER_CKPT"
        )
    trained = teacher_cfg.DISTILLER.STUDENT, teacher_cfg.DATASET.TYPE
    if trained != (name, dataset):
        raise ConfigError(
            f"DISTILLER.TEACHER_CFG: {where} trains {trained[0]} on "
            f"{trained[1]}, expected {name} on {dataset}"
        )
    return teacher_cfg


def _of_data(cfg: CfgNode, *keys: str) -> list[Any]:
    """The options KEY VALUE of some keys of DATASET."""
    return [word for key in keys for word in (f"DATASET.{key}", cfg.DATASET[key])]


def train_teacher(cfg: CfgNode, device: torch.device) -> Path:
    """Train the teacher and keep it, with its record, in `checkpoints/` of the working folder."""
    name, dataset, teacher_cfg = cfg.DISTILLER.TEACHER, cfg.DATASET.TYPE, teacher_config(cfg)
    file = kept_at(name, trained_on(cfg.DATASET))
    named = [*LEFT_OUT[:2]] * bool(cfg.DATASET.HOLDOUT) + [*LEFT_OUT[2:]] * bool(cfg.DATASET.LIMIT)
    run = default_name(teacher_cfg, _of_data(cfg, *named))
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_suffix(".lock")).acquire()
    with lock:
        if not file.exists():
            print(f"no weights of {name} on {dataset} yet: training it first, {file} will keep it")
            _, folder = train(teacher_cfg, run, device, resume=True)
            for source, kept in (
                ("record.json", file.with_suffix(".json")),
                ("student_last", file),
            ):
                with (folder / source).open("rb") as content:
                    write_atomically(kept, partial(shutil.copyfileobj, content))
    return file
