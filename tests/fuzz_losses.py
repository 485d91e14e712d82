"""Losses and gradients of every method on fuzzed logits, against the float64 reference.

    python tests/fuzz_losses.py [--cases 100000] [--seed 0]

A case is one sample: a row of the student's logits, one of the teacher's and a label. It comes in
a batch of 1 to 64, because DAT ranks a batch and the losses are means over one. Of each case every
derivative of both losses is compared, of each batch, many of which have one sample, the losses.

How far they may be off is no constant. Logits are rounded when they are divided by T, so that a
log-probability is known to about eps (1 + max |z| / T + log C) and no better; the reference says
by how much each result moves for that. A result counts as right within SLACK times as much. Of
losses without a condition by hand the reference is tried with log-probabilities that are off.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import composed
import numpy as np
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from yacs.config import CfgNode

from mdistiller_ext import distiller_dict, get_cfg
from mdistiller_ext.distillers import RECIPES
from mdistiller_ext.distillers.recipes import Weights
from mdistiller_ext.engine.build import build_autocast
from mdistiller_ext.losses import LOSSES, Pair

METHODS = ["KD", "DKD", "DKD_EAT", "DKD_DAT", "DKD_LP", "DKD_EAT_DAT_LP"]
COMPOSED = {f"LOGIT {loss}": loss for loss in sorted(LOSSES)}
POLICIES: list[list[str]] = [[], ["LS"], ["NORM"], ["LP"], ["LP", "LS"], ["LP", "NORM"], ["EAT"]]
POLICIES += [["EAKD"]]
LARGEST = 1e4
SLACK = 8
TRIALS = 6
SLACK_OF_TRIALS = 24  # which rarely find the most that a result moves
# What a float32 step cannot hold, and a float64 reference can.
UNDERFLOW = 1e-30
# How the networks give their logits: in a type, or as the last layer gives them under autocast.
MODES: dict[str, torch.dtype | None] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bf16 logits": torch.bfloat16,
    "bf16 autocast": None,
}


class Answer(nn.Module):
    """A network whose logits are given; under autocast its last layer, an identity, rounds them."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image: Tensor) -> tuple[Tensor, dict]:
        if torch.is_autocast_enabled("cpu"):
            return F.linear(self.logits, torch.eye(self.logits.shape[1])), {}
        return self.logits, {}


@dataclass(frozen=True)
class Batch:
    """The student's and the teacher's logits (B, C), and labels (B,)."""

    student: np.ndarray
    teacher: np.ndarray
    target: np.ndarray


@dataclass
class Tally:
    """What became of a method's cases.

    Attributes:
        worst: the largest error of each kind, as a share of what is allowed.
        faults: one line for each batch with a fault.
    """

    cases: int = 0
    batches: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def fuzz(name: str, cases: int, seed: int = 0) -> Iterator[Tally]:
    """At least so many cases of a method, a batch each time that the iterator is advanced."""
    tally = Tally()
    while tally.cases < cases:
        key = [seed, [*METHODS, *COMPOSED].index(name), tally.batches]
        rng = np.random.default_rng(key)
        batch = draw(rng)
        mode = rng.choice(list(MODES))
        check: Callable[..., dict[str, float]]
        if name in METHODS:
            cfg, epoch = settings(rng, name, batch.student.shape[1])
            check, what = partial(compare, name), name
        else:
            cfg, epoch = composition(rng, COMPOSED[name], batch.student.shape[1])
            check, what = partial(compare_formula, rng), f"{name} with {cfg.LOGIT.POLICIES}"
        try:
            errors = check(cfg, epoch, mode, batch)
        except AssertionError as error:
            errors = {str(error): np.inf}
        for kind, error in errors.items():
            tally.worst[kind] = max(tally.worst.get(kind, 0.0), error)
        wrong = [f"{kind} {error:.3g}" for kind, error in errors.items() if not error <= 1]
        if wrong:
            tally.faults.append(f"{what}, batch {key}, {mode}: {', '.join(wrong)}")
        tally.batches += 1
        tally.cases += len(batch.target)
        yield tally


def draw(rng: np.random.Generator) -> Batch:
    size, classes = round(64 ** rng.random()), round(2 * 500 ** rng.random())
    student, teacher = rows(rng, size, classes), rows(rng, size, classes)
    close = student + 10 ** rng.uniform(-6, 0) * rng.standard_normal(student.shape)
    relation = rng.integers(4, size=(size, 1))
    teacher = np.choose(relation, [student, close.clip(-LARGEST, LARGEST), teacher, teacher])
    labels = [
        rng.integers(classes, size=size),
        teacher.argmax(1),
        student.argmax(1),
        teacher.argmin(1),
    ]
    return Batch(student, teacher, np.choose(rng.integers(len(labels), size=size), labels))


def rows(rng: np.random.Generator, size: int, classes: int) -> np.ndarray:
    """Logits (B, C) up to LARGEST, each row of a kind of its own."""
    noise, scale = rng.standard_normal((size, classes)), 10 ** rng.uniform(-6, 4, (size, 1))
    one = np.arange(classes) == rng.integers(classes, size=(size, 1))
    few = rng.random((size, classes)) < 0.1
    kinds = [
        scale * noise,  # every magnitude
        scale * np.ones_like(noise),  # all equal
        noise + scale * one,  # one class dominates
        noise - scale * one,  # one class is left behind
        scale * one,  # as one-hot labels
        noise - LARGEST * ~few,  # most are hugely negative
        scale * noise.round(),  # many ties
        LARGEST * np.sign(noise),  # as far apart as can be
        scale + 1e-6 * noise,  # differences that vanish beside the logits
    ]
    kind = rng.integers(len(kinds), size=(size, 1))
    return np.choose(kind, kinds).clip(-LARGEST, LARGEST)


def settings(rng: np.random.Generator, name: str, classes: int) -> tuple[CfgNode, int]:
    """A config, with the paper's settings among others, and an epoch."""
    cfg = get_cfg()
    cfg.SOLVER.EPOCHS = 80
    node = cfg[name]
    temperature = float(rng.choice([0.5, 1.0, 2.0, 4.0, 20.0]))
    if name == "KD":
        node.TEMPERATURE = temperature
    else:
        node.T, node.BETA = temperature, float(rng.choice([1.0, 2.0, 8.0]))
        for technique, keys in {
            "EAT": {"RANGE": rng.choice([0.2, 0.4, -0.4, 0.9])},
            "DAT": {"RANGE": rng.choice([0.05, 0.5]), "FRACTION": rng.choice([0.1, 0.5])},
            "LP": {"RATIOS": np.sort(rng.uniform(0, 1 - 2 / classes, 4))},
        }.items():
            if technique in name:
                node.get(technique, node).update({k: v.tolist() for k, v in keys.items()})
    return cfg, int(rng.integers(1, cfg.SOLVER.EPOCHS + 1))


def composition(rng: np.random.Generator, loss: str, classes: int) -> tuple[CfgNode, int]:
    """A LOGIT config of a loss with policies that go with it, and an epoch."""
    cfg = get_cfg()
    cfg.SOLVER.EPOCHS = 80
    cfg.DISTILLER.TYPE = "LOGIT"
    node = cfg.LOGIT
    node.LOSS, node.T = loss, float(rng.choice([0.5, 1.0, 2.0, 4.0, 20.0]))
    node.LP.RATIOS = np.sort(rng.uniform(0, 1 - 2 / classes, 4)).tolist()
    node.DIST.GAMMA, node.LDRLD.ALPHA = rng.choice([0.0, 1.0], 2).tolist()
    node.RLD.RATIO = float(rng.choice([0.25, 1.0]))
    node.ABKD.ALPHA, node.ABKD.BETA = rng.choice([0.0, 0.1, 0.5, 1.0], 2).tolist()
    node.GDKD.TOP, node.LDRLD.TOP = rng.integers(2, 9, 2).tolist()
    while True:
        node.POLICIES = POLICIES[rng.integers(len(POLICIES))]
        if not RECIPES["LOGIT"].read(node).conflict:
            return cfg, int(rng.integers(1, cfg.SOLVER.EPOCHS + 1))


@dataclass
class Step:
    """What a distiller does with a batch.

    Attributes:
        logits: the student's and the teacher's, as the losses take them, (B, C).
        losses: as returned.
        gradients: of each loss, by these logits and by what the student gave.
        temperatures: DAT's, (B,).
    """

    logits: list[Tensor]
    losses: dict[str, Tensor]
    gradients: dict[str, tuple[Tensor, ...]]
    temperatures: Tensor | None


def take(name: str, cfg: CfgNode, epoch: int, mode: str, batch: Batch) -> Step:
    dtype = MODES[mode] or torch.float32
    networks = [Answer(torch.tensor(z).to(dtype)) for z in (batch.student, batch.teacher)]
    distiller: Any = distiller_dict[name](*networks, cfg).train()
    pairs, given, pair = [], [], distiller.pair

    def recorded(*args: Any) -> Pair:
        given.append(args)
        pairs.append(pair(*args))
        return pairs[-1]

    distiller.pair = recorded
    image, target = torch.empty(len(batch.target), 0), torch.from_numpy(batch.target)
    with build_autocast("none" if MODES[mode] else "bf16", image.device)():
        logits, losses = distiller(image=image, target=target, epoch=epoch)
        seen = [given[0][0].detach(), given[0][1]]
    gradients = {
        term: torch.autograd.grad(loss, [logits, networks[0].logits], retain_graph=True)
        for term, loss in losses.items()
    }
    return Step(seen, losses, gradients, pairs[0].tau if "DAT" in name else None)


def compare(name: str, cfg: CfgNode, epoch: int, mode: str, batch: Batch) -> dict[str, float]:
    """The largest error of each result, as a share of what is allowed; nan where not finite.

    Raises:
        AssertionError: DAT ranks wrongly, or a pruned class gets a gradient.
    """
    step = take(name, cfg, epoch, mode, batch)
    z_s, z_t = (z.double().numpy() for z in step.logits)
    largest = np.maximum(np.abs(z_s).max(1), np.abs(z_t).max(1))
    eps = torch.finfo(step.logits[0].dtype).eps

    def unit(temperature: Any) -> np.ndarray:
        """What is allowed for each unit that a result moves, (B,)."""
        return SLACK * eps * (1 + largest / temperature + np.log(z_s.shape[1]))

    def spread(node: CfgNode, temperature: float, kl: reference.Rows) -> np.ndarray:
        assert step.temperatures is not None
        doubt, found = unit(temperature) * kl.moves[:, 0], step.temperatures.double().numpy()
        return reference.dat(node, temperature, kl.value[:, 0], doubt, found)

    ce, kd, tau, pruned = reference.method(name, cfg, epoch, z_s, z_t, batch.target, spread)
    if pruned is not None:
        of_pruned = step.gradients["loss_kd"][0].numpy()[pruned]
        assert not of_pruned.any(), "a pruned class gets a gradient"
    errors = {}
    for term, expected, temperature in (("loss_ce", ce, 1.0), ("loss_kd", kd, tau)):
        mean = expected.times(1 / len(batch.target))
        allowed = unit(temperature)[:, None] * mean.moves + UNDERFLOW
        gradient, given = (g.double().numpy() for g in step.gradients[term])
        loss = step.losses[term].item()
        errors[term] = share(loss - mean.value[:, 0].sum(), allowed[:, 0].sum())
        errors[f"{term} gradient"] = share(gradient - mean.value[:, 1:], allowed[:, 1:])
        if not np.isfinite(given).all():
            errors[f"{term} gradient by what the student gave"] = np.nan
    return errors


def compare_formula(
    rng: np.random.Generator, cfg: CfgNode, epoch: int, mode: str, batch: Batch
) -> dict[str, float]:
    """As `compare`, of a LOGIT config with the formula of its loss."""
    step, node = take("LOGIT", cfg, epoch, mode, batch), cfg.LOGIT
    student, teacher = (z.double() for z in step.logits)
    target = torch.from_numpy(batch.target)

    def results(noise: Callable[[Tensor], Tensor]) -> np.ndarray:
        """The loss of the batch, then its gradient."""
        logits = student.clone().requires_grad_()
        rows = reference.formula(node, epoch, cfg.SOLVER.EPOCHS, logits, teacher, target, noise)
        (gradient,) = torch.autograd.grad(rows.mean(), logits)
        return np.concatenate([[rows.mean().item()], gradient.numpy().ravel()])

    eps = torch.finfo(step.logits[0].dtype).eps
    expected = results(torch.zeros_like)
    tries = [
        results(lambda z: torch.from_numpy(rng.uniform(-eps, eps, z.shape))) for _ in range(TRIALS)
    ]
    moves = np.abs(np.array(tries) - expected).max(0) + eps * np.abs(expected)
    # Of a row's derivatives as much as of the one that moves most: each comes of all of them.
    rows = moves[1:].reshape(student.shape)
    rows[:] = rows.max(1, keepdims=True)
    allowed = SLACK_OF_TRIALS * moves + UNDERFLOW
    gradient, given = (g.double().numpy() for g in step.gradients["loss_kd"])
    loss = step.losses["loss_kd"].item()
    errors = {
        "loss_kd": share(loss - expected[0], allowed[0]),
        "loss_kd gradient": share(gradient.ravel() - expected[1:], allowed[1:]),
    }
    if mode == "float64":  # which is no better known by a reference in float64
        errors = {kind: 0.0 if np.isfinite(error) else error for kind, error in errors.items()}
    if not np.isfinite(given).all():
        errors["loss_kd gradient by what the student gave"] = np.nan
    return errors


def compositions_stay_finite(loss: str, batches: int, seed: int = 0) -> list[str]:
    """A loss with any policies in any mode: a line for each batch with a fault."""
    faults, made = [], list(composed.compositions(loss, complete=True))
    made = [parts for parts in made if not parts.conflict]
    for number in range(batches):
        rng = np.random.default_rng([seed, number])
        batch = draw(rng)
        size, classes = batch.student.shape
        parts = made[rng.integers(len(made))]
        if classes < 4 and any(type(policy).__name__ == "LP" for policy in parts.policies):
            continue  # its ratios leave none
        parts = parts._replace(weights=Weights(T=float(rng.choice([0.5, 1.0, 4.0, 20.0]))))
        mode = rng.choice(list(MODES))
        dtype = MODES[mode] or torch.float32
        networks = [Answer(torch.tensor(z).to(dtype)) for z in (batch.student, batch.teacher)]
        distiller = composed.Made(*networks, composed.Cfg(parts)).train()
        image, target = torch.empty(size, 0), torch.from_numpy(batch.target)
        with build_autocast("none" if MODES[mode] else "bf16", image.device)():
            _, losses = distiller(image=image, target=target, epoch=int(rng.integers(1, 3)))
        gradients = torch.autograd.grad(losses["loss_kd"], distiller.get_learnable_parameters())
        results = [losses["loss_kd"], *gradients, *distiller.monitor.values()]
        if not all(result.isfinite().all() for result in results):
            faults.append(f"batch {number}, {mode}, {parts}: {losses['loss_kd']}")
    return faults


def share(error: np.ndarray, allowed: np.ndarray) -> float:
    return float((np.abs(error) / allowed).max())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100_000, help="of each method")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    faults = 0
    for name in [*METHODS, *COMPOSED]:
        with tqdm(total=args.cases, desc=name, leave=False) as bar:
            for tally in fuzz(name, args.cases, args.seed):
                bar.update(tally.cases - bar.n)
        worst = ", ".join(f"{kind} {error:.2f}" for kind, error in tally.worst.items())
        print(
            f"{name}: {tally.cases:,} cases in {tally.batches:,} batches, "
            f"{len(tally.faults)} batches with a fault; worst error, of what is allowed: {worst}"
        )
        print(*tally.faults[:10], sep="\n", end="\n" if tally.faults else "")
        faults += len(tally.faults)
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
