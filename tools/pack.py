"""Put a study's records into one small file, and take them out again.

    python tools/pack.py pack output/studies/digits digits.tar.xz [--unfinished]
    python tools/pack.py unpack digits.tar.xz output/studies/digits

Of each run its record and its log. With --unfinished also what it takes for the runs that have not
come to their end to go on elsewhere: `tools/compare.py run` does, from where it was unpacked.
"""

import argparse
import tarfile
from pathlib import Path
from typing import BinaryIO

from mdistiller_ext.command import existing, run_tool
from mdistiller_ext.errors import RunError


def main(args: argparse.Namespace) -> None:
    from mdistiller_ext.engine.folder import LATEST, finished_record
    from mdistiller_ext.files import extract, write_atomically, writing
    from mdistiller_ext.study.launch import LOG
    from mdistiller_ext.study.plan import RUNS

    if args.action == "unpack":
        with writing(args.target):
            args.target.mkdir(parents=True, exist_ok=True)
        extract(args.source, RUNS, args.target)
        return
    files = [file for name in ("record.json", LOG) for file in args.source.glob(f"{RUNS}/*/{name}")]
    if args.unfinished:
        states = args.source.glob(f"{RUNS}/*/{LATEST}")
        files += [file for file in states if not finished_record(file.parent)]
    if not files:
        raise RunError(f"{args.source}: no records of a study in {RUNS}/")

    def write(sink: BinaryIO) -> None:
        with tarfile.open(fileobj=sink, mode="w:xz") as archive:
            for file in sorted(files):
                archive.add(file, file.relative_to(args.source))

    with writing(args.target):
        args.target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.target, write)
    print(f"{args.target}: {len(files)} files, {args.target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=["pack", "unpack"])
    parser.add_argument("source", type=existing, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--unfinished", action="store_true", help="with states to go on from")
    run_tool(main, parser)
