"""Run the toolkit's own tools/train.py, unedited, with this project's methods in it.

    %(prog)s [--compat] --cfg FILE [--resume] [KEY VALUE ...]

mdistiller is the installed one, or the checkout that MDISTILLER_ROOT names.
"""

import argparse
import runpy
import sys

from .. import packaged
from ..errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cfg", required=True, type=packaged.config, metavar="FILE", help="YAML file"
    )
    parser.add_argument("--resume", action="store_true", help="as in the toolkit")
    parser.add_argument(
        "--compat", action="store_true", help="mend what stops the toolkit on this machine"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings over the file's")


def main(args: argparse.Namespace) -> None:
    from ..toolkit.compat import mend
    from ..toolkit.locate import find_toolkit, import_toolkit
    from ..toolkit.registration import register

    script = find_toolkit() / "tools" / "train.py"
    if not script.is_file():
        raise ConfigError(
            f"mdistiller has no {script}: an installed package leaves its tools out; name a "
            f"checkout with MDISTILLER_ROOT"
        )
    register()
    config = import_toolkit().config.clone()
    try:
        config.merge_from_file(str(args.cfg))
        config.merge_from_list(args.opts)
    except (AssertionError, KeyError, ValueError) as error:  # yacs'
        raise ConfigError(f"mdistiller does not take this config: {error.args[0]}") from error
    for text in mend() if args.compat else ():
        print(f"--compat: {text}", flush=True)
    resume = ["--resume"] if args.resume else []
    sys.argv = [str(script), "--cfg", str(args.cfg), *resume, *args.opts]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except NotImplementedError as error:
        raise ConfigError(f"mdistiller does not have {error}") from error
