"""Fill the teacher table of a config: the teacher's logits for every view of every training image.

    %(prog)s --cfg configs/cifar100/dkd.yaml [--device cuda] [KEY VALUE ...]

Training fills the table as it goes, so this is never needed; it pays before many runs, and on a
GPU. Stopped, it goes on where it was. Every method, student and seed with this teacher shares it.
"""

import argparse
import time
from pathlib import Path

from .. import packaged
from ..errors import ConfigError, RunError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cfg", required=True, type=packaged.config, metavar="FILE", help="YAML file"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings over the file's")


def main(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..config import load_cfg
    from ..data import facts, get_dataset
    from ..engine import StopSignals, pick_device, teacher_weights
    from ..engine.events import watched
    from ..files import default_cache
    from ..models import build_network
    from ..teacher import TeacherTable, load_into

    cfg = load_cfg(args.cfg, args.opts)
    if cfg.DISTILLER.TYPE == "NONE":
        raise ConfigError("DISTILLER.TYPE: NONE has no teacher")
    if cfg.DISTILLER.TEACHER_TABLE == "off":
        raise ConfigError("DISTILLER.TEACHER_TABLE: off, so that no run would read the table")
    device = pick_device(args.device)
    weights = teacher_weights(cfg, device)
    name = weights.network or cfg.DISTILLER.TEACHER  # an assistant, where there are some
    data, _ = get_dataset(cfg.DATASET)
    place = facts(cfg.DATASET).classes, data.side, cfg.DATASET.TYPE
    teacher = build_network(name, *place, key="DISTILLER.TEACHER")
    load_into(teacher, weights, name)
    root = Path(cfg.DISTILLER.TEACHER_TABLE_ROOT or default_cache())
    dtype, tf32 = cfg.DISTILLER.TEACHER_TABLE_DTYPE, cfg.DISTILLER.TEACHER_TABLE_TF32
    table = TeacherTable(root, teacher, data.to(device), dtype, tf32)
    table.hold_on_gpu()
    before, start, show = table.filled, time.perf_counter(), watched()
    try:
        with (
            StopSignals() as stop,
            tqdm(
                total=table.rows, desc=name, unit=" views", unit_scale=True, disable=not show
            ) as bar,
        ):

            def told(count: int) -> None:
                bar.update(count)
                stop.check()

            table.fill(told)
    finally:  # stopped, it says what is kept
        table.flush()
        seconds, filled = time.perf_counter() - start, table.filled
        print(
            f"{table.folder}: {filled:,} of {table.rows:,} views, "
            f"{table.nbytes / 1e6:,.1f} MB; {filled - before:,} computed in {seconds:.1f} s on "
            f"{device}"
        )
    if table.problem:
        raise RunError(f"teacher table {table.folder}: {table.problem}")
