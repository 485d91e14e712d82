"""Kill training processes and studies at random moments; what they leave must be the whole run's.

    python tests/stress.py --kills 200 [--seed 0] [--folder FOLDER]

A process is killed with SIGKILL; one in four gets SIGTERM a moment before, as Slurm does. It is
then resumed, and killed again. Most kills wait for the process to enter a certain phase, because
some phases are too short to be met by chance. Every run ends with the weights, optimizer, random
states, record and TensorBoard scalars of a run that nobody disturbed, bit for bit.
"""

import argparse
import collections
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial, wraps
from pathlib import Path

import psutil
import torch
from conftest import CPU, ROOT, assert_same_run, untrained_teacher, write_study

from mdistiller_ext.config import load_cfg
from mdistiller_ext.engine import events, run, train, train_many, trainer
from mdistiller_ext.errors import Stopped
from mdistiller_ext.study.launch import processes, run_jobs
from mdistiller_ext.study.plan import read_study
from mdistiller_ext.teacher import TeacherTable

# A fork of this process does not have to import torch again. It has no threads yet.
FORK = multiprocessing.get_context("fork")
PHASES = {
    "training": (trainer, "train_epoch"),
    "evaluation": (run.Run, "_evaluate"),
    "checkpoint": (run, "save"),
    "state": (run, "save_state"),
    "record": (run, "write_record"),
    "events": (events.Events, "add"),
    "table": (TeacherTable, "logits"),
}
UNFINISHED = 3  # exit status of a study that lost one of its processes
EPOCHS, LIMIT = 4, 12  # kills of one run, so that runs also come to their end
METHODS = ("vanilla", "kd", "dkd_dat", "dkd_lp", "dkd_eat_dat_lp")


def config(method, folder):
    options = ["SOLVER.EPOCHS", str(EPOCHS), "LOG.PREFIX", str(folder), "EXPERIMENT.PROJECT", "p"]
    options += ["LOG.SAVE_CHECKPOINT_FREQ", "2", "DISTILLER.TEACHER_TABLE_ROOT", str(folder / "t")]
    if method != "vanilla":
        options += ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(folder.parent))]
    return load_cfg(ROOT / "configs" / "digits" / f"{method}.yaml", options)


def one_run(folder):
    train(config("dkd_eat_dat_lp", folder), "dkd_eat_dat_lp", CPU, resume=True)


def many_runs(folder):
    train_many([(config(method, folder), method) for method in METHODS], CPU, resume=True)


def study(folder):
    options = {"SOLVER.EPOCHS": EPOCHS, "DISTILLER.TEACHER_TABLE": "off"}
    write_study(folder / "study.yaml", "vanilla", "dkd", **options)
    teacher = ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(folder.parent))]
    jobs = read_study(folder / "study.yaml", folder, teacher).jobs
    if run_jobs(jobs, partial(processes, device=CPU, count=2)):
        sys.exit(UNFINISHED)


def child(work, folder, phases):
    """A process that trains, and tells in which phase it and the thread that writes are."""
    os.setpgid(0, 0)

    def telling(number, function):
        @wraps(function)
        def told(*args, **kwargs):
            which = int(threading.current_thread() is not threading.main_thread())
            before, phases[which] = phases[which], number
            try:
                result = function(*args, **kwargs)
                # A generator's phase lasts until it is used up.
                return result if not hasattr(result, "send") else inside(number, result)
            finally:
                phases[which] = before

        return told

    def inside(number, steps):
        for step in steps:
            phases[0] = number
            yield step
        phases[0] = 0

    for number, (owner, name) in enumerate(PHASES.values(), start=1):
        setattr(owner, name, telling(number, getattr(owner, name)))
    with (folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            work(folder)
        except Stopped as stopped:
            print(stopped)
            sys.exit(128 + stopped.signum)


def kill(process, phases, seconds, rng, aimed):
    """Kill it at a random moment, or let it end before. Returns the phase it was in, or ""."""
    names = ["", *PHASES]
    wanted = rng.randrange(len(names)) if aimed else 0  # a study's processes tell of no phase
    moment = time.monotonic() + rng.uniform(0, seconds * (0.5 if wanted else 0.9))
    while process.is_alive() and time.monotonic() < moment:
        time.sleep(0.0002)
    while process.is_alive() and wanted and wanted not in phases[:]:
        time.sleep(0.0002)
    time.sleep(rng.uniform(0, 0.004))
    if rng.random() < 0.25 and process.is_alive():
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.05))
    met = names[phases[1] or phases[0]] or "between"
    if not process.is_alive():
        return ""
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for member in rng.choice([family, family[:1], [rng.choice(family)]]):
        with suppress(ProcessLookupError):
            os.kill(member.pid, signal.SIGKILL)
    process.join()
    return "a study" if len(family) > 1 else met


def start(work, folder):
    phases = FORK.Array("i", 2, lock=False)
    process = FORK.Process(target=child, args=(work, folder, phases))
    process.start()
    return process, phases


def whole(work, folder):
    """The run that nobody disturbs; returns its seconds."""
    folder.mkdir(parents=True)
    begin = time.monotonic()
    process, _ = start(work, folder)
    process.join()
    assert process.exitcode == 0, (folder / "log.txt").read_text()
    return time.monotonic() - begin


def broken(work, folder, seconds, limit, rng):
    """The run that is killed up to `limit` times; returns how often in which phase."""
    folder.mkdir()
    met = collections.Counter()
    while True:
        process, phases = start(work, folder)
        hit = ""
        if met.total() < limit:
            hit = kill(process, phases, seconds, rng, aimed=work is not study)
        process.join()
        if hit:
            met[hit] += 1
        elif process.exitcode == 0:
            return met
        elif process.exitcode == 128 + signal.SIGTERM:  # it ended before it was killed
            met["stopped"] += 1
        else:
            assert process.exitcode == UNFINISHED, (folder / "log.txt").read_text()


def main(kills, seed, folder):
    torch.set_num_threads(1)
    rng, begin = random.Random(seed), time.monotonic()
    untrained = FORK.Process(target=untrained_teacher, args=(folder,))
    untrained.start()
    untrained.join()
    met, runs = collections.Counter(), 0
    works = (one_run, many_runs, study)
    seconds = {work: whole(work, folder / work.__name__) for work in works}
    while met.total() < kills:
        work = rng.choices(works, (4, 3, 3))[0]
        parts = folder / f"{work.__name__}-{runs}"
        limit = min(LIMIT, kills - met.total())
        met += broken(work, parts, seconds[work], limit, rng)
        compare(folder / work.__name__, parts)
        runs += 1
        shutil.rmtree(parts)
        print(f"{met.total()} kills, {runs} runs as if nothing had happened", flush=True)
    print(json.dumps(dict(met.most_common())))
    print(f"{time.monotonic() - begin:.0f} s, seed {seed}")


def compare(whole, parts):
    ends = sorted(file.parent.relative_to(whole) for file in whole.rglob("record.json"))
    assert ends == sorted(file.parent.relative_to(parts) for file in parts.rglob("record.json"))
    for end in ends:
        assert_same_run(whole / end, parts / end)
    assert not list(parts.rglob("*.part"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept where the run failed (default: new)")
    args = parser.parse_args()
    place = args.folder or Path(tempfile.mkdtemp(prefix="stress-"))
    main(args.kills, args.seed, place.resolve())
    shutil.rmtree(place)
