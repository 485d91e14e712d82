"""The toolkit's own methods in our engine."""

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ..errors import ConfigError, RunError
from ..files import code_hash
from ..policies import Context
from ..seeding import epoch_generator
from ..teacher import TabledTeacher
from .contrastive import ContrastiveSampler
from .locate import import_toolkit

# What DISTILLER.FIX_UPSTREAM mends, by method.
FIXES = {
    "OFD": "the teacher stays in eval mode, so that its statistics do not drift",
    "VID": "the scales are trained, and the networks' statistics do not move at construction",
    "FITNET": "the networks' statistics do not move at construction",
    "KDSVD": "a sample whose SVD has no finite gradient gives none to the student's features",
}


def toolkit_node(name: str) -> CfgNode:
    """{name: config node} of one of the toolkit's methods; empty where it has no settings.

    Raises:
        ConfigError: mdistiller is missing or broken, or has no such method.
    """
    toolkit = import_toolkit()
    if name not in toolkit.registry:
        raise ConfigError(", ".join(toolkit.registry))
    return CfgNode({name: toolkit.config[name].clone()} if name in toolkit.config else {})


def toolkit_facts(name: str, fix: bool) -> dict[str, Any]:
    """For the record: the file that a method comes from and what was mended in it."""
    root, _, registry, _ = import_toolkit()
    file = Path(inspect.getfile(registry[name]))
    return {
        "file": file.relative_to(root).as_posix(),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "mended": FIXES.get(name) if fix else None,
    }


def toolkit_hash() -> str:
    """sha256 of the toolkit's code: a method is more than its own file."""
    return code_hash(import_toolkit().root / "mdistiller")


def build_toolkit_distiller(
    cfg: CfgNode, student: nn.Module, teacher: nn.Module | None, targets: Tensor
) -> Any:
    """A method of the toolkit's registry with what our engine asks of a distiller.

    CRD draws its contrastive samples itself, by the labels `targets` (N,) of the training set.
    DISTILLER.FIX_UPSTREAM mends what FIXES lists; without it every method is as it is.
    """
    name = cfg.DISTILLER.TYPE
    cls = _adapted(import_toolkit().registry[name])
    cls.TYPE = name
    if teacher is None:
        return cls(student)
    if name == "CRD":
        return _contrastive(cls)(student, teacher, cfg, targets)
    if cfg.DISTILLER.FIX_UPSTREAM:
        if name in ("FITNET", "VID"):  # they run both networks to learn the shapes
            student.eval()
            teacher.eval()
        elif name == "KDSVD":
            student.register_forward_hook(_finite_feature_gradients)
        cls = {"OFD": _teacher_in_eval_mode, "VID": _trained_scales}.get(name, lambda c: c)(cls)
    return cls(student, teacher, cfg)


def _adapted(cls: Any) -> Any:
    class Adapted(cls):
        coupled = ""  # which is measured

        def schedule(self, epoch: int) -> dict[str, float]:
            return {}

        tabled: TabledTeacher | None = None

        def forward_train(self, *, context: Context | None = None, **kwargs: Any) -> Any:
            answers = context and context.answers
            if answers is not None and self.tabled is None:
                self.tabled = TabledTeacher(self.teacher)
            try:
                if answers is None or self.tabled is None:
                    return super().forward_train(**kwargs)
                with self.tabled.answering(kwargs["image"], answers):
                    return super().forward_train(**kwargs)
            except torch.linalg.LinAlgError as error:  # KDSVD, once the weights are not finite
                reason = str(error).splitlines()[0]
                mended = "; DISTILLER.FIX_UPSTREAM True mends it" if cls.__name__ in FIXES else ""
                raise RunError(
                    f"{cls.__name__} in epoch {kwargs['epoch']}: {reason}{mended}"
                ) from error

    return Adapted


def _contrastive(cls: Any) -> Any:
    class Contrastive(cls):
        def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode, targets: Tensor):
            with _cuda_stays_here():  # its own sampler, which is not used, asks for a GPU
                super().__init__(student, teacher, cfg, len(targets))
            self.seed = cfg.SOLVER.SEED
            self.sampler = ContrastiveSampler(targets.cpu(), cfg.CRD.NCE.K, cfg.CRD.MODE)

        def forward_train(self, *, index: Tensor, epoch: int, **kwargs: Any) -> Any:
            # An image begins one batch of an epoch: what it draws needs nothing drawn before.
            draws = epoch_generator(self.seed, epoch, 1, int(index[0]), device=index.device)
            chosen = self.sampler(index, draws)
            return super().forward_train(index=index, contrastive_index=chosen, **kwargs)

    return Contrastive


def _teacher_in_eval_mode(cls: Any) -> Any:
    class TeacherInEvalMode(cls):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.teacher.eval()
            return self

    return TeacherInEvalMode


def _trained_scales(cls: Any) -> Any:
    class TrainedScales(cls):
        def init_vid_modules(self, *shapes: Any) -> None:
            super().init_vid_modules(*shapes)
            self.log_scales: Any = nn.ParameterList(self.log_scales)

        def get_learnable_parameters(self) -> list[nn.Parameter]:
            return [*super().get_learnable_parameters(), *self.log_scales]

    return TrainedScales


def _finite_feature_gradients(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook: the features become branches, so that what flows back through them can be
    filtered while the gradient of the logits, which passes by them, cannot be touched."""
    logits, features = output
    branches = [feature.view_as(feature) for feature in features["feats"]]
    for branch in branches:
        if branch.requires_grad:
            branch.register_hook(_without_bad_samples)
    return logits, {**features, "feats": branches}


def _without_bad_samples(gradient: Tensor) -> Tensor:
    good = gradient.isfinite().flatten(1).all(dim=1)
    return gradient.where(good.view(-1, *[1] * (gradient.ndim - 1)), 0.0)


@contextmanager
def _cuda_stays_here() -> Iterator[None]:
    live = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = live  # type: ignore[method-assign]
