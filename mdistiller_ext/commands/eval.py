"""Evaluate a network on a test set.

%(prog)s -m resnet20 -c output/.../student_best
%(prog)s -m resnet56 -c pretrain
"""

import argparse
import json
from pathlib import Path

from ..command import existing
from ..errors import ConfigError, brief


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", required=True, metavar="NAME", help="a network, as in DISTILLER.STUDENT"
    )
    parser.add_argument(
        "-c", "--ckpt", default="pretrain", type=weights, help="a file, or pretrain (default)"
    )
    parser.add_argument(
        "-d", "--dataset", default="cifar100", metavar="NAME", help="cifar100 (default) or digits"
    )
    parser.add_argument("-bs", "--batch-size", type=int, default=64)
    parser.add_argument("--root", default="./data", help="folder of the data set (default ./data)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> None:
    from ..config import get_cfg, rule_of
    from ..data import get_dataset
    from ..engine import numbers, performance, pick_device, predict
    from ..models import build_network, checked
    from ..teacher import fetch_weights, find_weights, load_into, load_weights

    for option, value, key in (
        ("model", args.model, "DISTILLER.STUDENT"),
        ("dataset", args.dataset, "DATASET.TYPE"),
        ("batch-size", args.batch_size, "DATASET.TEST.BATCH_SIZE"),
    ):
        allowed, text = rule_of(key)
        if not allowed(value):
            raise ConfigError(f"--{option}: {brief(value)} is not allowed, expected {text}")
    device = pick_device(args.device)
    cfg = get_cfg()
    cfg.DATASET.TYPE, cfg.DATASET.ROOT = args.dataset, args.root
    if args.ckpt == "pretrain":
        file = find_weights(args.model, args.dataset) or fetch_weights(args.model, args.dataset)
    else:
        file = Path(args.ckpt)
    _, test = get_dataset(cfg.DATASET)
    built = build_network(args.model, test.classes, args.dataset)
    model = checked(built, args.model, "--model", test.classes, test.side)
    load_into(model, load_weights(file), args.model)
    test = test.to(device)
    logits = predict(model.to(device), test, args.batch_size)
    metrics = numbers(performance(logits, test.targets))
    if args.json:
        print(
            json.dumps({"model": args.model, "file": str(file), "dataset": args.dataset, **metrics})
        )
    else:
        print(
            f"{args.model} from {file} on {args.dataset}: top-1 {metrics['top1']:.2f} %, "
            f"top-5 {metrics['top5']:.2f} %, NLL {metrics['nll']:.4f}, "
            f"calibration error {metrics['ece']:.4f}"
        )


def weights(word: str) -> str | Path:
    return word if word == "pretrain" else existing(word)
