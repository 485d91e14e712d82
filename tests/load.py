"""Many runs at once and one long run, on scikit-learn's digits.

    python tests/load.py [--runs 64] [--epochs 1000]

All runs of a study at once, as `tools/compare.py run --jobs` starts them: none has a teacher to
begin with, all share one table of its outputs, and each must leave a record that can be believed
and that has the bits of the same run made alone. Then one run of many epochs on a few images in
this process, whose resident memory must not grow by more than its history does.
"""

import argparse
import os
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from conftest import CPU, ROOT, TIMES, untrained_teacher

from mdistiller_ext.config import load_cfg
from mdistiller_ext.data import digits
from mdistiller_ext.data.views import ImageSet
from mdistiller_ext.engine import StopSignals, pick_device
from mdistiller_ext.engine.run import Common
from mdistiller_ext.engine.training import opened
from mdistiller_ext.study.launch import processes, run_jobs
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
# Bytes an epoch. Its metrics, which stay, are 2.5 KB: a dict of 26 floats.
ALLOWED = 16384


def crowd(runs: int, folder: Path) -> list[str]:
    """Start so many runs at once in an empty working folder; one line for each that is wrong."""
    together, alone = (study(runs, folder / name) for name in ("together", "alone"))
    seconds = []
    for built, count in ((together, runs), (alone, 1)):
        start = time.perf_counter()
        run_jobs(built.jobs, partial(processes, device=CPU, count=count))
        seconds.append(time.perf_counter() - start)
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
        f"{runs} runs: {len(faults)} faults; {seconds[0]:.0f} s all at once, "
        f"{seconds[1]:.0f} s one by one",
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


def long_run(epochs: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(resident memory in bytes, time in seconds) after each epoch of one run."""
    options: list[Any] = ["SOLVER.EPOCHS", epochs, "LOG.PREFIX", str(folder / "output")]
    options += ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(folder))]
    options += ["DISTILLER.TEACHER_TABLE_ROOT", str(folder / "table")]
    cfg = load_cfg(CONFIGS / "dkd_eat_dat_lp.yaml", options)
    common = Common(CPU, StopSignals())
    train, test = (few(images) for images in digits.load())
    common.sets[cfg.DATASET.TYPE, cfg.DATASET.ROOT] = train, test
    memory, clock = [], []
    job = opened(cfg, "long", common, resume=False)
    with (folder / "log.txt").open("w") as log, redirect_stdout(log), job as run:
        for _ in run.advance():
            if len(run.history) > len(memory):
                memory.append(resident())
                clock.append(time.perf_counter())
    return np.array(memory), np.array(clock)


def few(images: ImageSet) -> ImageSet:
    parts = images.padded[:FEW], images.targets[:FEW]
    return ImageSet(*parts, images.mean, images.std, images.padding, images.flips)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(values: np.ndarray) -> float:
    """Of a line through the last half of the values, per value."""
    half = values[len(values) // 2 :]
    return float(np.polyfit(np.arange(len(half)), half, 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the bits of a sum depend on how many threads share it
    pick_device("cpu")
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        faults = crowd(args.runs, Path(folder))
        memory, clock = long_run(args.epochs, Path(folder))
    growth, tenth = slope(memory), len(clock) // 10
    pace = np.diff(clock)
    print(
        f"{args.epochs} epochs: {memory[-1] / 1e6:.1f} MB resident at the end, "
        f"{growth:.0f} bytes more an epoch over the last half; "
        f"an epoch takes {1e3 * pace[:tenth].mean():.1f} ms in the first tenth, "
        f"{1e3 * pace[-tenth:].mean():.1f} ms in the last"
    )
    return int(bool(faults) or growth > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
