"""The optimizer and the learning rates that a section SOLVER asks for."""

import ast
import warnings
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn, optim
from yacs.config import CfgNode

from .errors import brief
from .settings import Rule, number, only

if TYPE_CHECKING:
    from .sections import Solver

# Of torch.optim what has a weight decay and takes any weights; LBFGS, Muon, Rprop and SparseAdam
# do not. Adafactor came with PyTorch 2.5.
OPTIMIZERS = ["SGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD"]
OPTIMIZERS = [name for name in (*OPTIMIZERS, "NAdam", "RAdam", "RMSprop") if hasattr(optim, name)]
# What a program of rows takes, which makes SGD's steps itself.
PLAIN = {"TYPE": "SGD", "OPTIMIZER_ARGS": "", "CLIP_NORM": 0, "EMA_DECAY": 0}
PLAIN |= {"MIXUP": 0, "CUTMIX": 0}


def arguments(text: str) -> dict[str, Any]:
    """ "betas=(0.9, 0.95), eps=1e-6" as a dict.

    Raises:
        ValueError: it is something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of text that is nearly Python
            call = ast.parse(f"f({text})", mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            found = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
            if len(found) == len(call.keywords):
                return found
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from error
    raise ValueError("no arguments NAME=VALUE")


def _are_arguments(text: str) -> bool:
    try:
        return bool(arguments(text))
    except ValueError:
        return False


ARGUMENTS: Rule = (_are_arguments, "arguments NAME=VALUE, as betas=(0.9, 0.95), eps=1e-6")


def make_optimizer(
    solver: "Solver", groups: list[dict[str, Any]], fused: bool = False
) -> optim.Optimizer:
    """The optimizer of groups of weights, which clips their gradient before each of its steps.

    Args:
        fused: of SGD: one kernel, which takes the learning rate from the device.
    """
    more = {"momentum": solver.MOMENTUM, "fused": fused} if solver.TYPE == "SGD" else {}
    optimizer = getattr(optim, solver.TYPE)(
        groups,
        lr=solver.LR,
        weight_decay=solver.WEIGHT_DECAY,
        **more,
        **arguments(solver.OPTIMIZER_ARGS),
    )
    weights = [weight for group in groups for weight in group["params"]]

    def clip(*step: Any) -> None:
        nn.utils.clip_grad_norm_(weights, solver.CLIP_NORM)

    if solver.CLIP_NORM:
        optimizer.register_step_pre_hook(clip)
    return optimizer


def rates(solver: "Solver", epoch: int, steps: int) -> list[float]:
    """The learning rate of each of an epoch's steps; epochs count from 1.

    With W steps of warm-up, step s of all S, counted from 0, has `min((s + 1) / (W + 1), 1)` of
    what the schedule says: of `step` LR times LR_DECAY_RATE for each stage that is over, an epoch
    in LR_DECAY_STAGES being its stage's last; of `cosine` LR at the end of the warm-up and
    `(1 + cos(π (s - W) / (S - W))) / 2` of it from there on. `one_cycle` rises in these W steps
    from LR / 25 to LR and then falls to LR / 250,000, both linearly.

    References:
        Loshchilov, Hutter: SGDR, arXiv:1608.03983; Smith, Topin: Super-Convergence,
        arXiv:1708.07120, as torch.optim.lr_scheduler has them.
    """
    place = np.arange((epoch - 1) * steps, epoch * steps)
    warm, last = round(solver.LR_WARMUP * steps), solver.EPOCHS * steps - 1
    if solver.SCHEDULE == "one_cycle":
        ends = [0, max(warm - 1, 0), last]
        return np.interp(place, ends, [solver.LR / 25, solver.LR, solver.LR / 25e4]).tolist()
    if solver.SCHEDULE == "cosine":
        done = np.maximum(place - warm, 0) / max(last + 1 - warm, 1)
        full = solver.LR * (1 + np.cos(np.pi * done)) / 2
    else:
        stages = sum(epoch > stage for stage in solver.LR_DECAY_STAGES)
        full = solver.LR * solver.LR_DECAY_RATE**stages
    return (full * np.minimum((place + 1) / (warm + 1), 1.0)).tolist()


def plain_only(solver: "Solver") -> str:
    """Why a run takes the plain loop, and no program of rows; or ""."""
    apart = [key for key, value in PLAIN.items() if getattr(solver, key) != value]
    said = ", ".join(f"SOLVER.{key} {getattr(solver, key)}" for key in apart)
    return f"{said} is for the plain loop alone" if said else ""


def rules_beside(cfg: CfgNode, labelled: str, own_loss: str) -> dict[str, Rule]:
    """What the settings of a checked section SOLVER allow each other, and the method allows them.

    Args:
        labelled: why the method needs one label for each image, or "".
        own_loss: why the cross-entropy with the labels is not this project's, or "".
    """
    solver, rules = cfg.SOLVER, {}
    if solver.TYPE != "SGD" or solver.OPTIMIZER_ARGS:
        rules["SOLVER.OPTIMIZER_ARGS"] = _optimizer_rule(solver)
    rises = solver.SCHEDULE == "one_cycle"
    allowed, text = number(0, solver.EPOCHS, open_low=rises)
    reason = ", as one_cycle rises in these epochs" if rises else ""
    rules["SOLVER.LR_WARMUP"] = (allowed, f"{text} (SOLVER.EPOCHS){reason}")
    if own_loss:
        rules["SOLVER.LABEL_SMOOTHING"] = only(0.0, f"as {own_loss}")
    mixing = [f"SOLVER.{key}" for key in ("MIXUP", "CUTMIX") if solver[key]]
    if labelled:
        rules |= {key: only(0.0, f"as {labelled}") for key in mixing}
    elif mixing and cfg.DISTILLER.TYPE != "NONE":
        reason = f"as no table holds the images that {mixing[0]} mixes"
        rules["DISTILLER.TEACHER_TABLE"] = only("off", reason)
    return rules


def _optimizer_rule(solver: "Solver") -> Rule:
    """What torch.optim allows for OPTIMIZER_ARGS: a step is tried."""
    own = {"params", "lr", "weight_decay"}
    own |= {"momentum", "fused"} if solver.TYPE == "SGD" else set()
    known = signature(getattr(optim, solver.TYPE)).parameters.keys() - own
    text = f"arguments of torch.optim.{solver.TYPE}: {', '.join(sorted(known))}"
    if arguments(solver.OPTIMIZER_ARGS).keys() - known:
        return lambda v: False, text
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    try:
        make_optimizer(solver, [{"params": [weight]}]).step()
    except Exception as error:  # whatever is wrong with their values
        fault = f"{type(error).__name__}: {brief(str(error))}"
        return lambda v: False, f"{text} ({fault})"
    return lambda v: True, text
