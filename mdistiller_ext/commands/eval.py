"""Evaluate a network on a test set.

%(prog)s -m resnet20 -c output/.../student_best
%(prog)s -m resnet56 -c pretrain
%(prog)s -m timm:resnet18 -c FILE -d folder --root my_images DATASET.SIDE 64
"""

import argparse
import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from ..command import existing
from ..errors import ConfigError, bare

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from ..data import ImageSet

PRETRAINED = ("pretrain", "pretrained")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", required=True, metavar="NAME", help="a network, as in DISTILLER.STUDENT"
    )
    parser.add_argument(
        "-c", "--ckpt", default="pretrain", type=weights, help="a file, or pretrain (default)"
    )
    parser.add_argument(
        "-d", "--dataset", default="cifar100", metavar="NAME", help="as in DATASET.TYPE"
    )
    parser.add_argument("-bs", "--batch-size", type=int, default=64)
    parser.add_argument("--root", default="./data", help="folder of the data set (default ./data)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="of DATASET, and EXPERIMENT.IMPORT"
    )


# What an option is, as a key.
KEYS = {
    "model": "DISTILLER.STUDENT",
    "dataset": "DATASET.TYPE",
    "root": "DATASET.ROOT",
    "batch-size": "DATASET.TEST.BATCH_SIZE",
}


def main(args: argparse.Namespace) -> None:
    # One JSON object is all that --json prints.
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        cfg, test, file, metrics = measured(args)
    if args.json:
        content = {"model": args.model, "file": str(file), "dataset": cfg.DATASET.TYPE}
        print(json.dumps({**content, "images": len(test), **metrics}))
        return
    held = f", {len(test):,} training images held out" if cfg.DATASET.HOLDOUT else ""
    print(
        f"{args.model} from {file} on {cfg.DATASET.TYPE}{held}: top-1 {metrics['top1']:.2f} %, "
        f"top-5 {metrics['top5']:.2f} %, NLL {metrics['nll']:.4f}, "
        f"calibration error {metrics['ece']:.4f}"
    )


def measured(args: argparse.Namespace) -> "tuple[CfgNode, ImageSet, Path, dict[str, float]]":
    """The config, the test set, the file of the weights, and the figures."""
    from ..config import as_pairs, load_cfg
    from ..data import Dataset, facts, get_dataset, identity
    from ..engine import numbers, performance, pick_device, predict
    from ..engine.facts import unlike_holdout
    from ..inert import below_claim
    from ..models import build_network
    from ..teacher import fetch_weights, find_weights, load_into, load_weights

    options = as_pairs(args.opts)
    for key in options:
        if not key.startswith("DATASET.") and key != "EXPERIMENT.IMPORT":
            raise ConfigError(f"{bare(key)}: has no effect here, only DATASET and what it imports")
    values = (args.model, args.dataset, args.root, args.batch_size)
    given = dict(zip(KEYS.values(), values, strict=True)) | options
    try:
        cfg = load_cfg(None, [word for pair in given.items() for word in pair])
    except ConfigError as error:
        lines = str(error)
        for option, key in KEYS.items():
            if key not in options:
                lines = lines.replace(f"{key}: ", f"--{option}: ")
        raise ConfigError(lines) from error
    device, where = pick_device(args.device), identity(cfg.DATASET)
    if args.ckpt in PRETRAINED:
        file = find_weights(args.model, where) or fetch_weights(args.model, where)
    else:
        file = Path(args.ckpt)
    state = load_weights(file)
    _, test = get_dataset(cfg.DATASET)
    classes = facts(cfg.DATASET).classes
    model = build_network(args.model, classes, test.side, cfg.DATASET.TYPE, key="--model")
    # With --json, the standard output holds one object.
    with redirect_stdout(sys.stderr if args.json else sys.stdout):
        load_into(model, state, args.model)
    test = test.to(device)
    logits = predict(model.to(device), test, cfg.DATASET.TEST.BATCH_SIZE)
    metrics = numbers(performance(logits, test.targets))
    held_out = unlike_holdout(Dataset.read(cfg.DATASET), file)
    for line in filter(None, (below_claim(args.model, metrics["top1"], state.claim), held_out)):
        print(f"warning: {line}")
    return cfg, test, file, metrics


def weights(word: str) -> str | Path:
    return word if word in PRETRAINED else existing(word)
