"""What the record of a run says of what it was put together from."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset, ImageSet
from ..distillers import source
from ..errors import RunError
from ..inert import below_claim, weak_teacher
from ..sections import Parts
from ..teacher import Weights
from ..toolkit.methods import toolkit_facts
from .build import CompiledStudent
from .environment import cpu_facts, device_name, environment
from .evaluation import numbers, performance
from .identity import inputs
from .record import read_record
from .shared import Shared
from .trainer import Trainer

# Of a processor's flags those that multiply bf16: x86's and Arm's.
BF16 = {"amx_bf16", "avx512_bf16", "bf16"}


def method_facts(parts: Parts) -> dict[str, Any]:
    """Whose method it is; of the toolkit's, the file and what was mended."""
    networks = parts.networks
    facts: dict[str, Any] = {"type": networks.TYPE, "source": source(parts.cfg.DISTILLER)}
    if not parts.ours:
        facts |= toolkit_facts(networks.TYPE, networks.FIX_UPSTREAM)
        print(f"{networks.TYPE} is mdistiller's, from {facts['file']}; mended: {facts['mended']}")
    return facts


def session_facts(parts: Parts, shared: Shared) -> dict[str, Any]:
    """The machine, the code and the processes that a record names each time that a run goes on."""
    return {
        **environment(shared.device),
        "processes": shared.world.size,
        "together": 1,
        **inputs(parts.cfg, shared),
    }


def no_gain(parts: Parts, shared: Shared, trainer: Trainer, alone: bool) -> list[str]:
    """One line for each setting that is to make a run faster or alike and does not here."""
    solver, device, lines = parts.solver, shared.device, []
    flags = cpu_facts()
    known = f"{flags.get('flags', '')} {flags.get('Features', '')}".split()
    if solver.AMP == "bf16" and device.type == "cpu" and known and not BF16 & {*known}:
        lines.append(
            "SOLVER.AMP: bf16 is slower than none on this CPU, which has no instructions for it "
            "(0.44 times as fast, measured with a ResNet-8)"
        )
    tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if solver.TF32 and not tensor_cores:
        lines.append(f"SOLVER.TF32: True has no effect on {device_name(device)}")
    if solver.SYNC_BN and shared.world.size == 1:
        lines.append("SOLVER.SYNC_BN: True has no effect in one process")
    if solver.STACK not in ("auto", "none") and alone:
        lines.append(f"SOLVER.STACK: {solver.STACK} has no effect on a run trained alone")
    if solver.COMPILE and not isinstance(trainer.distiller.student.forward, CompiledStudent):
        lines.append(
            f"SOLVER.COMPILE: True has no effect: {parts.networks.TYPE} takes the student's or the "
            f"teacher's features"
        )
    return lines


def data_facts(parts: Parts, train_set: ImageSet, test_set: ImageSet) -> dict[str, Any]:
    share = parts.dataset.HOLDOUT
    held = f"{len(test_set):,} training images, held out"
    if share:
        print(f"DATASET.HOLDOUT {share}: what is called test are {held}")
    if limit := parts.dataset.LIMIT:
        print(f"warning: {limited(limit, len(train_set))}")
    return {
        "train_images": len(train_set),
        "evaluated_images": len(test_set),
        "evaluated_on": held if share else "the test set",
        "classes": parts.classes,
        "class_names": train_set.class_names,
        "side": train_set.side,
        "mean": train_set.mean.tolist(),
        "std": train_set.std.tolist(),
        "padding": train_set.padding,
        "flips": train_set.flips,
    }


def limited(limit: int, images: int) -> str:
    """A line on a run of some of the training images only."""
    return f"DATASET.LIMIT {limit}: trained on {images:,} images of the data set, as a quick try"


def teacher_facts(
    parts: Parts, weights: Weights | None, logits: Tensor | None, test_set: ImageSet
) -> dict[str, Any] | None:
    """The teacher if there is one, its file, and what its logits on the test set, (N, C), say."""
    if weights is None or logits is None:
        return None
    measured = numbers(performance(logits, test_set.targets))
    name = weights.network or parts.networks.TEACHER
    print(f"teacher {name} from {weights.file}: test top-1 {measured['top1']:.2f} %")
    if doubt := unlike_holdout(parts.dataset, weights.file):
        doubt = f"the teacher {doubt}; DISTILLER.TEACHER_CFG can train one on this run's images"
    weak = weak_teacher(name, measured["top1"], parts.classes)
    below = below_claim(f"the teacher {name}", measured["top1"], weights.claim)
    for line in filter(None, (weak, below, doubt)):
        print(f"warning: {line}")
    return {
        "name": name,
        "file": str(weights.file),
        "sha256": weights.sha256,
        "holdout": doubt,
        **{f"test_{key}": value for key, value in measured.items()},
    }


def unlike_holdout(dataset: Dataset, file: Path) -> str:
    """A line on weights that were, or may have been, trained on images that are held out here, or
    without images that are not; or "".

    A record beside the file says what they were trained on, and by which teacher.
    """
    share, seed, limit = dataset.HOLDOUT, dataset.HOLDOUT_SEED, dataset.LIMIT
    here = f"DATASET.HOLDOUT {share}, HOLDOUT_SEED {seed}"
    record = _beside(file, dataset.TYPE)
    if not record:
        doubt = f"{file} may have been trained on the held-out images ({here})"
        return f"{doubt}: no record beside it says otherwise" if share else ""
    node = record["config"]["DATASET"]
    theirs = node.get("HOLDOUT", 0.0), node.get("HOLDOUT_SEED", 0)
    trained = f"{file} was trained with DATASET.HOLDOUT {theirs[0]}, HOLDOUT_SEED {theirs[1]}"
    # Of one seed, a larger share holds out what a smaller one does, and more.
    if share and (theirs[0] < share or theirs[1] != seed):
        return f"{trained}, so on held-out images ({here})"
    if theirs[0] > share:
        return f"{trained}, so without some of the images that are trained on here ({here})"
    least = node.get("LIMIT", 0)
    if least and not 0 < limit <= least:
        return (
            f"{file} was trained with DATASET.LIMIT {least}, so without some of the images that "
            f"are trained on here (DATASET.LIMIT {limit})"
        )
    before = record["teacher"]
    return unlike_holdout(dataset, Path(before["file"])) if share and before else ""


def _beside(file: Path, kind: str) -> dict[str, Any] | None:
    """The record of the run on a data set of this kind that left a file of weights, or None."""
    of_run = file.name.startswith("student_")
    try:
        record = read_record(file.parent / "record.json" if of_run else file.with_suffix(".json"))
    except (RunError, ValueError):  # there is none; no file has such a name
        return None
    return record if record["config"]["DATASET"]["TYPE"] == kind else None
