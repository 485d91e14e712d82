"""The one distiller of logits: a loss, policies, and what they are weighted by."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ..errors import ConfigError
from ..losses import Pair
from ..losses.divergence import scalars
from ..policies import SLOTS, Context, RunFacts
from .ahead import ahead
from .base import Distiller
from .recipes import Recipe

Act = Callable[[Pair, Context], Pair]


class Logit(Distiller):
    """CE_WEIGHT CE(z_s, y) + min(epoch / WARMUP, 1) KD_WEIGHT mean_i w_i f_i loss_i.

    f_i is the loss's factor, usually the squared temperature, and stands inside the mean, w_i the
    product of the weights that the loss and the policies give. Policies act in the order of their
    slots, whatever the order in the config.
    """

    RECIPE: Recipe

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> None:
        super().__init__(student, teacher, cfg)
        composed = self.RECIPE.read(cfg[self.TYPE])
        if composed.conflict:
            raise ConfigError(f"{self.TYPE}: this combination is not allowed: {composed.conflict}")
        self.weights, self.loss, self.policies = composed
        self.run = RunFacts(cfg.SOLVER.EPOCHS, cfg.SOLVER.BATCH_SIZE, self.weights.T)
        self.acts = [(policy, policy.build(self.run)) for policy in self.policies]
        # What has parameters or a state is part of the state dict.
        self.learned = nn.ModuleDict(
            {type(p).__name__: act for p, act in self.acts if isinstance(act, nn.Module)}
        )
        self.held_every = max((policy.held_every for policy in self.policies), default=0)
        # Not T but what a policy makes of it is then the base temperature.
        self.finds_base = any(
            policy.slot == "base" and "temperature" not in policy.schedule(1, self.run)
            for policy in self.policies
        )
        if self.loss.coupled:
            self.coupled = f"{type(self.loss).__name__} compares samples with each other"

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return [*super().get_learnable_parameters(), *self.learned.parameters()]

    def get_undecayed_parameters(self) -> list[nn.Parameter]:
        left = [type(policy).__name__ for policy in self.policies if not policy.decayed]
        return [p for name, act in self.learned.items() if name in left for p in act.parameters()]

    def get_extra_parameters(self) -> int:
        return sum(p.numel() for p in self.learned.parameters())

    def schedule(self, epoch: int) -> dict[str, float]:
        settings = {"temperature": self.weights.T}
        if self.weights.WARMUP > 1:
            settings = {"warmup": min(epoch / self.weights.WARMUP, 1.0), **settings}
        for policy in self.policies:
            settings |= policy.schedule(epoch, self.run)
        return settings

    def planned(self, epoch: int) -> dict[str, float]:
        planned = self.schedule(epoch)
        if self.finds_base:
            del planned["temperature"]
        return planned

    def draws(self, classes: int) -> int:
        return sum(policy.draws(classes) for policy in self.policies)

    def pair(self, student: Tensor, teacher: Tensor, target: Tensor, context: Context) -> Pair:
        """What the loss compares: logits (B, C) with classes, temperatures and weights."""
        acts: list[Act] = []
        at = 0
        for slot in SLOTS:
            if slot == "statistic":
                acts.append(lambda pair, context: self.loss.temperatures(pair))
            for policy, act in self.acts:
                if policy.slot == slot:
                    own = slice(at, at + policy.draws(student.shape[1]))
                    at = own.stop
                    acts.append(partial(_drawing, act, own))

        base = context.now["temperature"]
        pair = Pair(student, teacher, target, tau_s=base, tau_t=base, tau=base)
        return self._acted(pair, acts, student, context)

    # Methods, not closures: two that call each other would keep the step's autograd graph alive
    # until Python collects garbage.
    def _acted(self, pair: Pair, acts: Sequence[Act], student: Tensor, context: Context) -> Pair:
        """A pair after these acts, each of which may ask for the gradient of what comes of it."""
        for number, act in enumerate(acts, start=1):
            slope = partial(self._slope, acts[number:], student, context)
            pair = act(pair, context._replace(slope=slope))
        return self.completed(pair)

    def _slope(self, acts: Sequence[Act], student: Tensor, context: Context, pair: Pair) -> Tensor:
        """d(loss summed over samples) / d(student logits), (B, C), of a pair before some acts."""
        value = self.value(self._acted(pair, acts, student, context)).sum()
        return torch.autograd.grad(value, student, retain_graph=True)[0]

    def completed(self, pair: Pair) -> Pair:
        """With what policies leave to the end: the class of those lumped, the loss's own weight."""
        pair = pair.settled()
        weight = self.loss.weight(pair)
        return pair if weight is None else pair.weighted(weight)

    def value(self, pair: Pair) -> Tensor:
        """The distillation loss of each sample, (B,), with its factor and weights."""
        name = f"loss {type(self.loss).__name__}"
        loss = _checked(self.loss(pair), pair, name)
        value = self.loss.factor(pair, self.weights.T) * loss
        value = value if pair.weight is None else pair.weight * value
        return _checked(value, pair, f"{name} with its factor and weights")

    def forward_train(
        self, *, image: Tensor, target: Tensor, context: Context, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, teacher = self.logits(image, context)
        with torch.autocast(image.device.type, enabled=False):
            if context.held:
                context = context._replace(ahead=partial(ahead, self.student, image, *context.held))
            pair = self.pair(logits, teacher, target, context)
            # Before the cross-entropy: gradients are added in this order.
            loss_kd = self.value(pair)
        self.monitor = pair.seen | self.loss.seen(pair)
        if self.finds_base and "mean_temperature" not in self.monitor:
            self.monitor["mean_temperature"] = scalars(pair.tau, logits[:, 0]).detach().sum()
        if pair.weight is not None:
            self.monitor["mean_kd_weight"] = pair.weight.sum()
        if "warmup" in context.now:
            loss_kd = context.now["warmup"] * loss_kd
        return logits, {
            "loss_ce": self.weights.CE_WEIGHT * self.cross_entropy(logits, target),
            "loss_kd": self.weights.KD_WEIGHT * loss_kd.mean(),
        }


def _checked(value: Any, pair: Pair, name: str) -> Tensor:
    """One value a sample, (B,), through which a student learns.

    Raises:
        ConfigError: a loss, a factor or a weight, perhaps the user's own, makes something else.
    """
    expected = f"expected one value a sample, of shape ({len(pair.student)},)"
    if not isinstance(value, Tensor):
        raise ConfigError(f"{name}: gives a {type(value).__name__}, {expected}")
    if value.shape != pair.student.shape[:1]:
        raise ConfigError(f"{name}: gives values of shape {tuple(value.shape)}, {expected}")
    if torch.is_grad_enabled() and pair.student.requires_grad and not value.requires_grad:
        raise ConfigError(
            f"{name}: gives values without a gradient, expected some that the student's logits, "
            f"pair.student, have one from: without detach(), argmax() or no_grad()"
        )
    return value


def _drawing(
    act: Callable[[Pair, Context], Pair], own: slice, pair: Pair, context: Context
) -> Pair:
    """What a policy makes of a pair, with the random numbers that are its own."""
    drawn = None if context.drawn is None else context.drawn[:, own]
    return act(pair, context._replace(drawn=drawn))


def method(name: str, recipe: Recipe) -> type[Logit]:
    """The class of a method, by its name and what it is made of."""
    doc = f"{name}: {recipe.loss or 'any loss'} with {', '.join(recipe.policies) or 'no policy'}."
    return type(name, (Logit,), {"TYPE": name, "RECIPE": recipe, "__doc__": doc})
