"""Running a study's jobs: a process each, as many at once as the machine allows."""

import json
import multiprocessing
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..engine import pick_device, train, train_many
from ..engine.folder import finished_record
from ..engine.record import printable, read_record
from ..errors import ConfigError, RunError
from .plan import Job

LOG = "log.txt"
PATIENCE = 1.0  # seconds between two looks at the running records


def run_jobs(
    jobs: Sequence[Job], device: torch.device, processes: int, together: int
) -> dict[str, str]:
    """Run what is not finished; a run that stopped goes on, one that fails stops no other.

    A run prints to `log.txt` in its folder.

    Args:
        processes: how many at once; on a CPU they divide its threads.
        together: runs that one process trains at once, for a GPU.

    Returns:
        name -> what went wrong, of the jobs that did not come to their end.
    """
    left = [job for job in jobs if not finished(job)]
    print(f"{len(jobs)} runs: {len(jobs) - len(left)} finished already, {len(left)} to go")
    pending = deque(left[i : i + together] for i in range(0, len(left), together))
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    running: dict[Any, tuple[Any, list[Job]]] = {}
    epochs = sum(job.cfg.SOLVER.EPOCHS for job in left)
    with tqdm(total=epochs, desc="study", unit=" epochs", disable=not sys.stderr.isatty()) as bar:
        done = 0
        before = sum(state(job)[1] for job in left)
        bar.update(before)
        while pending or running:
            while pending and len(running) < processes:
                group = list(pending.popleft())
                process = context.Process(target=work, args=(group, str(device), threads))
                process.start()
                running[process.sentinel] = process, group
            for sentinel in wait(list(running), PATIENCE):
                process, group = running.pop(sentinel)
                process.join()
                done += len(group)
            bar.update(sum(state(job)[1] for job in left) - bar.n)
            failed = sum(state(job)[0] == "failed" for job in left)
            bar.set_postfix_str(f"{done} of {len(left)} runs, {failed} failed")
    return {job.name: _reason(job) for job in left if not finished(job)}


def work(jobs: list[Job], device: str, threads: int) -> None:
    """One process's part: train the jobs, with everything they print in their folders."""
    torch.set_num_threads(threads)
    jobs[0].folder.mkdir(parents=True, exist_ok=True)
    with (jobs[0].folder / LOG).open("a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            place = pick_device(device)
            if len(jobs) == 1:
                train(jobs[0].cfg, jobs[0].name, place, resume=True)
            else:
                pairs = [(job.cfg, job.name) for job in jobs]
                for result in train_many(pairs, place, resume=True):
                    if isinstance(result, Exception):
                        print(f"error: {result}")
        except (ConfigError, RunError, OSError) as error:
            print(f"error: {error}", flush=True)
            sys.exit(1)


def finished(job: Job) -> bool:
    """Whether it has come to its end, by a record that can be believed."""
    try:
        return finished_record(job.folder) is not None
    except RunError:
        return False


def state(job: Job) -> tuple[str, int]:
    """(status, epochs trained), as its record says while it runs; ("new", 0) without one."""
    try:
        record = json.loads((job.folder / "record.json").read_text())
        return record["status"], len(record["epochs"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "new", 0


def _reason(job: Job) -> str:
    """Why a job did not finish: what its record or its log says last."""
    with suppress(RunError):
        error = read_record(job.folder / "record.json").get("error")
        if error:
            return printable(str(error))
    log = job.folder / LOG
    lines = log.read_text().splitlines() if log.exists() else []
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else f"its process ended; see {Path(log)}"
