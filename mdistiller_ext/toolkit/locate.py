"""Where mdistiller is, and the parts of it that we use."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from yacs.config import CfgNode

from ..errors import ConfigError


class Toolkit(NamedTuple):
    """The toolkit's own objects, to be read or, by `register`, added to."""

    root: Path
    base: type
    registry: dict[str, Any]
    config: CfgNode


def find_toolkit() -> Path:
    """The folder that holds the package `mdistiller`, made importable.

    MDISTILLER_ROOT names a checkout; without it an installed mdistiller is taken.

    Raises:
        ConfigError: there is none.
    """
    root = os.environ.get("MDISTILLER_ROOT")
    if root:
        if not Path(root, "mdistiller", "__init__.py").is_file():
            raise ConfigError(f"MDISTILLER_ROOT: {root} holds no mdistiller/__init__.py")
        if root not in sys.path:
            sys.path.insert(0, root)
    spec = importlib.util.find_spec("mdistiller")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "mdistiller is not installed: install it from github.com/megvii-research/mdistiller, "
            "or name a checkout with MDISTILLER_ROOT"
        )
    return Path(spec.origin).parents[1]


def import_toolkit() -> Toolkit:
    """Import mdistiller.

    Raises:
        ConfigError: it is missing or cannot be imported.
    """
    root = find_toolkit()
    try:
        return Toolkit(
            root,
            importlib.import_module("mdistiller.distillers._base").Distiller,
            importlib.import_module("mdistiller.distillers").distiller_dict,
            importlib.import_module("mdistiller.engine.cfg").CFG,
        )
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"mdistiller in {root} cannot be used: {error}; it imports torch, torchvision, yacs, "
            f"tensorboardX, tqdm, scipy and Pillow"
        ) from error
