"""Evaluate a network on a test set.

%(prog)s -c output/digits/dkd_lp,digits,seed0 [--save predictions.npz]
%(prog)s -m resnet20 -c output/.../student_best
%(prog)s -m resnet56 -c pretrain
%(prog)s -m timm:resnet18 -c FILE -d folder --root my_images DATASET.SIDE 64
"""

import argparse
import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..command import existing, new_file
from ..errors import ConfigError, bare

if TYPE_CHECKING:
    from torch import nn
    from yacs.config import CfgNode

    from ..data import ImageSet
    from ..teacher import Weights

PRETRAINED = ("pretrain", "pretrained")


def arguments(parser: argparse.ArgumentParser) -> None:
    network_arguments(parser)
    parser.add_argument("-bs", "--batch-size", type=int, help="images at once (default 64)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--save", type=new_file, metavar="FILE", help="logits, labels and class names, as .npz"
    )


def network_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that name a network, its weights and its data set."""
    parser.add_argument(
        "-c",
        "--ckpt",
        default="pretrain",
        type=weights,
        help="a run's folder, which says network and data set too; a file; or pretrain (default)",
    )
    parser.add_argument("-m", "--model", metavar="NAME", help="a network, as in DISTILLER.STUDENT")
    parser.add_argument(
        "-d", "--dataset", metavar="NAME", help="as in DATASET.TYPE (default cifar100)"
    )
    parser.add_argument("--root", help="folder of the data set (default ./data)")
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


class Loaded(NamedTuple):
    """A network with its weights, and its data set.

    Attributes:
        network: on the CPU.
        class_names: by label, as the training set has them.
    """

    cfg: "CfgNode"
    network: "nn.Module"
    weights: "Weights"
    test: "ImageSet"
    class_names: list[str]

    @property
    def name(self) -> str:
        return self.cfg.DISTILLER.STUDENT


def main(args: argparse.Namespace) -> None:
    # One JSON object is all that --json prints.
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        loaded, metrics = measured(args)
    cfg, name, file = loaded.cfg, loaded.name, loaded.weights.file
    images = len(loaded.test)
    if args.json:
        content = {"model": name, "file": str(file), "dataset": cfg.DATASET.TYPE}
        print(json.dumps({**content, "images": images, **metrics}))
        return
    held = f", {images:,} training images held out" if cfg.DATASET.HOLDOUT else ""
    top5 = f"top-5 {metrics['top5']:.2f} %, " if len(loaded.class_names) > 5 else ""
    print(
        f"{name} from {file} on {cfg.DATASET.TYPE}{held}: top-1 {metrics['top1']:.2f} %, {top5}"
        f"NLL {metrics['nll']:.4f}, calibration error {metrics['ece']:.4f}"
    )


def measured(args: argparse.Namespace) -> tuple[Loaded, dict[str, float]]:
    """What was loaded, and the figures; with --save the predictions are written."""
    import numpy as np

    from ..data import Dataset
    from ..engine import numbers, performance, pick_device, predict
    from ..engine.facts import unlike_holdout
    from ..files import write_atomically
    from ..inert import below_claim

    device = pick_device(args.device)
    loaded = load(args)
    cfg, test, state = loaded.cfg, loaded.test.to(device), loaded.weights
    logits = predict(loaded.network.to(device), test, cfg.DATASET.TEST.BATCH_SIZE)
    metrics = numbers(performance(logits, test.targets))
    held_out = unlike_holdout(Dataset.read(cfg.DATASET), state.file)
    for line in filter(None, (below_claim(loaded.name, metrics["top1"], state.claim), held_out)):
        print(f"warning: {line}")
    if args.save:
        content: dict[str, Any] = {"logits": logits.cpu().numpy()}
        content["labels"] = test.targets.cpu().numpy()
        content["class_names"] = np.array(loaded.class_names)
        write_atomically(args.save, lambda sink: np.savez(sink, **content))
    return loaded, metrics


def load(args: argparse.Namespace) -> Loaded:
    """What `network_arguments` name.

    Raises:
        ConfigError, RunError: it is not to be had.
    """
    from ..config import as_pairs, load_cfg
    from ..data import facts, get_dataset, identity
    from ..engine import left_by
    from ..models import build_network
    from ..settings import leaves
    from ..teacher import fetch_weights, find_weights, load_into, load_weights

    options = as_pairs(args.opts)
    for key in options:
        if not key.startswith("DATASET.") and key != "EXPERIMENT.IMPORT":
            raise ConfigError(f"{bare(key)}: has no effect here, only DATASET and what it imports")
    given: dict[str, Any] = {}
    file = None if args.ckpt in PRETRAINED else Path(args.ckpt)
    if file and (file.is_dir() or not args.model):
        file, record = left_by(file)
        theirs = record["config"]
        given = dict(leaves(theirs["DATASET"], "DATASET."))
        given["EXPERIMENT.IMPORT"] = theirs["EXPERIMENT"]["IMPORT"]
        given["DISTILLER.STUDENT"] = theirs["DISTILLER"]["STUDENT"]
    elif not args.model:
        raise ConfigError("--model: is missing, expected a network, or --ckpt with a run's folder")
    named = {key: getattr(args, option.replace("-", "_"), None) for option, key in KEYS.items()}
    given |= {key: value for key, value in named.items() if value is not None} | options
    try:
        cfg = load_cfg(None, [word for pair in given.items() for word in pair])
    except ConfigError as error:
        lines = str(error)
        for option, key in KEYS.items():
            if key not in options:
                lines = lines.replace(f"{key}: ", f"--{option}: ")
        raise ConfigError(lines) from error
    where, name = identity(cfg.DATASET), cfg.DISTILLER.STUDENT
    state = load_weights(file or find_weights(name, where) or fetch_weights(name, where))
    train, test = get_dataset(cfg.DATASET)
    classes = facts(cfg.DATASET).classes
    network = build_network(name, classes, test.side, cfg.DATASET.TYPE, key="--model")
    load_into(network, state, name)
    return Loaded(cfg, network, state, test, train.class_names)


def weights(word: str) -> str | Path:
    return word if word in PRETRAINED else existing(word)
