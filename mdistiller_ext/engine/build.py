"""From a config to the parts of a run: device, distiller, optimizer."""

import copy
import ctypes
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from yacs.config import CfgNode

from ..data import Batch, ImageSet, facts
from ..distillers import Distiller, Logit, Vanilla, distiller_dict, source
from ..errors import ConfigError, RunError, brief
from ..files import default_cache
from ..memory import is_out_of_memory
from ..models import ResNet, activated, build_network, set_layout, shapes_of
from ..sections import Networks, Solver
from ..solver import make_optimizer
from ..teacher import TeacherTable, Unwritable, Weights, features_taken, load_into
from ..toolkit.methods import FIXES, build_toolkit_distiller


def pick_device(name: str | None) -> torch.device:
    """The named device; None takes a GPU where there is one. Of "cuda" each process of torchrun
    has its own, and what names no device means that one from now on.

    Raises:
        ConfigError: there is no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()  # which "meta" has not
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if device.type == "cpu":
            _keep_freed_memory()
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"--device {name}: not usable here: {str(error).splitlines()[0]}"
        ) from error
    return device


def set_arithmetic(device: torch.device, tf32: bool) -> None:
    """Of convolutions on a GPU: whether float32 takes tensor cores."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = tf32


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, instead of a page fault for each 4 KB."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
        mallopt(m_mmap_threshold, 1 << 25)
        mallopt(m_trim_threshold, (1 << 31) - 1)
        mallopt(m_top_pad, 1 << 26)


def build_distiller(cfg: CfgNode, weights: Weights | None, data: ImageSet) -> Distiller:
    """The student, the teacher with its weights, and the method between them.

    Args:
        data: the training set.

    Raises:
        ConfigError: a network cannot be built, or the method's constructor changes the teacher.
        RunError: the weights do not fit the teacher.
    """

    classes = facts(cfg.DATASET).classes

    def network(role: str, name: str) -> nn.Module:
        place = classes, data.side, cfg.DATASET.TYPE
        return build_network(name, *place, key=f"DISTILLER.{role}")

    # The student draws first: with one seed it starts from the same weights in every method.
    student, teacher = network("STUDENT", cfg.DISTILLER.STUDENT), None
    before: dict[str, Tensor] = {}
    if weights:
        name = weights.network or cfg.DISTILLER.TEACHER
        teacher = network("TEACHER", name)
        load_into(teacher, weights, name)
        before = copy.deepcopy(teacher.state_dict())
    method = cfg.DISTILLER.TYPE
    if source(cfg.DISTILLER) == "mdistiller":
        with _fitting(method, student, teacher, few(data)):
            distiller = build_toolkit_distiller(cfg, student, teacher, data.targets)
        # It runs as it is, but not in silence.
        if teacher and (name := changed_tensor(before, teacher)):
            mended = ": DISTILLER.FIX_UPSTREAM True mends it" if method in FIXES else ""
            print(f"warning: {method}: its constructor changes the teacher, as {name}{mended}")
        return distiller
    distiller = distiller_dict[method](student, teacher, cfg)
    if teacher and (name := changed_tensor(before, teacher)):
        raise ConfigError(
            f"DISTILLER.TYPE: the constructor of {method} changes the teacher, as {name}: look at "
            f"what a network answers on a copy of it, in evaluation mode"
        )
    return distiller


def changed_tensor(before: dict[str, Tensor], network: nn.Module) -> str:
    """The first tensor of a network that is not what it was, or ""."""
    now = network.state_dict()
    return next((k for k, v in before.items() if k not in now or not torch.equal(v, now[k])), "")


def takes_features(distiller: Distiller, data: ImageSet) -> set[str]:
    """Of which networks the method takes features, tried on a few images.

    Raises:
        ConfigError: a method of the toolkit cannot live with those of these networks.
    """
    batch = few(data)
    if isinstance(distiller, Distiller):
        return features_taken(distiller, batch)
    with _fitting(distiller.TYPE, distiller.student, distiller.teacher, batch):
        return features_taken(distiller, batch)


def lay_out(
    distiller: Distiller,
    data: ImageSet,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """Lay out in memory as channels-last what then still works: both networks, or one of them.

    Tried is a step of each size of batch, and each network in evaluation mode, all on a copy.
    """
    known = all(isinstance(net, (ResNet, nn.Identity)) for net in _networks(distiller))
    if known and isinstance(distiller, (Logit, Vanilla)):  # they do, and it need not be tried
        set_layout(distiller, torch.channels_last)
        return
    images = len(data)
    sizes = {min(batch_size, images), images % batch_size} - {0}
    devices = [data.targets.device] if data.targets.is_cuda else []
    for others in ((), ("teacher",), ("student",)):
        trial = copy.deepcopy(distiller)
        with suppress(Exception), torch.random.fork_rng(devices):  # whatever a network does then
            _channels_last_but(trial, others)
            for size in sizes:
                _try(trial, _some(data, size), autocast)
            _channels_last_but(distiller, others)
            return


def _channels_last_but(distiller: Distiller, others: Sequence[str]) -> None:
    for name, part in distiller.named_children():
        if name not in others:
            set_layout(part, torch.channels_last)


def _try(
    distiller: Distiller, batch: Batch, autocast: Callable[[], AbstractContextManager]
) -> None:
    """A step's forward and backward, and what each network answers in evaluation mode."""
    distiller.train()
    with autocast():
        _, losses = distiller(image=batch.image, target=batch.target, index=batch.index, epoch=1)
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    distiller.eval()
    with torch.no_grad():
        for network in _networks(distiller):
            network(batch.image)


def _networks(distiller: Distiller) -> list[nn.Module]:
    """Student and teacher; the student alone of the toolkit has none."""
    return [part for name, part in distiller.named_children() if name in ("student", "teacher")]


def few(data: ImageSet) -> Batch:
    """A batch of four images, or of all where there are fewer."""
    return _some(data, 4)


def _some(data: ImageSet, count: int) -> Batch:
    """A batch of the first images."""
    index = torch.arange(min(count, len(data)), device=data.targets.device)
    return data.batch(index, torch.zeros_like(index))


@contextmanager
def _fitting(
    method: str, student: nn.Module, teacher: nn.Module | None, batch: Batch
) -> Iterator[None]:
    """Turns what a method of the toolkit raises for networks that it cannot take into one line.

    Raises:
        ConfigError: says the shapes of the networks' features.
    """
    try:
        yield
    except (ConfigError, RunError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        pair = {"student": student, "teacher": teacher}
        shapes = [f"{role} {_features(net, batch)}" for role, net in pair.items() if net]
        raise ConfigError(
            f"DISTILLER.TYPE: {method} does not go with this pair: {type(error).__name__}: "
            f"{brief(str(error))}; features of {', of '.join(shapes)}"
        ) from error


def _features(network: nn.Module, batch: Batch) -> dict[str, Any]:
    image = batch.image.to(next(network.parameters()).device)
    with torch.no_grad():
        return shapes_of(copy.deepcopy(network).eval()(image)[1])


class CompiledStudent:
    """A student whose training forward is compiled to give logits alone.

    Features would have to be written to memory; without them, batch norms, activations and sums
    become one pass each. It takes the place of the network's `forward`. Of a CIFAR ResNet the
    blocks are compiled, each kind once, so that a deep one takes no longer than a shallow one.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student, self.live = student, student.forward
        self.logits: Callable[[Tensor], Tensor]
        if isinstance(student, ResNet):
            # Five kinds of blocks, in batches of two sizes, are more than torch's limit of 8.
            torch._dynamo.config.cache_size_limit = 64
            block = torch.compile(activated, dynamic=False)
            self.logits = partial(student.logits, block=block)
        else:
            self.logits = torch.compile(self._live_logits, dynamic=False)
        student.forward = self  # type: ignore[method-assign, assignment]

    def _live_logits(self, image: Tensor) -> Tensor:
        return self.live(image)[0]

    def __call__(self, image: Tensor) -> tuple[Tensor, dict]:
        if not self.student.training:
            return self.live(image)
        try:
            with warnings.catch_warnings():  # dynamo looks at the gradient of a block's input
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
                return self.logits(image), {}
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).split("\n", 1)[0]
            raise ConfigError(f"SOLVER.COMPILE: True, but it fails here: {reason}") from error


def build_table(networks: Networks, distiller: Distiller, data: ImageSet) -> TeacherTable | None:
    """The teacher table of a method that takes only logits; None where there is no place for it.

    Raises:
        RunError: the table's files are damaged.
    """
    root = Path(networks.TEACHER_TABLE_ROOT or default_cache())
    try:
        dtype, tf32 = networks.TEACHER_TABLE_DTYPE, networks.TEACHER_TABLE_TF32
        table = TeacherTable(root, distiller.teacher, data, dtype, tf32)
    except Unwritable as error:
        if networks.TEACHER_TABLE == "on":
            raise
        print(f"{error}: it is not used")
        return None
    filled, free = table.filled, shutil.disk_usage(table.folder).free
    text = f"{filled:,} of {table.rows:,} views, {table.nbytes / 1e6:,.1f} MB when full"
    if networks.TEACHER_TABLE == "auto" and free < (1 - filled / table.rows) * table.nbytes:
        print(f"teacher table {table.folder}: not used: {text}, {free / 1e6:,.1f} MB free")
        return None
    print(f"teacher table {table.folder}: {text}")
    table.hold_on_gpu()
    return table


def build_optimizer(solver: Solver, distiller: Distiller) -> torch.optim.Optimizer:
    ours = isinstance(distiller, Distiller)  # a method of the toolkit is none
    # A dict, for a set's order is that of addresses, and a resumed run needs the same one.
    apart = dict.fromkeys(distiller.get_undecayed_parameters() if ours else ())
    decayed = [p for p in distiller.get_learnable_parameters() if p not in apart]
    if not any(p.requires_grad for p in (*decayed, *apart)):
        raise ConfigError("nothing is left to train: requires_grad is off for all weights")
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if apart:
        groups.append({"params": list(apart), "weight_decay": 0.0})
    return make_optimizer(solver, groups, fused=next(distiller.parameters()).is_cuda)


def build_average(solver: Solver, student: nn.Module) -> AveragedModel | None:
    """The average of a student's weights and statistics with SOLVER.EMA_DECAY, if there is one: of
    those after each step, the first one's counting as all before it."""
    if not solver.EMA_DECAY:
        return None
    average = get_ema_multi_avg_fn(solver.EMA_DECAY)
    return AveragedModel(student, multi_avg_fn=average, use_buffers=True).requires_grad_(False)


def build_autocast(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """A context for the forward pass: SOLVER.AMP "bf16" or "none"."""
    if amp == "none":
        return nullcontext
    # No weight is used twice, and a CUDA graph must not hold what a cache may free.
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, cache_enabled=False)
