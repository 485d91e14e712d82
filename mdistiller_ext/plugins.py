"""Modules from outside this package: they register what configs then name."""

import ast
import hashlib
import importlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import ConfigError, brief
from .files import code_hash, file_hash
from .settings import Rule

GROUP = "mdistiller_ext"  # of the entry points in which installed packages name their modules
LIBRARIES = ("timm", "torchvision")
MODULES: Rule = (
    lambda v: all(type(n) is str and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", n) for n in v),
    "a list of modules, as ['my_losses']",
)


def import_modules(names: Sequence[str]) -> None:
    """Import these modules, and those that installed packages name.

    Raises:
        ConfigError: one cannot be imported.
    """
    for name in (*names, *_installed()):
        try:
            import_module(name)
        except Exception as error:  # whatever another's code does
            reason = brief(str(error))
            raise ConfigError(f"module {name}: {type(error).__name__}: {reason}") from error


def import_module(name: str) -> ModuleType:
    """Import a module, from the working folder too."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def check_free(name: str, before: Any, now: Any) -> None:
    """Refuse a name that a class or a function of another module has; within one it is newer.

    Raises:
        ValueError: `before` is of another module.
    """
    if before is not None and before.__module__ != now.__module__:
        raise ValueError(f"{name}: is taken by {before.__module__}")


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of modules, and of those that installed packages name, the sha256 of the code, a package's
    as `code_hash` gives it; of libraries their version. What was typed into a session has none."""
    found = {}
    for name in sorted({*names, *_installed()}):
        module = sys.modules.get(name)
        file = Path(getattr(module, "__file__", None) or "")
        if name in LIBRARIES and module:
            found[name] = str(module.__version__)
        elif file.name == "__init__.py":
            found[name] = code_hash(file.parent)
        elif file.is_file():
            hashes = [file_hash(helper) for helper in _beside(file)]
            whole = hashlib.sha256("".join(hashes).encode()).hexdigest()
            found[name] = hashes[0] if len(hashes) == 1 else whole
    return found


def _beside(file: Path) -> list[Path]:
    """A module's file, and those of the modules beside it that it imports, directly or not."""
    files = [file]
    for each in files:
        with suppress(OSError, SyntaxError, ValueError):
            for node in ast.walk(ast.parse(each.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                helpers = [file.with_name(f"{name}.py") for name in names]
                files += [h for h in helpers if h.is_file() and h not in files]
    return files


@cache  # it reads a file of every package
def _installed() -> list[str]:
    return [point.module for point in entry_points(group=GROUP)]
