"""Many runs at once and one long run, on scikit-learn's digits.

    python tests/load.py [--runs 64] [--epochs 1000]

All runs of a study at once, as `tools/compare.py run --jobs` starts them: none has a teacher to
begin with, all share one table of its outputs, and each must leave a record that can be believed
and that has the bits of the same run made alone. Then one run of many epochs on a few images in
this process, which must not hold more and more: tensors, objects, memory.
"""

import argparse
import gc
import os
import sys
import time
import tracemalloc
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from conftest import CPU, ROOT, TIMES, first, untrained_teacher

from mdistiller_ext.config import load_cfg
from mdistiller_ext.data import digits
from mdistiller_ext.engine import StopSignals, pick_device
from mdistiller_ext.engine.shared import Shared
from mdistiller_ext.engine.training import opened
from mdistiller_ext.study.launch import processes, run_jobs, work
from mdistiller_ext.study.plan import Study, read_study
from mdistiller_ext.study.records import collect

CONFIGS = ROOT / "configs" / "digits"
ARMS = {
    "alone": {"cfg": "vanilla.yaml"},
    "KD": {"cfg": "kd.yaml"},
    "DKD": {"cfg": "dkd.yaml"},
    "all three": {"cfg": "dkd_eat_dat_lp.yaml"},
}
EPOCHS = 3
FEW = 64  # images of the long run
BLOCKS = 12  # the parts of the long run
# More after each epoch. Its metrics, which stay, are a dict of 26 floats.
ALLOWED = {"tensors": 0, "objects": 2, "traced bytes": 4096, "resident bytes": 16384}


def crowd(runs: int, folder: Path) -> list[str]:
    """Start so many runs at once in an empty working folder; one line for each that is wrong."""
    together, alone = (study(runs, folder / name) for name in ("together", "alone"))
    start = time.perf_counter()
    run_jobs(together.jobs, partial(processes, device=CPU, count=runs))
    middle = time.perf_counter()
    for job in alone.jobs:
        work([job], "cpu", threads=1, together=1)  # as many as each of many processes has
    end = time.perf_counter()
    (records, faults), (expected, faults_alone) = collect(together), collect(alone)
    histories = {name: untimed(record["epochs"]) for name, record in expected.items()}
    for name, record in records.items():
        history = untimed(record["epochs"])
        if len(history) != EPOCHS or history != histories.get(name):
            faults.append(f"{name}: not the run that it is alone")
    if len({r["teacher"]["sha256"] for r in records.values() if r["teacher"]}) > 1:
        faults.append("the runs have different teachers")
    faults += [f"alone: {fault}" for fault in faults_alone]
    print(
        f"{runs} runs: {len(faults)} faults; {middle - start:.0f} s all at once, "
        f"{end - middle:.0f} s one by one",
        *faults,
        sep="\n",
    )
    return faults


def study(runs: int, folder: Path) -> Study:
    """So many runs, a quarter of them without a teacher, which the others train first."""
    folder.mkdir(parents=True)
    teacher = {
        "DATASET": {"TYPE": "digits"},
        "DISTILLER": {"STUDENT": "resnet8"},
        "SOLVER": {"EPOCHS": 1},
    }
    (folder / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    tree = {
        "name": "load",
        "students": {"resnet8": str(CONFIGS)},
        "seeds": list(range(-(-runs // len(ARMS)))),
        "baseline": "DKD",
        "alone": "alone",
        "arms": ARMS,
        "options": {
            "SOLVER.EPOCHS": EPOCHS,
            "DISTILLER.TEACHER": "resnet8",
            "DISTILLER.TEACHER_CFG": str(folder / "teacher.yaml"),
            "DISTILLER.TEACHER_TABLE_ROOT": str(folder / "table"),
        },
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    built = read_study(folder / "study.yaml", folder / "output")
    del built.jobs[runs:]
    return built


def untimed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in epoch.items() if k not in TIMES} for epoch in history]


def long_run(epochs: int, folder: Path) -> tuple[list[dict[str, int]], list[float]]:
    """Of one run: what it holds after each of BLOCKS equal parts, and the time of each epoch."""
    options: list[Any] = ["SOLVER.EPOCHS", epochs, "LOG.PREFIX", str(folder / "output")]
    options += ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(folder))]
    options += ["DISTILLER.TEACHER_TABLE_ROOT", str(folder / "table")]
    cfg = load_cfg(CONFIGS / "dkd_eat_dat_lp.yaml", options)
    shared = Shared(CPU, StopSignals())
    train, test = (first(images, FEW) for images in digits.load())
    shared.sets[cfg.DATASET.TYPE, cfg.DATASET.ROOT] = train, test
    held, clock = [], []
    with ExitStack() as stack:
        log = stack.enter_context((folder / "log.txt").open("w"))
        stack.enter_context(redirect_stdout(log))
        run = stack.enter_context(opened(cfg, "long", None, shared, resume=False))
        stack.enter_context(run.recorded())
        while not run.ended:
            run.trainer.train_epoch(run.plan(), run.stepped)
            run.end_epoch()
            clock.append(time.perf_counter())
            if len(clock) == 1:
                stack.enter_context(counting())
            elif len(clock) * BLOCKS % epochs < BLOCKS:
                run.writer.wait()  # it has what the epoch left
                held.append(holds())
    return held, clock


@contextmanager
def counting():
    """Within it, what is there already is not counted."""
    gc.collect()
    gc.freeze()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()
        gc.unfreeze()


def holds() -> dict[str, int]:
    """How many tensors and objects this process holds, and how many bytes."""
    gc.collect()
    objects = gc.get_objects()
    return {
        "tensors": sum(isinstance(o, torch.Tensor) for o in objects),
        "objects": len(objects),
        "traced bytes": tracemalloc.get_traced_memory()[0],
        "resident bytes": resident(),
    }


def growth(held: list[dict[str, int]], epochs: int) -> dict[str, float]:
    """What is held more after an epoch: the median over the parts after the first third.

    A median, because a cache that fills or an arena that is opened is one part's alone.
    """
    late = held[BLOCKS // 3 :]
    return {
        name: median(after[name] - before[name] for before, after in pairwise(late))
        * BLOCKS
        / epochs
        for name in ALLOWED
    }


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in `crowd`: the bits of a sum depend on how many share it
    pick_device("cpu")
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        faults = crowd(args.runs, Path(folder))
        held, clock = long_run(args.epochs, Path(folder))
    more = growth(held, args.epochs)
    pace, tenth = [1e3 * (b - a) for a, b in pairwise(clock)], len(clock) // 10
    print(
        f"{args.epochs} epochs: {held[-1]['resident bytes'] / 1e6:.1f} MB resident at the end; "
        f"after each epoch {', '.join(f'{value:g} {name}' for name, value in more.items())} more; "
        f"an epoch takes {mean(pace[:tenth]):.1f} ms in the first tenth, "
        f"{mean(pace[-tenth:]):.1f} ms in the last"
    )
    return int(bool(faults) or any(more[name] > most for name, most in ALLOWED.items()))


if __name__ == "__main__":
    sys.exit(main())
