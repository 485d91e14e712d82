"""Run the toolkit's own tools/train.py, unedited, with this project's methods in it.

    python tools/mdistiller_train.py [--compat] --cfg FILE [--resume] [KEY VALUE ...]

mdistiller is the installed one, or the checkout that MDISTILLER_ROOT names.
"""

import argparse
import runpy
import sys

from mdistiller_ext.command import existing, run_tool
from mdistiller_ext.errors import ConfigError


def main(args: argparse.Namespace) -> None:
    from mdistiller_ext.toolkit.compat import mend
    from mdistiller_ext.toolkit.locate import find_toolkit
    from mdistiller_ext.toolkit.registration import register

    script = find_toolkit() / "tools" / "train.py"
    if not script.is_file():
        raise ConfigError(
            f"mdistiller has no {script}: an installed package leaves its tools out; name a "
            f"checkout with MDISTILLER_ROOT"
        )
    register()
    for text in mend() if args.compat else ():
        print(f"--compat: {text}", flush=True)
    resume = ["--resume"] if args.resume else []
    sys.argv = [str(script), "--cfg", str(args.cfg), *resume, *args.opts]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cfg", required=True, type=existing, metavar="FILE", help="YAML file")
    parser.add_argument("--resume", action="store_true", help="as in the toolkit")
    parser.add_argument(
        "--compat", action="store_true", help="mend what stops the toolkit on this machine"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings over the file's")
    run_tool(main, parser)
