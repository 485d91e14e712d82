"""Running a study's jobs: which are left, who runs them, how far they are, what went wrong."""

import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from ..engine import StopSignals, pick_device, train, train_many
from ..engine.environment import CODE
from ..engine.events import watched
from ..engine.folder import differences, plain
from ..engine.identity import other_inputs
from ..engine.record import printable, read_record
from ..engine.shared import Shared
from ..errors import ConfigError, RunError, Stopped, counted
from ..files import writing
from .plan import Job, Study

LOG = "log.txt"
SOME = 3  # names of runs in one line
PATIENCE = 1.0  # seconds between two looks at the running records
# What its processes would each import; every optimizer asks for torch._dynamo, digits for sklearn.
# None of them may ask for a GPU: what has one cannot be forked.
PRELOADED = [__name__, "torch._dynamo", "sklearn.model_selection"]

# Runs jobs, so many at once in each process; yields how many ended since the last time, at least
# every PATIENCE.
Launcher = Callable[[Sequence[Job], int], Iterator[int]]


def run_jobs(jobs: Sequence[Job], launcher: Launcher, together: int = 1) -> dict[str, str]:
    """Run what is not finished; a run that stopped goes on, one that fails stops no other.

    A run prints to `log.txt` in its folder; here it is a line when it has ended. Where a folder
    holds another run than its job's, which the report would leave out, nothing is run.

    Args:
        together: runs that one process trains at once, for a GPU.

    Returns:
        name -> what went wrong, of the jobs that did not come to their end.
    """
    if wrong := other_runs(jobs):
        return wrong
    left = [job for job in jobs if not finished(job)]
    if left and (line := other_code(jobs)):
        print(f"warning: {line}", flush=True)
    print(
        f"{counted(len(jobs), 'run')}: {len(jobs) - len(left)} finished already, {len(left)} to "
        f"go; each says how it goes on in {Path(jobs[0].folder.parent, '*', LOG)}",
        flush=True,
    )
    for job in left[:1]:
        with writing(job.folder):  # one line now, instead of one from each process
            job.folder.mkdir(parents=True, exist_ok=True)
    epochs, said = sum(job.cfg.SOLVER.EPOCHS for job in left), set[str]()
    states = {job.name: state(job) for job in left}
    before = sum(trained for _, trained in states.values())
    # `initial` is left out of the time that tqdm foresees: it was not trained now.
    with tqdm(
        total=epochs, initial=before, desc="study", unit=" epochs", disable=not watched()
    ) as bar:
        for _ in launcher(left, together):
            now = {job.name: state(job) for job in left}
            for name, (status, trained) in now.items():
                if status in ("finished", "failed") and now[name] != states[name]:
                    said.add(name)
                    bar.write(f"{name}: {status} after epoch {trained}, {len(said)} of {len(left)}")
            states = now
            bar.update(sum(trained for _, trained in states.values()) - bar.n)
            failed = sum(status == "failed" for status, _ in states.values())
            bar.set_postfix_str(f"{len(said)} of {len(left)} runs, {failed} failed")
    return {job.name: _reason(job) for job in left if not finished(job)}


def processes(
    jobs: Sequence[Job], together: int, device: torch.device, count: int
) -> Iterator[int]:
    """A Launcher: `count` processes of this machine; on a CPU they divide its threads.

    A process that trains several runs at once gets its share of them all, so that where one has
    ended another can take its place.

    Raises:
        Stopped: a signal came; it was passed on, and every run is saved.
    """
    groups = [[job] for job in jobs] if together == 1 else [jobs[i::count] for i in range(count)]
    pending = deque(group for group in groups if group)
    threads = max(1, torch.get_num_threads() // count)
    context: Any = multiprocessing.get_context()
    if "forkserver" in multiprocessing.get_all_start_methods():  # Windows only spawns
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
    running: dict[Any, tuple[Any, Sequence[Job]]] = {}
    with StopSignals() as stop:
        while pending or running:
            while pending and len(running) < count:
                group = pending.popleft()
                process = context.Process(
                    target=_alone, args=(group, str(device), threads, together)
                )
                process.start()
                running[process.sentinel] = process, group
            ended = 0
            for sentinel in wait(list(running), PATIENCE):
                process, group = running.pop(sentinel)
                process.join()
                ended += len(group)
            yield ended
            if stop.signum:
                for process, _ in running.values():
                    process.terminate()
                for process, _ in running.values():
                    process.join()
                stop.check()


def _alone(jobs: Sequence[Job], device: str, threads: int, together: int) -> None:
    """A process of `processes`: it stops when that tells it to, or is no more."""
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on once

    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    work(jobs, device, threads, together)


def work(jobs: Sequence[Job], device: str, threads: int, together: int) -> None:
    """One process's part: train the jobs, with everything they print in the first one's folder."""
    torch.set_num_threads(threads)
    jobs[0].folder.mkdir(parents=True, exist_ok=True)
    with (
        (jobs[0].folder / LOG).open("a", buffering=1) as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        try:
            place = pick_device(device)
            if len(jobs) == 1:
                train(jobs[0].cfg, jobs[0].name, place, resume=True)
            else:
                pairs = [(job.cfg, job.name) for job in jobs]
                results = train_many(pairs, place, resume=True, together=together)
                for job, result in zip(jobs, results, strict=True):
                    if isinstance(result, Exception):
                        with suppress(OSError), (job.folder / LOG).open("a") as own:
                            print(f"error: {result}", file=own)
        except Stopped as stopped:
            print(stopped)
        except Exception as error:
            if not isinstance(error, (ConfigError, RunError, OSError)):
                traceback.print_exc()
            print(f"error: {error or type(error).__name__}")


def finished(job: Job) -> bool:
    """Whether it has come to its end, by a record that can be believed."""
    record = _record(job)
    return record is not None and record["status"] == "finished"


def progress(study: Study) -> str:
    """A line an arm: its config, how many of its runs are finished; and the time that is left."""
    seconds, lines = [], []
    for student in study.students:
        for arm in study.arms:
            jobs = [job for job in study.jobs if (job.student, job.arm) == (student, arm)]
            records = [record for job in jobs if (record := _record(job))]
            done = [record for record in records if record["status"] == "finished"]
            trained = sum(len(record["epochs"]) for record in records)
            seconds += [epoch["seconds"] for record in records for epoch in record["epochs"]]
            epochs = sum(job.cfg.SOLVER.EPOCHS for job in jobs)
            lines.append(
                f"{student}, {arm}: {jobs[0].cfg.DISTILLER.TYPE}, {len(done)} of {len(jobs)} runs "
                f"finished, {trained:,} of {epochs:,} epochs"
            )
    left = sum(job.cfg.SOLVER.EPOCHS - state(job)[1] for job in study.jobs)
    last = f"epochs left: {left:,}"
    if seconds:
        hours = left * median(seconds) / 3600
        last += f", {hours:.1f} hours of one process at the pace so far"
    return "\n".join([*lines, last])


def other_runs(jobs: Sequence[Job]) -> dict[str, str]:
    """name -> why the record in a job's folder is that of another run, and the way on."""
    shared = Shared(torch.device("cpu"), StopSignals())  # reads each file once
    return {job.name: reason for job in jobs if (reason := _other_run(job, shared))}


def _other_run(job: Job, shared: Shared) -> str:
    record, which = _record(job), str(job.folder)
    if record is None:
        return ""
    if record["name"] != job.name:
        fault = f"a copy of {record['name']}"
    elif apart := differences(record["config"], plain(job.cfg)):
        fault = f"made with another config: {'; '.join(apart)}"
    elif record["epochs"] and (apart := other_inputs(job.cfg, record, shared)):
        fault, which = f"made with {', '.join(apart)}", f"it from {job.folder.parent}"
    else:
        return ""
    return printable(f"{fault}; remove {which}, or give the study another `name:` or --output")


def other_code(jobs: Sequence[Job]) -> str:
    """A line on runs that other code of this package has made, or ""."""
    records = [record for job in jobs if (record := _record(job)) and record["epochs"]]
    codes = [record["environments"][-1].get("code", CODE) for record in records]
    others = [str(code)[:12] for code in codes if code != CODE]
    if not others:
        return ""
    return (
        f"{counted(len(others), 'run')} made by other code of mdistiller_ext (sha256 "
        f"{', '.join(dict.fromkeys(others))}, this is {CODE[:12]}): `report` sets new ones beside "
        f"them only with --allow code"
    )


def grouped(reasons: Mapping[str, str]) -> list[str]:
    """A line for each reason, with the runs that have it."""
    runs = defaultdict(list)
    for name, reason in reasons.items():
        runs[reason].append(name)
    lines = []
    for reason, names in runs.items():
        more = f" and {len(names) - SOME} more" if len(names) > SOME else ""
        lines.append(f"{', '.join(names[:SOME])}{more}: {reason}")
    return lines


def state(job: Job) -> tuple[str, int]:
    """(status, epochs trained), as its record says while it runs; ("new", 0) without one."""
    file = job.folder / "record.json"
    try:
        return _state(file, file.stat().st_mtime_ns)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "new", 0


@lru_cache(maxsize=1 << 14)
def _state(file: Path, mtime_ns: int) -> tuple[str, int]:
    record = json.loads(file.read_text())
    return record["status"], len(record["epochs"])


def _record(job: Job) -> dict[str, Any] | None:
    try:
        return read_record(job.folder / "record.json")
    except RunError:
        return None  # there is none, or it is damaged, which the run says


def _reason(job: Job) -> str:
    """Why a job did not finish: what its record or its log says last."""
    with suppress(RunError):
        error = read_record(job.folder / "record.json").get("error")
        if error:
            return printable(str(error))
    log = job.folder / LOG
    lines = log.read_text().splitlines() if log.exists() else []
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else f"its process ended; see {log}"
