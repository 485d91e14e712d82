"""Our methods as files of the toolkit itself, for a pull request."""

from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from ..distillers import RECIPES
from ..errors import ConfigError, brief
from ..settings import leaves

METHODS = ("DKD_EAT", "DKD_DAT", "DKD_LP")
SOURCES = Path(__file__).with_name("upstream")
SHARED = "dkd_loss"  # the module that all of them import

CONTROLS = ("GROUPS", "CLASSES", "MODE")  # for studies here; they change nothing by default
REGISTRY = "mdistiller/distillers/__init__.py"
CONFIG = "mdistiller/engine/cfg.py"


def plan(checkout: Path, configs: Path, methods: Sequence[str]) -> dict[Path, str]:
    """The files that the export adds to a checkout of mdistiller or changes, with their new text.

    Args:
        checkout: its root. Nothing is written.
        configs: our `configs/cifar100`.
        methods: which of METHODS.

    Returns:
        Only files that differ from what is there, in an order in which an export that breaks off
        leaves the toolkit working: what the registry imports comes before the registry.

    Raises:
        ConfigError: the checkout does not look as expected, one of the names is taken, or another
            method is asked for.
    """
    if others := [name for name in methods if name not in METHODS]:
        raise ConfigError(f"--methods: {brief(others[0])} is none of {', '.join(METHODS)}")
    new = {
        f"mdistiller/distillers/{name}.py": (SOURCES / f"{name}.py").read_text(encoding="utf-8")
        for name in (SHARED, *methods)
    }
    for folder, pair in (("", "res110_res8"), ("res110_res20", "res110_res20")):
        for name in methods:
            text = (configs / folder / f"{name.lower()}.yaml").read_text(encoding="utf-8")
            new[f"configs/cifar100/{name.lower()}/{pair}.yaml"] = _their_yaml(text)
    changes = {}
    for path, text in new.items():
        present = checkout / path
        if present.exists() and present.read_text(encoding="utf-8") != text:
            raise ConfigError(f"{present} is there already and differs")
        if not present.exists():
            changes[present] = text
    config = {name: (name, _config_lines(name, RECIPES[name].node())) for name in methods}
    imports = {name: (f"import {name}\n", f"from .{name} import {name}\n") for name in methods}
    entries = {name: (f'"{name}"', f'    "{name}": {name},\n') for name in methods}
    for path, edits in (
        (CONFIG, [("CFG.DKD.WARMUP = 20\n", config)]),
        (REGISTRY, [("from .DKD import DKD\n", imports), ('    "DKD": DKD,\n', entries)]),
    ):
        file = checkout / path
        before = text = _read(file)
        for anchor, additions in edits:
            text = _insert(file, text, anchor, additions)
        if text != before:
            changes[file] = text
    return changes


def _config_lines(name: str, node: CfgNode) -> str:
    settings = [(key, value) for key, value in leaves(node) if key not in CONTROLS]
    lines = [f"CFG.{name}.{key} = {value!r}\n" for key, value in settings]
    return f"\n# {name} CFG\nCFG.{name} = CN()\n{''.join(lines)}"


def _their_yaml(text: str) -> str:
    kept = [line for line in text.splitlines(keepends=True) if not line.startswith("#")]
    return "".join(kept).replace("LOG:\n  WANDB: False\n", "")


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", newline="") as content:
            return content.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no readable file: not a checkout of mdistiller") from error


def _insert(file: Path, text: str, anchor: str, additions: dict[str, tuple[str, str]]) -> str:
    """Add, after a line of the file, for each method the text that is not there yet.

    `additions` gives for each method a sign that its name is in use, and what to add.
    """
    if text.count(anchor) != 1:
        raise ConfigError(
            f"{file}: {text.count(anchor)} lines {anchor.strip()!r}, expected 1: "
            f"not the mdistiller that this export is made for"
        )
    missing = ""
    for sign, addition in additions.values():
        if addition in text:
            continue
        if sign in text:
            raise ConfigError(f"{file}: has something else of the name {sign.strip()}")
        missing += addition
    return text.replace(anchor, anchor + missing)
