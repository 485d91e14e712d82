"""The command `mdistiller-ext`, and `python -m mdistiller_ext`."""

import argparse
import sys
from typing import NoReturn

from . import __version__
from .command import run

COMMANDS = {
    "train": "a student or a teacher, as a config says",
    "eval": "measure a network on a test set",
    "export": "write a trained network as ONNX, torch.export and safetensors",
    "show": "what runs did: a few lines, and a page of pictures",
    "anatomy": "what EAT, DAT and LP assume, measured on trained networks",
    "compare": "run a study, or report what can be concluded from it",
    "methods": "list the methods, or show one",
    "configs": "list the packaged configs and studies, or copy one out",
    "teacher-table": "compute a teacher's answers beforehand",
    "pack": "a study's runs into one file, and out again",
    "mdistiller-train": "our methods in the toolkit's own train.py",
    "export-upstream": "our methods as files of the toolkit",
}


def main() -> NoReturn:
    width = max(map(len, COMMANDS)) + 2
    parser = argparse.ArgumentParser(
        "mdistiller-ext",
        description="\n".join(f"{name:<{width}}{text}" for name, text in COMMANDS.items()),
        epilog="mdistiller-ext COMMAND --help says more",
        formatter_class=argparse.RawTextHelpFormatter,
        usage="%(prog)s COMMAND ...",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"mdistiller-ext {__version__}")
    name = parser.parse_args(sys.argv[1:2] or ["--help"]).command
    run(name.replace("-", "_"), f"mdistiller-ext {name}", sys.argv[2:])


if __name__ == "__main__":
    main()
