"""Write DKD_EAT, or others of ours, into a checkout of mdistiller, as its own methods.

    %(prog)s CHECKOUT [--methods DKD_EAT DKD_DAT DKD_LP] [--check]

A checkout that does not look as expected is refused before anything is written.
"""

import argparse
import difflib
import sys
from operator import methodcaller

from .. import packaged
from ..command import path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkout", type=path, help="the folder with mdistiller/ and configs/")
    parser.add_argument("--methods", nargs="+", default=["DKD_EAT"], help="default: DKD_EAT alone")
    parser.add_argument(
        "--check", action="store_true", help="only say what would change; exit 1 if anything would"
    )


def main(args: argparse.Namespace) -> None:
    from ..files import write_atomically
    from ..toolkit.export import plan

    changes = plan(args.checkout, packaged.folder("configs") / "cifar100", args.methods)
    for file, text in changes.items():
        name = file.relative_to(args.checkout).as_posix()
        if not args.check:
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, methodcaller("write", text.encode()))
            print(f"wrote {name}")
        elif file.exists():
            before = file.read_text(encoding="utf-8").splitlines(keepends=True)
            after = text.splitlines(keepends=True)
            sys.stdout.writelines(difflib.unified_diff(before, after, f"a/{name}", f"b/{name}"))
        else:
            print(f"would write {name}: {len(text.splitlines())} lines")
    if not changes:
        print("nothing to change")
    if args.check and changes:
        sys.exit(1)
