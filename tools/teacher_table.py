"""Fill the teacher table of a config: the teacher's logits for every view of every training image.

    python tools/teacher_table.py --cfg configs/cifar100/dkd.yaml [--device cuda] [KEY VALUE ...]

Training fills the table as it goes, so this is never needed; it pays before many runs, and on a
GPU. Stopped, it goes on where it was. Every method, student and seed with this teacher shares it.
"""

import argparse
import time
from pathlib import Path

from mdistiller_ext.command import existing, run_tool
from mdistiller_ext.errors import ConfigError, RunError


def main(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from mdistiller_ext.config import NUM_CLASSES, load_cfg
    from mdistiller_ext.data import get_dataset
    from mdistiller_ext.engine import pick_device, teacher_weights
    from mdistiller_ext.models import cifar_model_dict
    from mdistiller_ext.teacher import TeacherTable, default_root, load_into

    cfg = load_cfg(args.cfg, args.opts)
    if cfg.DISTILLER.TYPE == "NONE":
        raise ConfigError("DISTILLER.TYPE: NONE has no teacher")
    device = pick_device(args.device)
    weights = teacher_weights(cfg, device)
    name = cfg.DISTILLER.TEACHER
    teacher = cifar_model_dict[name][0](num_classes=NUM_CLASSES[cfg.DATASET.TYPE])
    load_into(teacher, weights, name)
    root = Path(cfg.DISTILLER.TEACHER_TABLE_ROOT or default_root())
    data = get_dataset(cfg)[0].to(device)
    table = TeacherTable(root, teacher, data, cfg.DISTILLER.TEACHER_TABLE_DTYPE)
    if device.type == "cuda":
        table.hold()
    start = time.perf_counter()
    with tqdm(total=table.rows, desc=name, unit=" views", unit_scale=True) as bar:
        table.fill(bar.update)
    seconds = time.perf_counter() - start
    print(
        f"{table.folder}: {table.filled:,} of {table.rows:,} views, {table.nbytes / 1e6:,.1f} MB; "
        f"{table.misses:,} computed in {seconds:.1f} s on {device}"
    )
    if table.problem:
        raise RunError(f"teacher table {table.folder}: {table.problem}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cfg", required=True, type=existing, metavar="FILE", help="YAML file")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings over the file's")
    run_tool(main, parser)
