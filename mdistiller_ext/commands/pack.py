"""Put a study's runs into one small file, and take them out again.

    %(prog)s pack output/studies/digits digits.tar.xz [--unfinished] [--overwrite]
    %(prog)s unpack digits.tar.xz output/studies/digits

Of each finished run its record and its log. With --unfinished the others too, with what it takes
to go on elsewhere: `tools/compare.py run` does, from where they were unpacked. Unpacking into the
study that sent them brings its runs home: each is taken where it is further than the one there.
"""

import argparse

from ..command import existing, path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["pack", "unpack"])
    parser.add_argument("source", type=existing, metavar="SOURCE")
    parser.add_argument("target", type=path, metavar="TARGET")
    parser.add_argument("--unfinished", action="store_true", help="with states to go on from")
    parser.add_argument("--overwrite", action="store_true", help="where TARGET is there already")


def main(args: argparse.Namespace) -> None:
    from ..errors import ConfigError
    from ..study.pack import pack, unpack

    if args.action == "unpack":
        for name in ("unfinished", "overwrite"):
            if getattr(args, name):
                raise ConfigError(f"--{name}: has no effect with unpack")
        print(unpack(args.source, args.target))
    else:
        options = {"unfinished": args.unfinished, "overwrite": args.overwrite}
        print(pack(args.source, args.target, **options))
