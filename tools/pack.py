"""Put a study's runs into one small file, and take them out again.

    python tools/pack.py pack output/studies/digits digits.tar.xz [--unfinished] [--overwrite]
    python tools/pack.py unpack digits.tar.xz output/studies/digits

Of each finished run its record and its log. With --unfinished the others too, with what it takes
to go on elsewhere: `tools/compare.py run` does, from where they were unpacked. Unpacking into the
study that sent them brings its runs home: each is taken where it is further than the one there.
"""

import argparse
from pathlib import Path

from mdistiller_ext.command import existing, run_tool


def main(args: argparse.Namespace) -> None:
    from mdistiller_ext.errors import ConfigError
    from mdistiller_ext.study.pack import pack, unpack

    if args.action == "unpack":
        for name in ("unfinished", "overwrite"):
            if getattr(args, name):
                raise ConfigError(f"--{name}: has no effect with unpack")
        print(unpack(args.source, args.target))
    else:
        options = {"unfinished": args.unfinished, "overwrite": args.overwrite}
        print(pack(args.source, args.target, **options))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=["pack", "unpack"])
    parser.add_argument("source", type=existing, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--unfinished", action="store_true", help="with states to go on from")
    parser.add_argument("--overwrite", action="store_true", help="where TARGET is there already")
    run_tool(main, parser)
