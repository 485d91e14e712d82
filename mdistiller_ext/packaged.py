"""The configs and studies that come along: in the installed package, or in the checkout."""

import argparse
import os
from pathlib import Path

PACKAGE = Path(__file__).parent


def folder(kind: str) -> Path:
    """Of the packaged "configs" or "studies"."""
    inside = PACKAGE / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def config(name: str) -> Path:
    """The type of an argument that names a config: a file, or a packaged one as digits/dkd_lp."""
    return _find("configs", name)


def study(name: str) -> Path:
    """The type of an argument that names a study: a file, or a packaged one as digits."""
    return _find("studies", name)


def names() -> list[str]:
    """What `config` finds, and `studies/` with what `study` finds."""
    configs, studies = folder("configs"), folder("studies")
    files = [file.relative_to(configs) for file in configs.rglob("*.yaml")]
    files += [file.relative_to(studies.parent) for file in studies.glob("*.yaml")]
    return sorted(file.with_suffix("").as_posix() for file in files)


def beside(file: Path, name: str) -> Path:
    """What a study file names relative to its folder; where a copy lies elsewhere, packaged."""
    own = file.parent / name
    packaged = folder("configs").parent.joinpath(*(p for p in Path(name).parts if p != ".."))
    return packaged if packaged.exists() and not own.exists() else own


def _find(kind: str, name: str) -> Path:
    own = os.path.expanduser(name)
    for place in (Path(), folder(kind).parent, folder(kind)):
        for file in (place / own, place / f"{own}.yaml"):
            if name and file.exists():
                return file
    raise argparse.ArgumentTypeError(
        f"{name or repr(name)}: No such file or directory, "
        "and not one that `mdistiller-ext configs` lists"
    )
