"""K runs of one student, data set and solver as one program: a run is a row.

The plain loop (`loop.py`) says what a run is; a row is the run that it would be alone. On a GPU the
program is captured as a CUDA graph, so that a launch is 16 steps of K runs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..data import ImageSet
from ..distillers import Distiller, Logit
from ..losses import widest
from ..models import Stack
from ..policies import Context
from .graph import Graphs, Launch
from .loop import Epoch, Meter, searching
from .writer import snapshot

STEPS = 16  # of a launch: the host's part and the gaps between graphs become small


class Row(Protocol):
    """What belongs to one run. A program moves its tensors and leaves views of them here."""

    distiller: Distiller
    optimizer: torch.optim.Optimizer
    meter: Meter
    draws: int


@dataclass
class Group:
    """Neighbouring rows of one method: what only its loss knows.

    Attributes:
        distillers: of the rows.
        vmapped: whether the losses are those of the first distiller under torch.vmap; else each
            row's distiller computes its own, one after the other.
        rows: which of the program's rows.
        settings: what `schedule` gives for the epoch of each run, each (k,).
        learned: the method's own parameters, each (k, ...).
        terms: the losses of each step, (k, steps, terms).
        totals: the epoch's sums, each (k,).
    """

    distillers: list[Distiller]
    vmapped: bool
    rows: slice
    settings: dict[str, Tensor]
    learned: dict[str, nn.Parameter]
    terms: Tensor | None = None
    totals: dict[str, Tensor] = field(default_factory=dict)


class Rows:
    """The program of K runs. All tensors lie on the data's device.

    Args:
        rows: runs with students of one architecture, and one momentum and weight decay; those of
            one method are neighbours.
        data: the training set.
        batch_size: images of a step of each run.
        classes: how many teacher logits an epoch brings for each image; 0: none, so that the
            method of a run alone calls its teacher.
        form: of the stacked students, as in `Stack`; one run alone needs none.
        autocast: the precision of the students' forward pass.
        compiled: whether the step up to the losses is compiled.

    Attributes:
        index, view: each run's order of images and their views, (K, N).
        teacher: the teacher's logits in that order, (K, N, C), or None.
        uniforms: each run's random numbers by image, (K, N, draws), or None.
        position: the step of the epoch, the same for all rows, ().
    """

    def __init__(
        self,
        rows: Sequence[Row],
        data: ImageSet,
        batch_size: int,
        classes: int,
        form: str,
        autocast: Callable[[], AbstractContextManager],
        compiled: bool = False,
    ) -> None:
        self.rows, self.data, self.batch_size, self.autocast = rows, data, batch_size, autocast
        count, images, device = len(rows), len(data), data.targets.device
        self.sizes = [len(part) for part in torch.arange(images).split(batch_size)]
        self.index = torch.zeros(count, images, dtype=torch.int64, device=device)
        self.view = torch.zeros_like(self.index)
        self.teacher = torch.zeros(count, images, classes, device=device) if classes else None
        draws = max(row.draws for row in rows)
        self.uniforms = torch.zeros(count, images, draws, device=device) if draws else None
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.groups = [self._group(slice(*ends)) for ends in _neighbours(rows)]
        self.stack = Stack([row.distiller.student for row in rows], form) if count > 1 else None
        self.parameters = self._parameters()
        self.momenta = [torch.zeros_like(p) for p in self.parameters]
        # Of each step; 0 of a row that rests.
        self.lr = torch.zeros(count, len(self.sizes), device=device)
        # A rate for each weight, so that one kernel updates a list of tensors; they are filled in
        # each step, all at once.
        self.rate, self.rates = _beside(self.parameters, self.lr.dtype)
        self.owner, owners = _beside(self.parameters, torch.int32)
        for row in range(count):
            for owner in self.of_row(row, owners):
                owner.fill_(row)
        self.decays = [torch.zeros_like(p) for p in self.parameters]
        self.momentum = rows[0].optimizer.param_groups[0]["momentum"]
        self._share()
        if compiled:
            # Programs of a queue are compiled one after the other; past this PyTorch stays eager.
            torch._dynamo.config.cache_size_limit = 256
        self.losses = torch.compile(self._losses, dynamic=False) if compiled else self._losses
        self.graphs: Graphs | None = None

    def load(self, row: int, epoch: Epoch) -> None:
        """Give a row its epoch: the steps that are left of it, as many as the other rows'."""
        start = len(self.data) - len(epoch.index)
        self.index[row, start:], self.view[row, start:] = epoch.index, epoch.view
        if self.teacher is not None and epoch.teacher is not None:
            self.teacher[row, start:] = epoch.teacher
        if self.uniforms is not None and epoch.uniforms is not None:
            self.uniforms[row, :, : epoch.uniforms.shape[1]] = epoch.uniforms
        self.lr[row] = torch.tensor(epoch.rates)
        group = next(g for g in self.groups if g.rows.start <= row < g.rows.stop)
        for name, value in epoch.schedule.items():
            group.settings[name][row - group.rows.start].fill_(value)

    def start(self, first: int = 0) -> None:
        """Go to a step, counted from 0, of the epoch; all rows are at the same one."""
        self.position.fill_(first)
        for row in self.rows:
            row.distiller.train()
        if self.stack:
            self.stack.train()

    def launches(self, first: int = 0) -> Iterator[Launch]:
        """The launches of the steps of an epoch from `first` on."""
        for size, batches in groupby(self.sizes[first:]):
            together, alone = divmod(len(list(batches)), STEPS)
            yield from repeat((size, STEPS), together)
            yield from repeat((size, 1), alone)

    def take_epoch(
        self, epochs: dict[int, Epoch], first: int, launched: Callable[[int, int], None]
    ) -> None:
        """Take the steps of an epoch from `first` on; a row without an epoch rests.

        Args:
            epochs: by row, each with the same steps left.
            launched: called after each launch with the images of a step and its steps.
        """
        self.start(first)
        for row in range(len(self.rows)):
            if row in epochs:
                self.load(row, epochs[row])
            else:
                self.lr[row] = 0.0
        for launch in self.launches(first):
            self.launch(launch)
            launched(*launch)

    def launch(self, launch: Launch) -> None:
        """Take the next steps of all rows, as a CUDA graph if `capture` has made one."""
        if self.graphs:
            self.graphs(launch)
        else:
            size, count = launch
            for _ in range(count):
                self.step(size)

    def capture(self) -> None:
        """Make CUDA graphs of all launches. The runs stay as they were.

        Raises:
            NoGraph: the step cannot be captured.
            RunError: the device's memory is full, or the capture failed.
        """
        sums = [snapshot(row.meter.state_dict()) for row in self.rows]
        kept = [tensor.detach().clone() for tensor in self._state()]
        # Single steps, too: a run may go on in the middle of an epoch.
        kinds = [*self.launches(), *((size, 1) for size in self.sizes)]
        try:
            self.graphs = Graphs(self.step, self.sizes, kinds, self.start, self.index.device)
        finally:
            with torch.no_grad():
                for tensor, before in zip(self._state(), kept, strict=True):
                    tensor.copy_(before)
            for row, state in zip(self.rows, sums, strict=True):
                row.meter.clear()
                row.meter.load_state_dict(state, self.index.device)
            for parameter in self.parameters:
                parameter.grad = None

    def close(self) -> None:
        """Give back the graphs."""
        if self.graphs:
            self.graphs.close()
            self.graphs = None

    def _state(self) -> list[Tensor]:
        """What a step changes, the meters apart."""
        networks: list[nn.Module] = [row.distiller for row in self.rows]
        networks += [self.stack] if self.stack else []
        buffers = [buffer for network in networks for buffer in network.buffers()]
        return [*self.parameters, *self.momenta, *buffers]

    def of_row(self, row: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of tensors shaped like `parameters`, a run's part, in the order of its own parameters."""
        if self.stack is None:
            return list(tensors)
        stacked = len(list(self.stack.parameters()))
        found, rest = self.stack.rows(tensors[:stacked])[row], iter(tensors[stacked:])
        for group in self.groups:
            own = [next(rest) for _ in group.learned]
            if group.rows.start <= row < group.rows.stop:
                found += [tensor[row - group.rows.start] for tensor in own]
        return found

    def _group(self, rows: slice) -> Group:
        """The rows of one method; what it learns beside the student is laid side by side."""
        distillers, device = [row.distiller for row in self.rows[rows]], self.index.device
        settings = {
            name: torch.zeros(len(distillers), dtype=widest(device), device=device)
            for name in distillers[0].schedule(1)
        }
        learned = {}
        if len(self.rows) > 1 and isinstance(distillers[0], Logit):
            for name, _ in distillers[0].learned.named_parameters(prefix="learned"):
                parts = [distiller.get_parameter(name) for distiller in distillers]
                learned[name] = nn.Parameter(torch.stack([part.detach() for part in parts]))
                for part, row in zip(parts, learned[name].data, strict=True):
                    part.data = row
        vmapped = len(self.rows) > 1 and vmappable(distillers[0])
        return Group(distillers, vmapped, rows, settings, learned)

    def _parameters(self) -> list[nn.Parameter]:
        """All that the optimizers step."""
        if self.stack is None:
            return list(self.rows[0].distiller.get_learnable_parameters())
        learned = [p for group in self.groups for p in group.learned.values()]
        return [*self.stack.parameters(), *learned]

    def _share(self) -> None:
        """Let each run's optimizer have its part of the momenta, with what it holds already."""
        for number, row in enumerate(self.rows):
            parts = [self.of_row(number, of) for of in (self.momenta, self.decays)]
            own = row.distiller.get_learnable_parameters()
            decay = {p: g["weight_decay"] for g in row.optimizer.param_groups for p in g["params"]}
            for parameter, momentum, decays in zip(own, *parts, strict=True):
                decays.fill_(decay[parameter])
                state = row.optimizer.state[parameter]
                if state.get("momentum_buffer") is not None:
                    momentum.copy_(state["momentum_buffer"])
                state["momentum_buffer"] = momentum

    def step(self, size: int) -> None:
        """A step of each run with the next `size` images of its epoch."""
        for parameter in self.parameters:
            parameter.grad = None
        with searching(size == self.batch_size):
            found = self.losses(size)
            terms = [loss.sum() for losses, _ in found for loss in losses.values()]
            torch.stack(terms).sum().backward()
        with torch.no_grad():
            self._update()
            for group, (losses, sums) in zip(self.groups, found, strict=True):
                self._count(group, losses, sums)
            self.position += 1

    def _losses(self, size: int) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Of each group the losses and the sums for its meters, each (k,)."""
        place = self.position * self.batch_size + torch.arange(size, device=self.index.device)
        index, view = self.index.index_select(1, place), self.view.index_select(1, place)
        batch = self.data.batch(index.flatten(), view.flatten())
        image, target = (part.unflatten(0, index.shape) for part in (batch.image, batch.target))
        teacher = None if self.teacher is None else self.teacher.index_select(1, place)
        uniforms = None
        if self.uniforms is not None:
            each = torch.arange(len(index), device=index.device)[:, None]
            uniforms = self.uniforms[each, index]
        logits = None
        if self.stack:
            with self.autocast():
                logits = self.stack(image)
        parts = {"image": image, "target": target, "index": index, "logits": logits}
        parts |= {"teacher": teacher, "uniforms": uniforms}
        return [self._of_group(group, parts) for group in self.groups]

    def _of_group(
        self, group: Group, parts: dict[str, Tensor | None]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        own = {key: part[group.rows] for key, part in parts.items() if part is not None}

        def one(
            distiller: Distiller, own: dict, settings: dict, learned: dict
        ) -> tuple[dict, dict]:
            context = Context(
                settings, own.get("teacher"), own.get("uniforms"), logits=own.get("logits")
            )
            # No epoch: a method that counts on it, rather than on its schedule, fails here instead
            # of training every epoch as the one that was captured.
            inputs = {key: own[key] for key in ("image", "target", "index")}
            inputs |= {"epoch": None, "context": context}
            with self.autocast():
                output, losses = functional_call(distiller, learned, (), inputs)
            sums = {"correct": (output.detach().argmax(dim=1) == own["target"]).sum()}
            sums |= {
                key: value.detach() for key, value in getattr(distiller, "monitor", {}).items()
            }
            return {name: loss.mean() for name, loss in losses.items()}, sums

        given = own, group.settings, group.learned
        first = group.distillers[0]
        if group.vmapped:
            found = torch.vmap(partial(one, first))(*given)
            first.monitor = {}  # what vmap has left there is of no use outside of it
            return found
        each = [
            one(distiller, *({key: part[row] for key, part in of.items()} for of in given))
            for row, distiller in enumerate(group.distillers)
        ]
        losses, sums = zip(*each, strict=True)
        return _side_by_side(losses), _side_by_side(sums)

    def _update(self) -> None:
        """SGD with momentum and weight decay, as torch.optim.SGD, each row at its rate."""
        now = self.lr.index_select(1, self.position[None]).squeeze(1)
        torch.index_select(now, 0, self.owner, out=self.rate)
        parts = zip(self.parameters, self.momenta, self.decays, self.rates, strict=True)
        # What is frozen or takes no part has no gradient.
        trained = [(w, w.grad, *more) for w, *more in parts if w.grad is not None]
        weights, grads, momenta, decays, rates = map(list, zip(*trained, strict=True))
        torch._foreach_addcmul_(grads, weights, decays)
        torch._foreach_mul_(momenta, self.momentum)
        torch._foreach_add_(momenta, grads)
        torch._foreach_addcmul_(weights, momenta, rates, value=-1)

    def _count(self, group: Group, losses: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        terms = torch.stack([loss.detach().float() for loss in losses.values()], dim=1)
        if group.terms is None:
            self._meet(group, list(losses), terms, sums)
        assert group.terms is not None
        group.terms.index_copy_(1, self.position[None], terms[:, None])
        torch._foreach_add_(list(group.totals.values()), list(sums.values()))

    def _meet(self, group: Group, names: list[str], terms: Tensor, sums: dict[str, Tensor]) -> None:
        """Lay the sums of a group's meters side by side, once it is known what they are."""
        rows = self.rows[group.rows]
        group.terms = terms.new_zeros(len(rows), len(self.sizes), terms.shape[1])
        group.totals = {name: torch.zeros_like(value) for name, value in sums.items()}
        for number, row in enumerate(rows):
            parts = {name: total[number] for name, total in group.totals.items()}
            row.meter.adopt(names, group.terms[number], parts)


def _side_by_side(found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Numbers of each row, (), as one tensor (k,) a name."""
    if len(found) == 1:
        return {name: number[None] for name, number in found[0].items()}
    return {name: torch.stack([numbers[name] for numbers in found]) for name in found[0]}


def vmappable(distiller: Distiller) -> bool:
    """Whether torch.vmap may compute the losses of several runs: not those of own code, which may
    do anything, and not where a policy has a state or takes a gradient."""
    parts = (distiller.loss, *distiller.policies) if isinstance(distiller, Logit) else ()
    ours = all(type(part).__module__.startswith("mdistiller_ext.") for part in parts)
    return ours and all(getattr(part, "vmappable", True) for part in parts)


def _beside(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """One tensor of zeros, and its parts as tensors that lie in memory as these do."""
    whole = torch.zeros(sum(t.numel() for t in tensors), dtype=dtype, device=tensors[0].device)
    like = [torch.empty_like(tensor, device="meta") for tensor in tensors]
    parts = zip(whole.split([t.numel() for t in tensors]), like, strict=True)
    return whole, [part.as_strided(t.shape, t.stride()) for part, t in parts]


def method(distiller: Distiller) -> Any:
    """What is equal for runs whose losses are one computation."""
    if isinstance(distiller, Logit):
        return distiller.weights, distiller.loss, distiller.policies, distiller.run
    return type(distiller)


def _neighbours(rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """(first, after the last) of the rows that are neighbours and of one method."""
    at = 0
    for _, same in groupby(rows, lambda row: method(row.distiller)):
        count = len(list(same))
        yield at, at + count
        at += count
