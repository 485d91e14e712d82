"""Whether a method trains with the single images that an epoch's batches may leave."""

import copy
from typing import Any

import torch
from torch import nn

from ..data import Batch, ImageSet
from ..distillers import Distiller
from ..errors import ConfigError, brief
from ..policies import Context
from ..sections import Solver
from .replicas import World


def check_single_images(
    distiller: Distiller, solver: Solver, world: World, train_set: ImageSet, test_set: ImageSet
) -> None:
    """Refuse a batch of one image, or a process's share of one, where the method does not train
    with one, as many batch norms do not. A step of a copy tells.

    Raises:
        ConfigError: an epoch has such a batch, of the training set or of the images held out.
    """
    size, images, held = solver.BATCH_SIZE, len(train_set), len(test_set)

    def share(batch: int) -> int:
        return smallest(images, batch) // world.size

    if share(size) == 1 and (reason := _fault_alone(distiller, solver, train_set, 1, 2)):
        sizes = sorted(range(2, images + 1), key=lambda other: abs(other - size))
        better = next((f", as {other}" for other in sizes if share(other) > 1), "")
        where = "" if world.size == 1 else f" for one of {world.size} processes"
        raise ConfigError(
            f"SOLVER.BATCH_SIZE: {size} leaves a batch of one image{where} of {images}, with which "
            f"{distiller.TYPE} does not train here: {reason}; expected another number{better}"
        )
    every = getattr(distiller, "held_every", 0)
    # The last batch of the images held out is reached where an epoch has enough steps.
    reached = every and -(-images // size) > (-(-held // size) - 1) * every
    single = reached and smallest(held, size) == 1
    if single and (reason := _fault_alone(distiller, solver, train_set, 2, 1)):
        raise ConfigError(
            f"SOLVER.BATCH_SIZE: {size} leaves a batch of one of the {held} images held out, with "
            f"which {distiller.TYPE} does not train here: {reason}; expected another number, or "
            f"another DATASET.HOLDOUT"
        )


def smallest(images: int, batch: int) -> int:
    """The images in the smallest batch of an epoch."""
    return min(batch, images % batch or batch)


def _fault_alone(
    distiller: Distiller, solver: Solver, data: ImageSet, images: int, held: int
) -> str:
    """What a step with so many images raises where one with two raises nothing, or ""."""
    fault = _fault(distiller, solver, data, images, held)
    return "" if fault and _fault(distiller, solver, data, 2, 2) else fault


def _fault(distiller: Distiller, solver: Solver, data: ImageSet, images: int, held: int) -> str:
    """What a training step of a copy raises, or ""."""
    trial: Any = copy.deepcopy(distiller).train()
    if solver.SYNC_BN:  # these normalise by the images of all processes
        kind = nn.modules.batchnorm._BatchNorm if data.padded.is_cuda else nn.BatchNorm2d
        for module in trial.student.modules():
            if isinstance(module, kind):
                module.eval()
    batch, more = _first(data, images), {}
    if isinstance(distiller, Distiller):
        other, draws = _first(data, held), trial.draws(data.classes)
        drawn = torch.rand(images, draws, device=data.targets.device) if draws else None
        more["context"] = Context(
            trial.schedule(1),
            drawn=drawn,
            held=(other.image, other.target) if trial.held_every else None,
        )
    try:
        with torch.random.fork_rng([data.targets.device] if data.padded.is_cuda else []):
            trial(image=batch.image, target=batch.target, index=batch.index, epoch=1, **more)
    except Exception as error:  # whatever a network does with one image
        return f"{type(error).__name__}: {brief(str(error))}"
    return ""


def _first(data: ImageSet, count: int) -> Batch:
    index = torch.arange(count, device=data.targets.device)
    return data.batch(index, torch.zeros_like(index))
