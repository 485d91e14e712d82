"""Measure what EAT, DAT and LP assume, on a teacher and students that were trained already.

%(prog)s --cfg configs/cifar100/dkd.yaml --student 29=output/.../student_29 --student 80=...
    [--second resnet44=file.pth] [--images 1000] [--output FOLDER] [KEY VALUE ...]

Writes anatomy.md with its pictures. Nothing is trained; the teacher's answers come from its table.
"""

import argparse
from pathlib import Path

from .. import packaged
from ..command import path
from ..errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cfg", required=True, type=packaged.config, metavar="FILE", help="of plain DKD"
    )
    parser.add_argument(
        "--student", action="append", default=[], type=numbered, metavar="EPOCH=FILE"
    )
    parser.add_argument("--second", type=named, metavar="NAME=FILE", help="another teacher")
    parser.add_argument("--images", type=int, default=1000, help="of the training set")
    parser.add_argument("--output", type=path, default=Path("anatomy"), metavar="FOLDER")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings over the file's")


def named(word: str) -> tuple[str, Path]:
    name, equals, file = word.partition("=")
    if not equals or not path(file).is_file():
        raise argparse.ArgumentTypeError(f"{word}: expected NAME=FILE of a file that exists")
    return name, path(file)


def numbered(word: str) -> tuple[int, Path]:
    epoch, file = named(word)
    if not epoch.isdigit():
        raise argparse.ArgumentTypeError(f"{word}: expected EPOCH=FILE")
    return int(epoch), file


def main(args: argparse.Namespace) -> None:
    try:
        from ..study.anatomy_report import write
    except ImportError as error:
        raise ConfigError(f"{error}: pip install 'mdistiller-ext[study]'") from error
    from ..config import load_cfg

    cfg = load_cfg(args.cfg, args.opts)
    if cfg.DISTILLER.TYPE != "DKD":
        raise ConfigError(f"DISTILLER.TYPE: {cfg.DISTILLER.TYPE}, expected DKD")
    print(write(cfg, sorted(args.student), args.second, args.images, args.output))
