"""The training state of a run, which a later run of the same kind can reuse."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ..distillers import Distiller, Logit, Vanilla
from ..errors import ConfigError
from ..sections import Parts
from ..seeding import random_state, seed_everything
from ..settings import leaves
from ..teacher import Weights
from .build import (
    CompiledStudent,
    build_autocast,
    build_average,
    build_distiller,
    build_optimizer,
    few,
    lay_out,
    set_arithmetic,
    takes_features,
)
from .loop import Epoch, Meter, train_epoch
from .replicas import Replica, compares_samples
from .shared import Shared
from .single import check_single_images

# What a trainer does not depend on, so that runs which differ in nothing else share one.
APART = ("EXPERIMENT.", "LOG.", "SOLVER.SEED")


class Trainer:
    """Networks, method, optimizer and meter of a run, on the device, and how they take its steps.

    Attributes:
        table: the teacher's table, or None.
        replica: the distiller as one of several processes has it, or None.
        draws: the random numbers that the method needs for each image.
        held_every: in every how manieth step it takes images held out, or 0.
        random: the state of the random generators when the initial weights were drawn.
        average: of the student's weights, or None.
    """

    def __init__(self, parts: Parts, shared: Shared, weights: Weights | None) -> None:
        solver, method, keeps = parts.solver, parts.networks.TYPE, parts.networks.TEACHER_TABLE
        self.kind, self.weights, self.solver = kind(parts.cfg), weights, solver
        self.world, device = shared.world, shared.device
        if self.world.size > 1 and (solver.MIXUP or solver.CUTMIX):
            raise ConfigError(
                f"SOLVER.{'MIXUP' if solver.MIXUP else 'CUTMIX'}: takes one process: the image "
                f"that another is mixed with may be in another's share of the batch"
            )
        set_arithmetic(device, solver.TF32)
        self.data, test_set = shared.data(parts)
        self.distiller = self._initial(parts, weights).to(device)
        check_single_images(self.distiller, solver, self.world, self.data, test_set)
        self.optimizer = build_optimizer(solver, self.distiller)
        features = takes_features(self.distiller, self.data) if weights else set()
        takes_logits = "teacher" not in features
        # Methods that reshape feature maps want the other layout.
        tensor_cores = solver.TF32 or solver.AMP == "bf16"
        if takes_logits and (device.type == "cpu" or tensor_cores):
            lay_out(
                self.distiller, self.data, solver.BATCH_SIZE, build_autocast(solver.AMP, device)
            )
        student = self.distiller.student
        self.average = build_average(solver, student)
        if average := self.average:
            self.optimizer.register_step_post_hook(lambda *_: average.update_parameters(student))
        self.table = None
        if weights and takes_logits and keeps != "off":
            self.table = shared.table(parts, self.distiller, weights, self.data)
        elif weights and keeps == "on":
            raise ConfigError(
                f"DISTILLER.TEACHER_TABLE: on, but {method} takes the teacher's features, which "
                f"no table holds: expected auto or off"
            )
        if solver.COMPILE and not features:
            CompiledStudent(student)
        self.classes = parts.classes
        self.draws = self.distiller.draws(parts.classes) if parts.ours else 0
        self.held_every = self.distiller.held_every if parts.ours else 0
        # A method of the toolkit may change its teacher.
        self.frozen = ("teacher.",) if parts.ours else ()
        self.meter = Meter(1, -(-len(self.data) // solver.BATCH_SIZE))
        self.autocast = build_autocast(solver.AMP, device)
        self.replica = None
        if self.world.size > 1:
            says = isinstance(self.distiller, (Logit, Vanilla))  # what it compares
            if not says and not self.distiller.coupled:
                self.distiller.coupled = compares_samples(self.distiller, few(self.data))
            self.replica = Replica(self.distiller, self.world, solver.SYNC_BN)

    def _initial(self, parts: Parts, weights: Weights | None) -> Distiller:
        """As SOLVER.SEED has it, on the CPU."""
        seed_everything(parts.solver.SEED)
        distiller = build_distiller(parts.cfg, weights, self.data)
        self.random = random_state()
        return distiller

    def renew(self, parts: Parts) -> None:
        """Become the trainer of another run of this kind; every tensor stays where it is."""
        self.distiller.load_state_dict(self._initial(parts, self.weights).state_dict())
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()  # as a first step of SGD without one

    def trained(self) -> dict[str, Tensor]:
        """What training may change, by name."""
        model = self.distiller.state_dict()
        return {k: v for k, v in model.items() if not k.startswith(self.frozen)}

    def fault(self) -> str:
        """Which weights are not finite, or "". What the last step broke shows in no loss, and not
        always in the evaluation: a batch norm whose variance is infinite gives finite logits."""
        state = {k: v for k, v in self.trained().items() if v.is_floating_point()}
        largest = torch.stack(torch._foreach_norm(list(state.values()), math.inf))  # NaN counts
        finite = largest.isfinite().tolist()
        bad = [name for name, good in zip(state, finite, strict=True) if not good]
        return f"{len(bad)} of {len(state)} weights are not finite, as {bad[0]}" if bad else ""

    @property
    def finite(self) -> bool:
        return not self.fault()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {
            "model": self.trained(),
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state_dict(),
            "average": self.average.state_dict() if self.average else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy what `state_dict` returned into the tensors that are there: a graph has these.

        Raises:
            LookupError, RuntimeError, TypeError, ValueError: it does not fit.
        """
        model = self.distiller.state_dict()
        frozen = {k: v for k, v in model.items() if k.startswith(self.frozen)}
        self.distiller.load_state_dict({**frozen, **state["model"]})
        if self.average:
            self.average.load_state_dict(state["average"])
        parameters = _parameters(self.optimizer)
        expected = _after_a_step(self.optimizer)
        # The optimizer's settings are the config's; only what its steps left behind is the file's.
        for number, kept in state["optimizer"]["state"].items():
            own = self.optimizer.state[parameters[number]]
            if kept.keys() != expected[number].keys():
                raise ValueError(f"the optimizer has {', '.join(map(str, kept))} of a weight")
            for name, blank in expected[number].items():
                if kept[name].shape != blank.shape:
                    raise ValueError(f"{name} has shape {tuple(kept[name].shape)}")
                own.setdefault(name, blank).copy_(kept[name])
        self.meter.load_state_dict(state["meter"], self.data.targets.device)

    def train_epoch(self, epoch: Epoch, after_step: Callable[[], None]) -> None:
        """The steps of an epoch that are left, by the plain loop."""
        distiller = self.replica or self.distiller
        train_epoch(
            distiller, self.optimizer, self.data, epoch, self.meter, self.autocast, after_step
        )
        self.world.merge(self.meter)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _after_a_step(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Tensors as an optimizer has them of each weight after a step; their values mean nothing."""
    groups = [
        {**group, "params": [nn.Parameter(torch.zeros_like(weight)) for weight in group["params"]]}
        for group in optimizer.param_groups
    ]
    kind: Any = type(optimizer)
    twin = kind(groups)
    for weight in _parameters(twin):
        weight.grad = torch.zeros_like(weight)
    twin.step()
    return [twin.state[weight] for weight in _parameters(twin)]


def kind(cfg: CfgNode) -> dict[str, Any]:
    """What of a config decides over a trainer, but for its initial weights."""
    return {key: value for key, value in leaves(cfg) if not key.startswith(APART)}
