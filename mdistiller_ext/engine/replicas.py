"""One run on several devices, a process each: how a batch is divided and what is put together.

`torchrun --nproc_per_node N tools/train.py ...` starts the processes. The batch of the config is
the global one, whatever their number.
"""

import copy
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..data import Batch
from ..distillers import Distiller
from ..errors import ConfigError, RunError
from ..losses import at_least_float32
from ..policies import Context
from .loop import Meter

# What PyTorch makes synchronised ones of; a library's own may do more than these.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TORCHRUN = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")  # a part of what it sets


class World:
    """The processes of a run. The first one alone writes, evaluates and shows.

    Attributes:
        rank: 0 to size - 1.
        shares: the images that each process has in the batch of the moment.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.shares: list[int] = []
        self.steps: Iterator[list[int]] = iter(())

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """What torchrun's environment says; alone without it.

        Tensors on GPUs go by nccl, all else by gloo. The others wait while the first process
        trains a teacher.

        Raises:
            ConfigError: it says something else.
        """
        try:
            size = int(os.environ.get("WORLD_SIZE", "1"))
            if size > 1 and not dist.is_initialized():
                backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=timedelta(days=7))
            return cls(int(os.environ.get("RANK", "0")) if size > 1 else 0, size)
        except (ValueError, dist.DistError) as error:
            found = ", ".join(f"{key}={os.environ.get(key, '')}" for key in TORCHRUN)
            raise ConfigError(
                f"{found}: is not what torchrun sets, which starts a run of several processes; "
                f"unset WORLD_SIZE for one ({error})"
            ) from error

    def leave(self) -> None:
        """Give up what `join` made."""
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def divide(self, keys: Sequence[Tensor], batch_size: int) -> tuple[list[Tensor], list[int]]:
        """This process's part of each of an epoch's keys (N,), and the sizes of its batches."""
        smallest = len(keys[0]) % batch_size or batch_size
        if smallest < self.size:
            raise ConfigError(
                f"SOLVER.BATCH_SIZE: {batch_size} is not allowed: it leaves a batch of {smallest} "
                f"images for {self.size} processes"
            )
        if self.size == 1:
            return list(keys), [len(batch) for batch in keys[0].split(batch_size)]
        cut = [[b.tensor_split(self.size) for b in key.split(batch_size)] for key in keys]
        shares = [[len(part) for part in batch] for batch in cut[0]]
        self.steps = iter(shares)
        own = [torch.cat([batch[self.rank] for batch in key]) for key in cut]
        return own, [batch[self.rank] for batch in shares]

    def tell(self, content: Any) -> Any:
        """The first process's `content`, in all of them.

        Raises:
            RunError: that process is no more.
        """
        if self.size == 1:
            return content
        box = [content]
        try:
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        except RuntimeError as error:
            raise RunError(f"process {self.rank}: the first process has ended") from error
        return box[0]

    def largest(self, number: int) -> int:
        """Of what each process gives, in all of them."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def meet(self) -> float:
        """Begin the epoch's next step. Returns the weight of this process's mean in it."""
        self.shares = next(self.steps)
        return self.shares[self.rank] * self.size / sum(self.shares)

    def gather(self, values: Tensor) -> tuple[Tensor, slice]:
        """The values (B,) of the whole batch, in its order, and where this process's are."""
        most = max(self.shares)
        padded = F.pad(values, (0, most - len(values)))
        parts = [torch.empty_like(padded) for _ in self.shares]
        dist.all_gather(parts, padded)
        start = sum(self.shares[: self.rank])
        whole = [part[:share] for part, share in zip(parts, self.shares, strict=True)]
        return torch.cat(whole), slice(start, start + self.shares[self.rank])

    def merge(self, meter: Meter) -> None:
        """Make an epoch's sums those of all processes."""
        if self.size == 1:
            return
        sizes = torch.tensor(meter.sizes, device=meter.terms.device)
        for tensor in (meter.terms, sizes, *meter.totals.values()):
            dist.all_reduce(tensor)
        meter.terms /= self.size  # each is a mean already weighted by its share
        meter.sizes = sizes.tolist()


class Replica(nn.Module):
    """A distiller in one of several processes: gradients are those of the whole batch's loss.

    Each process's losses are means over its share, and count by its size; DAT ranks the whole
    batch. With `sync_batch_norm` the batch norms of student and method normalise by the whole
    batch as well, so that the number of processes changes nothing but rounding.
    """

    def __init__(self, distiller: Distiller, world: World, sync_batch_norm: bool) -> None:
        super().__init__()
        if distiller.coupled:
            raise ConfigError(f"{distiller.TYPE} takes one process: {distiller.coupled}")
        device = next(distiller.student.parameters()).device
        distiller.teacher.requires_grad_(False)
        if sync_batch_norm:
            _synchronise(distiller, distiller.teacher, device)
        self.parallel = DistributedDataParallel(
            distiller, device_ids=[device] if device.type == "cuda" else None
        )
        self.world = world

    @property
    def monitor(self) -> dict[str, Tensor]:
        return getattr(self.parallel.module, "monitor", {})

    def forward(self, *, context: Context, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        weight = self.world.meet()
        context = context._replace(whole=self.world.gather)
        logits, losses = self.parallel(context=context, **inputs)
        return logits, {name: weight * loss.mean() for name, loss in losses.items()}


def compares_samples(distiller: nn.Module, batch: Batch) -> str:
    """Why the loss of a batch is none that processes can share, or "": it is not the mean of the
    losses of its halves. Found on a copy whose batch norms do not depend on the batch."""
    trial: Any = copy.deepcopy(distiller).train()
    for module in trial.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    cut = len(batch.target) // 2
    with torch.no_grad(), torch.random.fork_rng([batch.image.device] * batch.image.is_cuda):

        def terms(own: slice) -> dict[str, Tensor]:
            torch.manual_seed(0)
            inputs = {"image": batch.image[own], "target": batch.target[own]}
            _, losses = trial(**inputs, index=batch.index[own], epoch=1)
            return {name: loss.float().mean() for name, loss in losses.items()}

        whole, one, other = map(terms, (slice(2 * cut), slice(cut), slice(cut, 2 * cut)))
    for name, value in whole.items():
        halves = (one[name] + other[name]) / 2
        if not torch.isclose(value, halves, rtol=1e-3):
            return (
                f"its {name} of a batch, {value:.4g}, is not the mean of those of its halves, "
                f"{halves:.4g}: it compares samples with each other"
            )
    return ""


def _synchronise(module: nn.Module, teacher: nn.Module, device: torch.device) -> None:
    """Give the batch norms of student and method the statistics of all processes' images."""
    left: Counter[str] = Counter()

    def go_on(module: nn.Module) -> None:
        for name, child in module.named_children():
            if child is teacher:
                continue
            if not isinstance(child, _BatchNorm):
                go_on(child)
            elif device.type == "cuda" and type(child) in BATCH_NORMS:
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
            elif device.type != "cuda" and SyncedBatchNorm2d.fits(child):
                child.__class__ = SyncedBatchNorm2d
            else:
                left[type(child).__name__] += 1

    go_on(module)
    if left:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left.items())
        print(f"warning: SOLVER.SYNC_BN: these keep the statistics of their own process: {kinds}")


class _Sum(torch.autograd.Function):
    """The sum over all processes of a tensor, and of its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        whole = values.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are those of all processes' images, on a CPU.

    PyTorch's own SyncBatchNorm runs on GPUs only. Statistics are in float32 or better.
    """

    @staticmethod
    def fits(norm: nn.Module) -> bool:
        """Whether a batch norm can become one."""
        known = type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats
        return known and norm.momentum is not None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        kind, x = x.dtype, at_least_float32(x)
        count = torch.tensor(x.numel() / x.shape[1], dtype=x.dtype, device=x.device)
        dist.all_reduce(count)
        mean = _Sum.apply(x.sum(dim=(0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = _Sum.apply(centred.pow(2).sum(dim=(0, 2, 3))) / count
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(kind)
