"""Run a study, and say what can be concluded from it.

    %(prog)s run STUDY.yaml [--jobs N] [--together K] [KEY VALUE ...]
    %(prog)s run STUDY.yaml --part 3/10 [..]         # of an array of ten jobs the third
    %(prog)s run STUDY.yaml --launcher ray [--address HOST:PORT] [--gpus 0.25]
    %(prog)s list STUDY.yaml [KEY VALUE ...]
    %(prog)s report STUDY.yaml [--allow CONDITION] [KEY VALUE ...]

Runs that are finished are never repeated; those that stopped go on. `list` says how far each arm
is, and how long the rest takes at the pace so far. Runs of another teacher, of other images or of
other code of one's own are named by both, and nothing is run beside them. KEY VALUE pairs, as
DATASET.ROOT, must be the same for all.
"""

import argparse
import re
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import packaged
from ..command import path
from ..errors import ConfigError, RunError

if TYPE_CHECKING:
    from ..study.launch import Launcher


OUTPUT = Path("output", "studies")


# What --help says of each.
ACTIONS = {
    "run": """Run a study. Runs that are finished are never repeated; those that stopped go on.

    %(prog)s run STUDY.yaml [--jobs N] [--together K] [KEY VALUE ...]
    %(prog)s run STUDY.yaml --part 3/10 [..]         # of an array of ten jobs the third
    %(prog)s run STUDY.yaml --launcher ray [--address HOST:PORT] [--gpus 0.25]
""",
    "list": """Say how far each arm of a study is, and how long the rest takes at the pace so far.

    %(prog)s list STUDY.yaml [KEY VALUE ...]
""",
    "report": """Say what can be concluded from a study's finished runs.

    %(prog)s report STUDY.yaml [--allow CONDITION] [KEY VALUE ...]
""",
}


def arguments(parser: argparse.ArgumentParser, action: str = "") -> None:
    def option(of: str, name: str, help: str | None = None, **more: Any) -> None:
        told = help if action in ("", of) else argparse.SUPPRESS
        parser.add_argument(name, help=told, **more)

    parser.add_argument("action", choices=[*ACTIONS], metavar=action or None)
    parser.add_argument("study", type=packaged.study, metavar="STUDY.yaml")
    parser.add_argument("--output", type=path, default=OUTPUT, metavar="FOLDER")
    option("run", "--jobs", "processes at once (default: one a core, or 1)", type=int)
    option("run", "--together", "runs a process trains at once (GPU: 16)", type=int)
    kth = {"type": part, "default": (1, 1), "metavar": "K/N"}
    option("run", "--part", "every Nth run, from the Kth on", **kth)
    option("run", "--launcher", choices=["processes", "ray"], default="processes")
    option("run", "--address", "of a Ray cluster (default: one that runs here, or a new)")
    option("run", "--gpus", "of Ray, for a process: 1, 0.25, ..", type=float, default=0.0)
    allowed = {"action": "append", "default": [], "metavar": "CONDITION"}
    what = "what may differ between runs, as device_name"
    option("report", "--allow", what if action else f"of `report`: {what}", **allowed)
    option("run", "--device", "cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings of every run")


def main(args: argparse.Namespace) -> None:
    for name in ("jobs", "together"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: {value} is not allowed, expected at least 1")
    ray = args.launcher == "ray"
    for name, misplaced in (
        ("jobs", ray),
        ("device", ray),
        ("address", not ray),
        ("gpus", not ray),
    ):
        if misplaced and getattr(args, name):
            raise ConfigError(f"--{name}: has no effect with --launcher {args.launcher}")
    if args.part[1] > 1 and args.action != "run":
        raise ConfigError(f"--part: has no effect with {args.action}")
    if args.gpus < 0:
        raise ConfigError(f"--gpus: {args.gpus:g} is not allowed, expected at least 0")

    from ..engine import pick_device
    from ..study.launch import grouped, other_code, other_runs, progress, run_jobs
    from ..study.plan import foreseen, inert_arms, read_study

    study = read_study(args.study, args.output, args.opts)
    for line in foreseen(study, args.allow) if args.action != "report" else ():
        print(f"warning: {line}", flush=True)
    if args.action == "list":
        print(progress(study))
        for line in filter(None, [*grouped(other_runs(study.jobs)), other_code(study.jobs)]):
            print(f"warning: {line}")
        return
    if args.action == "report":
        try:
            from ..study.report import write_report
        except ImportError as error:
            raise ConfigError(f"{error}: pip install 'mdistiller-ext[study]'") from error
        text, folder = write_report(study, args.allow)
        print(f"{text}\nreport: {folder / 'report.html'}")
        return
    for line in inert_arms(study):
        print(f"warning: {line}", flush=True)
    cuda = args.gpus > 0 if ray else pick_device(args.device).type == "cuda"
    launcher = on_cluster(args, cuda) if ray else on_machine(args, cuda)
    kth, count = args.part
    jobs = study.jobs[kth - 1 :: count]
    if not jobs:
        raise ConfigError(f"--part: {kth}/{count}: the study has {len(study.jobs)} runs")
    failed = run_jobs(jobs, launcher, args.together or (16 if cuda else 1))
    if failed:
        raise RunError("\n".join(grouped(failed)))
    again = ["--output", str(args.output)] if args.output != OUTPUT else []
    words = ["report", str(args.study), *again, *args.opts]
    runs = f"all {len(jobs)} runs of part {kth}/{count}" if count > 1 else "all runs"
    print(f"{runs} are finished: {args.prog} {shlex.join(words)}")


def part(word: str) -> tuple[int, int]:
    """The type of --part: (3, 10) of "3/10"."""
    found = re.fullmatch(r"(\d+)/(\d+)", word)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{word}: expected as 3/10, the third of ten parts")
    return int(found[1]), int(found[2])


def on_machine(args: argparse.Namespace, cuda: bool) -> "Launcher":
    import torch

    from ..engine import pick_device
    from ..study.launch import processes

    count = args.jobs or (1 if cuda else max(1, torch.get_num_threads()))
    return partial(processes, device=pick_device(args.device), count=count)


def on_cluster(args: argparse.Namespace, cuda: bool) -> "Launcher":
    try:
        from ..study.cluster import ray_tasks
    except ImportError as error:
        raise ConfigError(f"--launcher ray: {error}: pip install 'mdistiller-ext[ray]'") from error
    return partial(
        ray_tasks, address=args.address, device="cuda" if cuda else "cpu", gpus=args.gpus
    )
