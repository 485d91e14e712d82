"""Train a student, or a teacher, as a config file says.

%(prog)s --cfg configs/cifar100/dkd_lp.yaml [--resume | --fresh] [KEY VALUE ...]
torchrun --nproc_per_node 2 -m mdistiller_ext train --cfg ...
"""

import argparse
import os
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from .. import packaged


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cfg", required=True, type=packaged.config, metavar="FILE", help="YAML file"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where the same run stopped")
    again.add_argument(
        "--fresh", action="store_true", help="begin anew; the run there is kept as NAME,old1"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings over the file's")


def main(args: argparse.Namespace) -> None:
    import torch

    from ..config import altered, load_cfg
    from ..data import facts
    from ..engine import World, default_name, former_name, pick_device, train

    cfg = load_cfg(args.cfg, args.opts)
    if "OMP_NUM_THREADS" not in os.environ and facts(cfg.DATASET).side < 16:
        # Of images this small more threads gain little, and beside other work they lose nearly all.
        torch.set_num_threads(1)
    device = pick_device(args.device)
    world = World.join(device)
    # One process speaks for all.
    with nullcontext() if world.first else redirect_stdout(StringIO()):
        print(f"{altered(cfg).dump()}device: {device}, processes: {world.size}", flush=True)
        name = default_name(cfg, args.opts)
        # Asked once: the first process renames it.
        former = world.tell(former_name(cfg, name) if args.resume and world.first else "")
        folder = Path(cfg.LOG.PREFIX, cfg.EXPERIMENT.PROJECT, former or name)
        if args.resume and not folder.exists():
            print(f"{folder}: nothing to resume, so it starts with epoch 1")
        again: dict[str, Any] = {"resume": args.resume, "fresh": args.fresh, "former": former}
        record, folder = train(cfg, name, device, world=world, **again)
    world.leave()
    if world.first:
        where = record.get("data", {}).get("evaluated_on", "the test set")
        tested = sum("test_top1" in epoch for epoch in record["epochs"][-10:])
        average = record.get("last_epoch_ema_top1")
        print(
            f"top-1 on {where}: {record['last_epoch_top1']:.2f} % at the last epoch, "
            f"{'' if average is None else f'{average:.2f} % of the average there, '}"
            f"{record['mean_last_10_top1']:.2f} % mean of the last {tested} evaluated, "
            f"{record['best_epoch_top1_selected_on_test']:.2f} % at epoch {record['best_epoch']}, "
            f"the best one (selected on {where})\nrecord: {folder / 'record.json'}"
        )
