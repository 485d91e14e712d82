"""What the engine adds to a training step: its time against the sum of the step's parts.

    python tools/bench.py [--teacher resnet56] [--student resnet8] [--device cpu]

The parts are the teacher's forward, the student's forward and backward with the method's losses,
and the optimizer's step, each timed alone. Weights and images are random: they do not change the
time. Parts and engine take turns, and each figure is the median over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice

import torch

from mdistiller_ext import cifar_model_dict, distiller_dict, get_cfg
from mdistiller_ext.command import run_tool
from mdistiller_ext.data import ImageSet, cifar100
from mdistiller_ext.engine import pick_device
from mdistiller_ext.engine.build import build_optimizer
from mdistiller_ext.engine.loop import Meter, train_epoch


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    cfg = get_cfg()
    networks = (cifar_model_dict[n][0](num_classes=100) for n in (args.student, args.teacher))
    distiller = distiller_dict[args.method](*networks, cfg).to(device).train()
    optimizer = build_optimizer(cfg, distiller)
    images = torch.randint(256, (args.batch * args.steps, 3, 32, 32), dtype=torch.uint8)
    targets = torch.randint(100, (len(images),))
    data = ImageSet.build(images, targets, cifar100.MEAN, cifar100.STD, 4, True).to(device)
    batch = next(data.epoch(args.batch, torch.Generator()))
    with torch.no_grad():
        answers = distiller.teacher(batch.image)

    def teacher() -> None:
        with torch.no_grad():
            distiller.teacher(batch.image)

    def student() -> None:
        live, distiller.teacher.forward = distiller.teacher.forward, lambda image: answers
        _, losses = distiller(image=batch.image, target=batch.target, epoch=1)
        sum(losses.values()).backward()
        distiller.teacher.forward = live

    def epoch() -> None:
        batches = islice(data.epoch(args.batch, torch.Generator()), args.steps)
        meter = Meter(1, args.steps)
        train_epoch(distiller, optimizer, batches, meter, nullcontext, lambda meter: None)
        meter.read()

    def per_step(work: Callable[[], None], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / args.steps

    rounds = []
    for _ in range(args.rounds + 1):  # the first one warms up
        parts = [per_step(work, args.steps) for work in (teacher, student, optimizer.step)]
        rounds.append([*parts, sum(parts), per_step(epoch, 1)])
    names = ["teacher forward", "student forward and backward", "optimizer step"]
    for column, name in enumerate([*names, "sum of the parts", "engine"]):
        print(f"{name:<30} {statistics.median(row[column] for row in rounds[1:]):8.2f} ms")
    added = statistics.median(engine / parts - 1 for *_, parts, engine in rounds[1:])
    print(
        f"the engine adds {100 * added:+.1f} % ({args.method}, {args.teacher} -> {args.student}, "
        f"batch {args.batch}, {device}, torch {torch.__version__}, median of {args.rounds} rounds "
        f"of {args.steps} steps)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", default="resnet110", choices=cifar_model_dict)
    parser.add_argument("--student", default="resnet8", choices=cifar_model_dict)
    parser.add_argument(
        "--method", default="DKD", choices=[n for n in distiller_dict if n != "NONE"]
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="steps a round (default 20)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    run_tool(main, parser)
