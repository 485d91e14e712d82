"""What the record of a run says of what it was put together from."""

from typing import Any

from torch import Tensor

from ..data import ImageSet
from ..distillers import source
from ..inert import below_claim, weak_teacher
from ..sections import Parts
from ..teacher import Weights
from ..toolkit.methods import toolkit_facts
from .environment import environment
from .evaluation import numbers, performance
from .identity import inputs
from .shared import Shared


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


def data_facts(parts: Parts, train_set: ImageSet, test_set: ImageSet) -> dict[str, Any]:
    share = parts.dataset.HOLDOUT
    held = f"{len(test_set):,} training images, held out"
    if share:
        print(f"DATASET.HOLDOUT {share}: what is called test are {held}")
    return {
        "train_images": len(train_set),
        "evaluated_images": len(test_set),
        "evaluated_on": held if share else "the test set",
        "classes": parts.classes,
        "side": train_set.side,
        "mean": train_set.mean.tolist(),
        "std": train_set.std.tolist(),
        "padding": train_set.padding,
        "flips": train_set.flips,
    }


def teacher_facts(
    parts: Parts, weights: Weights | None, logits: Tensor | None, test_set: ImageSet
) -> dict[str, Any] | None:
    """The teacher if there is one, its file, and what its logits on the test set, (N, C), say."""
    if weights is None or logits is None:
        return None
    measured = numbers(performance(logits, test_set.targets))
    name = weights.network or parts.networks.TEACHER
    print(f"teacher {name} from {weights.file}: test top-1 {measured['top1']:.2f} %")
    for line in (
        weak_teacher(name, measured["top1"], parts.classes),
        below_claim(f"the teacher {name}", measured["top1"], weights.claim),
    ):
        if line:
            print(f"warning: {line}")
    return {
        "name": name,
        "file": str(weights.file),
        "sha256": weights.sha256,
        **{f"test_{key}": value for key, value in measured.items()},
    }
