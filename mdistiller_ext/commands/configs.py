"""List the packaged configs and studies, or copy one out to edit it.

%(prog)s
%(prog)s digits/dkd_lp my_dkd_lp.yaml
%(prog)s studies/digits my_study.yaml
%(prog)s --keys                  # every shared key, with its default and what it may be
"""

import argparse
import shutil

from .. import packaged
from ..command import path
from ..errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="without .yaml")
    parser.add_argument("copy", nargs="?", type=path, help="a file that is not there yet")
    parser.add_argument("--keys", action="store_true", help="a Markdown table of the config keys")


def main(args: argparse.Namespace) -> None:
    if args.keys:
        print(key_table())
        return
    names = packaged.names()
    if args.name is None:
        print("\n".join(names))
        return
    if args.name not in names:
        raise ConfigError(f"{args.name}: not packaged, expected one of {', '.join(names)}")
    study = args.name.startswith("studies/")
    file = packaged.study(args.name) if study else packaged.config(args.name)
    if args.copy is None:
        print(file.read_text(encoding="utf-8"), end="")
        return
    if args.copy.exists():
        raise ConfigError(f"{args.copy}: is there already")
    shutil.copyfile(file, args.copy)
    print(f"{args.copy}: a copy of {file.name}")


def key_table() -> str:
    """Every key that all methods share, and those of LOGIT, as Markdown."""
    from ..config import get_cfg, layout
    from ..sections import SHARED
    from ..settings import leaves

    places = layout()
    rows = ["| key | default | allowed | |", "|---|---|---|---|"]
    for key, value in leaves(get_cfg()):
        if key.split(".")[0] not in (*SHARED, "LOGIT"):
            continue
        part, name = places[key]
        rule, meaning = part.rules()[name], part.meanings()[name]
        rows.append(f"| `{key}` | `{value!r}` | {rule[1]} | {meaning} |")
    return "\n".join(rows)
