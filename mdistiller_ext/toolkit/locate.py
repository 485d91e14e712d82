"""Where mdistiller is."""

import importlib.util
import os
import sys
from pathlib import Path

from ..errors import ConfigError


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
