"""How fast the same experiment runs: a ladder from the toolkit's own loop to ours.

    python tools/bench.py [--student resnet8] [--teacher resnet110] [--root DATA] [--json FILE]
    python tools/bench.py --grow
    python tools/bench.py --at-once --runs 16 --forms grouped dense64 [--tf32 | --bf16]

Each rung takes turns with the first one; its figures are medians over the rounds, its ratio is
to the first rung in the same round. Weights are random: they do not change the time. The first
rung is mdistiller's BaseTrainer and loader where it is installed or MDISTILLER_ROOT names a
checkout, else a plain loop of the same kind.
"""

import argparse

from mdistiller_ext.command import new_file, path, run_tool
from mdistiller_ext.errors import ConfigError


def main(args: argparse.Namespace) -> None:
    """Refuse slips, then import what takes long."""
    for name in ("batch", "steps", "rounds", "runs"):
        if getattr(args, name) < 1:
            raise ConfigError(
                f"--{name}: {getattr(args, name)} is not allowed, expected at least 1"
            )

    from mdistiller_ext import cifar_model_dict
    from mdistiller_ext.models import FORMS

    args.forms = FORMS if args.forms is None else args.forms
    for name, known, given in (
        ("teacher", cifar_model_dict, [args.teacher]),
        ("student", cifar_model_dict, [args.student]),
        ("forms", FORMS, args.forms),
    ):
        for word in given:
            if word not in known:
                expected = ", ".join(known)
                raise ConfigError(f"--{name}: {word} is not allowed, expected one of {expected}")

    from ladder import climb

    climb(args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--teacher", default="resnet110", metavar="NAME", help="default: %(default)s"
    )
    parser.add_argument("--student", default="resnet8", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--method", default="DKD", choices=["KD", "DKD"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tf32", action="store_true", help="SOLVER.TF32, also of the first rung")
    parser.add_argument("--eager", action="store_true", help="from rung (e) on without compiling")
    parser.add_argument("--runs", type=int, default=2, help="runs at once from rung (g) on")
    parser.add_argument(
        "--forms",
        nargs="*",
        metavar="FORM",
        help="SOLVER.STACK of runs at once (default: all)",
    )
    parser.add_argument("--steps", type=int, default=10, help="steps of a measurement (default 10)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument(
        "--root", type=path, help="folder with cifar-100-binary/; else random images"
    )
    parser.add_argument("--grow", action="store_true", help="how images/s grow with batch and runs")
    parser.add_argument("--at-once", action="store_true", help="only runs at once, by form")
    parser.add_argument("--bf16", action="store_true", help="with --at-once: SOLVER.AMP bf16")
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="write the ladder there as well"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    run_tool(main, parser)
