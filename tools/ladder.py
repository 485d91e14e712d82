"""The rungs of tools/bench.py, and how they are timed."""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from mdistiller_ext import cifar_model_dict, distiller_dict, get_cfg
from mdistiller_ext.data import ImageSet, cifar100
from mdistiller_ext.engine import pick_device
from mdistiller_ext.engine.build import (
    CompiledStudent,
    build_autocast,
    build_optimizer,
    set_arithmetic,
)
from mdistiller_ext.engine.loop import Epoch, Meter, train_epoch
from mdistiller_ext.engine.rows import Rows
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.files import write_atomically
from mdistiller_ext.teacher import TeacherTable
from mdistiller_ext.toolkit.baseline import toolkit_steps
from mdistiller_ext.toolkit.compat import mend
from mdistiller_ext.toolkit.locate import find_toolkit

WORKERS = (0, 1, 2, 4)
Work = Callable[[int], int]  # trains at least that many steps, and says how many


def climb(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    set_arithmetic(device, args.tf32)
    bench = Bench(args, device)
    if args.grow:
        bench.grow()
        return
    if args.at_once:
        bench.at_once()
        return
    first_name, first = bench.first()
    rungs = {
        "our engine, live teacher": bench.engine(table=None),
        "teacher table, cold": bench.engine(table="cold"),
        "teacher table, warm": bench.engine(table="warm"),
        "every exact acceleration": bench.exact(1),
        "and bf16": bench.exact(1, "bf16"),
    }
    for form in args.forms:
        rungs[f"{args.runs} runs at once, {form}, their sum"] = bench.exact(args.runs, form=form)
        if device.type == "cuda":
            name = f"{args.runs} runs at once, {form}, bf16, their sum"
            rungs[name] = bench.exact(args.runs, "bf16", form)
    print(
        f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{args.teacher} -> {args.student}, {args.method}, batch {args.batch}"
    )
    found = {name: ([], []) for name in [first_name, *rungs]}
    for number in range(args.rounds + 1):  # the first round warms up
        for name, work in rungs.items():
            base = first.rate(args.steps)
            rate = bench.rate(work)
            if number:
                for key, value, ratio in ((first_name, base, 1.0), (name, rate, rate / base)):
                    found[key][0].append(value)
                    found[key][1].append(ratio)
    rows = [
        {"name": name, "images_per_s": statistics.median(r), "ratio": statistics.median(ratios)}
        for name, (r, ratios) in found.items()
    ]
    for letter, row in zip(ascii_lowercase, rows, strict=False):
        print(
            f"({letter}) {row['name']:<42} {row['images_per_s']:>10,.0f} images/s  "
            f"{row['ratio']:>6.2f} x"
        )
    first.end()
    floor = bench.floor()
    print(
        f"floor of the student's step: {floor:,.0f} images/s; (e) is at "
        f"{100 * rows[4]['images_per_s'] / floor:.0f} % of it"
    )
    if args.json:
        content = {
            "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "teacher": args.teacher,
            "student": args.student,
            "batch": args.batch,
            "tf32": args.tf32,
            "rounds": args.rounds,
            "rungs": rows,
            "floor_images_per_s": floor,
        }
        write_atomically(args.json, lambda sink: sink.write(json.dumps(content, indent=1).encode()))


class Bench:
    """The parts that the rungs share: data, networks, and how a rung is timed."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        images, targets = read_images(args.root)
        data = ImageSet.build(images, targets, cifar100.MEAN, cifar100.STD, padding=4, flips=True)
        self.data = data.to(device)
        self.folder = tempfile.TemporaryDirectory()
        self.generator = torch.Generator().manual_seed(0)

    def rate(self, work: Work) -> float:
        """Images/s, after two steps that find caches and threads cold."""
        work(2)
        self.wait()
        start = time.perf_counter()
        steps = work(self.args.steps)
        self.wait()
        return steps * self.args.batch / (time.perf_counter() - start)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        names = self.args.student, self.args.teacher
        student, teacher = (cifar_model_dict[n][0](num_classes=100).to(self.device) for n in names)
        return student, teacher

    def first(self) -> tuple[str, "Elsewhere"]:
        """The toolkit's loop at its best number of workers."""
        loops = [Elsewhere(self.args, workers) for workers in WORKERS]
        for loop in loops:
            loop.rate(3)
        best = max(loops, key=lambda loop: loop.rate(self.args.steps))
        for loop in loops:
            if loop is not best:
                loop.end()
        return f"{best.name}, {best.workers} workers", best

    def engine(self, table: str | None) -> Work:
        """Our eager loop, with the networks in the usual layout."""
        cfg, args = get_cfg(), self.args
        distiller = distiller_dict[args.method](*self.networks(), cfg)
        optimizer = build_optimizer(cfg.SOLVER, distiller)
        kept = None
        if table:
            kept = TeacherTable(Path(self.folder.name), distiller.teacher, self.data)
        keys = self.keys(args.steps)

        def work(steps: int) -> int:
            index, view = self.keys(steps) if table != "warm" else keys
            index, view = index[: steps * args.batch], view[: steps * args.batch]
            teacher, sizes = kept.logits(index, view) if kept else None, [args.batch] * steps
            rates = [0.05] * steps
            epoch = Epoch(1, rates, distiller.schedule(1), index, view, sizes, teacher)
            meter = Meter(1, steps)
            train_epoch(distiller, optimizer, self.data, epoch, meter, nullcontext)
            meter.read()
            return steps

        return work

    def exact(self, runs: int, amp: str = "none", form: str = "none") -> Work:
        """What tools/train.py does with a full table: channels-last where that helps, a compiled
        student, on a GPU a captured program; several runs as its rows, stacked as `form` says."""
        rows = [self.row(amp, alone=runs == 1) for _ in range(runs)]
        autocast = build_autocast(amp, self.device)
        if self.device.type == "cpu" and runs == 1:
            launches = self.plain(rows[0], autocast)
        else:
            compiled = runs > 1 and not self.args.eager
            size = self.args.batch
            program = Rows(rows, self.data, size, 100, form, autocast, compiled)
            if self.device.type == "cuda":
                program.capture()
            launches = self.launches(program)

        def work(steps: int) -> int:
            done = 0
            while done < steps:
                done += next(launches)
            return done

        work(1)
        return work

    def row(self, amp: str, alone: bool) -> SimpleNamespace:
        """A run's part of a program."""
        args, cfg = self.args, get_cfg()
        distiller = distiller_dict[args.method](*self.networks(), cfg)
        if self.device.type == "cpu" or args.tf32 or amp == "bf16":
            distiller.to(memory_format=torch.channels_last)
        if alone and not args.eager:
            CompiledStudent(distiller.student)
        optimizer = build_optimizer(cfg.SOLVER, distiller)
        meter = Meter(1, -(-len(self.data) // args.batch))
        return SimpleNamespace(distiller=distiller, optimizer=optimizer, meter=meter, draws=0)

    def launches(self, program: Rows) -> Iterator[int]:
        """Train without end: the steps of all runs that each launch has taken."""
        teacher = torch.randn(len(self.data), 100, device=self.device)
        while True:
            program.start()
            for number, row in enumerate(program.rows):
                keys = self.data.draw(self.generator)
                schedule = row.distiller.schedule(1)
                rates = [0.05] * len(program.sizes)
                program.load(number, Epoch(1, rates, schedule, *keys, program.sizes, teacher))
            for size, count in program.launches():
                program.launch((size, count))
                yield count * len(program.rows)

    def plain(self, row: SimpleNamespace, autocast: Callable) -> Iterator[int]:
        """Train without end by the plain loop, a step at a time."""
        parts, size = (row.distiller, row.optimizer, self.data), self.args.batch
        teacher = torch.randn(size, 100, device=self.device)
        while True:
            index, view = self.keys(1)
            epoch = Epoch(1, [0.05], row.distiller.schedule(1), index, view, [size], teacher)
            row.meter.start(1)
            train_epoch(*parts, epoch, row.meter, autocast)
            yield 1

    def keys(self, steps: int) -> tuple[Tensor, Tensor]:
        """(index, view) of images and views drawn anew."""
        index, view = self.data.draw(self.generator)
        count = steps * self.args.batch
        return index[:count], view[:count]

    def floor(self) -> float:
        """Images/s if the student's step were all arithmetic, or all reading and writing."""
        student, _ = self.networks()
        image = torch.randn(self.args.batch, 3, 32, 32, device=self.device)
        with Outputs() as outputs:
            logits = student(image)[0]
        with FlopCounterMode(display=False) as counter:
            student(image)
            logits.sum().backward()
        flops, numbers = counter.get_total_flops(), sum(outputs.sizes)
        # Each output is written and read; so is, in the backward pass, its gradient, and the
        # output is read once more. On a CPU the copies are as large as the largest of them, on a
        # GPU they are larger than its caches.
        cpu = self.device.type == "cpu"
        side, count = (2048, max(outputs.sizes)) if cpu else (8192, 1 << 28)
        matrix = torch.ones(side, side, device=self.device)
        to, source = torch.ones(2, count, device=self.device)
        speed = self.best(2 * side**3, lambda: torch.mm(matrix, matrix))
        bandwidth = self.best(8 * count, lambda: to.copy_(source))
        seconds = flops / speed, 5 * 4 * numbers / bandwidth
        print(
            f"the student's step: {flops / 1e9:.2f} GFLOP at {speed / 1e9:,.0f} GFLOP/s measured, "
            f"{20 * numbers / 1e6:,.0f} MB at {bandwidth / 1e9:,.0f} GB/s measured"
        )
        return self.args.batch / max(seconds)

    def best(self, amount: float, work: Callable[[], object]) -> float:
        """The highest of ten rates, in `amount` of a piece of work a second."""
        seconds = []
        for _ in range(10):
            self.wait()
            start = time.perf_counter()
            for _ in range(10):
                work()
            self.wait()
            seconds.append((time.perf_counter() - start) / 10)
        return amount / min(seconds)

    def grow(self) -> None:
        """Images/s against the batch size and the number of runs, as Markdown tables."""
        print(f"{self.args.student}, {self.device}, torch {torch.__version__}\n")
        forms = self.args.forms
        print("| batch size, one run | images/s |\n|---|---|")
        for self.args.batch in (32, 64, 128, 256, 512, 1024):
            print(f"| {self.args.batch} | {self.typical(1)} |", flush=True)
        self.args.batch = 64
        print(f"\n| runs at once, batch 64; stacked: | {' | '.join(forms)} |")
        print(f"|---|{'---|' * len(forms)}")
        for runs in (2, 4, 8, 16, 32, 64):
            rates = [self.typical(runs, form) for form in forms]
            print(f"| {runs} | {' | '.join(rates)} |", flush=True)

    def at_once(self) -> None:
        """The time of a step of one of several runs, by form, and how long it took to prepare."""
        args = self.args
        amp = "bf16" if args.bf16 else "none"
        arithmetic = "bf16" if args.bf16 else "TF32" if args.tf32 else "float32"
        print(f"{args.student}, {args.method}, batch {args.batch}, torch {torch.__version__}")
        for form in args.forms:
            start = time.perf_counter()
            work = self.exact(args.runs, amp, form)
            prepared = time.perf_counter() - start
            rates = [self.rate(work) for _ in range(args.rounds)]
            rate = statistics.median(rates)
            spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
            print(
                f"{args.runs} runs, {form}, {arithmetic}: {1e3 * args.batch / rate:.4f} ms a "
                f"run-step, {rate:,.0f} images/s ({spread}), after {prepared:.0f} s",
                flush=True,
            )

    def typical(self, runs: int, form: str = "none") -> str:
        """Images/s of all runs, the median over the rounds."""
        work = self.exact(runs, form=form)
        work(3)
        return f"{statistics.median(self.rate(work) for _ in range(self.args.rounds)):,.0f}"


class Outputs(TorchDispatchMode):
    """The sizes of the tensors that operations write, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = operation(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        if isinstance(first, Tensor) and not operation.is_view:
            self.sizes.append(first.numel())
        return result


class Elsewhere:
    """The first rung, in a process of its own: what speeds ours up must not help it."""

    def __init__(self, args: argparse.Namespace, workers: int) -> None:
        self.workers = workers
        context = multiprocessing.get_context("spawn")
        self.here, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, args, workers))
        self.process.start()
        self.name = self.here.recv()

    def rate(self, steps: int) -> float:
        """Images/s."""
        self.here.send(steps)
        return self.here.recv()

    def end(self) -> None:
        self.here.send(None)
        self.process.join()


def serve(pipe: Connection, args: argparse.Namespace, workers: int) -> None:
    warnings.simplefilter("ignore")  # the toolkit's, on a recent PyTorch
    if "fork" in multiprocessing.get_all_start_methods():  # spawned, workers would copy all images
        multiprocessing.set_start_method("fork", force=True)
    set_arithmetic(torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.tf32)
    torch.backends.cudnn.benchmark = True  # as its train.py
    images, targets = read_images(args.root)
    try:
        find_toolkit()
        mend()
        name, loop = "mdistiller's BaseTrainer", toolkit_steps
    except ConfigError:
        name, loop = "a plain loop", plain_steps
    networks = args.method, args.teacher, args.student
    advance = loop(*networks, images, targets, args.batch, workers)
    pipe.send(name)
    while steps := pipe.recv():
        start = time.perf_counter()
        for _ in range(steps):
            next(advance)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        pipe.send(steps * args.batch / (time.perf_counter() - start))
    advance.close()


def read_images(root: Path | None) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32), uint8, and labels (N,): the real training set, or random ones."""
    if root:
        return cifar100.read_binary(root / "cifar-100-binary" / "train.bin")
    return torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8), torch.arange(50_000) % 100


def plain_steps(
    method: str,
    teacher: str,
    student: str,
    images: Tensor,
    targets: Tensor,
    batch_size: int,
    workers: int,
) -> Iterator[None]:
    """The loop that a toolkit has: PIL transforms, a loader, a live teacher, a sync each step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = get_cfg()
    networks = (cifar_model_dict[name][0](num_classes=100) for name in (student, teacher))
    distiller = distiller_dict[method](*networks, cfg).to(device).train()
    optimizer = build_optimizer(cfg.SOLVER, distiller)
    loader = DataLoader(
        Augmented(images, targets), batch_size=batch_size, shuffle=True, num_workers=workers
    )
    while True:
        for image, target in loader:
            image, target = image.to(device), target.to(device)
            logits, losses = distiller(image=image, target=target, epoch=1)
            optimizer.zero_grad()
            loss = sum(losses.values())
            loss.backward()
            optimizer.step()
            loss.item()
            (logits.argmax(1) == target).float().mean().item()
            yield


class Augmented(Dataset):
    """CIFAR images through torchvision's transforms."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images = [to_pil_image(image) for image in images]
        self.targets = targets
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(cifar100.MEAN, cifar100.STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.targets[index]
