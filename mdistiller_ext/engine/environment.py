"""A session of a run: with which code, on what, and by which arithmetic it trains."""

import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from ..files import code_hash
from ..models import home, is_network
from ..plugins import import_module, versions

PACKAGE = Path(__file__).resolve().parents[1]
# What changes a run's numbers, and so must be the same in all runs that are compared.
CONDITIONS = (
    "code",
    "toolkit",
    "imported",
    "data",
    "torch",
    "cuda",
    "cudnn",
    "device",
    "device_name",
    "processes",
    "tf32",
)


def environment(device: torch.device) -> dict[str, Any]:
    """Date, command, code, versions, device and arithmetic of this process."""
    try:
        own = version("mdistiller-ext")
    except PackageNotFoundError:
        own = "not installed"
    status = _git("status", "--porcelain", "--", str(PACKAGE))
    cuda = device.type == "cuda"
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "mdistiller_ext": own,
        "code": CODE,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "host": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),  # a str that loads safely
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "device": device.type,
        "device_name": device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "tf32": cuda and torch.backends.cudnn.allow_tf32,
    }


def imported(cfg: CfgNode) -> dict[str, str] | None:
    """What a run's networks, data, losses and methods come from beside this package, or None."""
    node = cfg.DISTILLER
    teachers = [] if node.TYPE == "NONE" else [node.TEACHER, *filter(is_network, node.ASSISTANTS)]
    names = {*cfg.EXPERIMENT.IMPORT, *map(home, [node.STUDENT, *teachers])}
    for name in names:  # of a run that is only looked at nothing has been built
        with suppress(Exception):  # which building says
            import_module(name)
    return versions(name for name in names if name.split(".")[0] != PACKAGE.name) or None


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The conditions that differ between two sessions: "CONDITION before -> now"."""
    return [
        f"{key} {before.get(key)} -> {now.get(key)}"
        for key in CONDITIONS
        if before.get(key) != now.get(key)
    ]


# Of what trains: a report or a command may be rewritten between two runs. Taken at import, when
# the code is what will run.
CODE = code_hash(PACKAGE, but=("study", "commands"))


def _git(*words: str) -> str | None:
    # Only where this package is tracked: an installed copy may lie inside somebody's repository.
    try:
        for command in (["ls-files", "--error-unmatch", str(PACKAGE / "__init__.py")], words):
            result = subprocess.run(
                ["git", "-C", str(PACKAGE), *command], capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def device_name(device: torch.device) -> str:
    """Of a GPU or a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        facts = cpu_facts()
        # Clouds give several processors one name.
        return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
    except LookupError:
        return platform.processor() or platform.machine()


def cpu_facts() -> dict[str, str]:
    """What Linux says of the first processor; elsewhere nothing."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
        pairs = [line.split(":", 1) for line in first.splitlines()]
        return {key.strip(): value.strip() for key, value in pairs}
    except (OSError, ValueError):
        return {}
