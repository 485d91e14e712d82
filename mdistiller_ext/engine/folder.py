"""The folder of a run: its name, its lock, and what it holds from before."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from ..config import as_pairs, leaves, shown
from ..errors import ConfigError
from ..files import load

# What may change between a run and its continuation: where things lie, not what they are.
PLACES = (
    "EXPERIMENT.",
    "LOG.",
    "DATASET.ROOT",
    "DATASET.NUM_WORKERS",
    "DISTILLER.TEACHER_CKPT",
    "DISTILLER.TEACHER_CFG",
    "DISTILLER.TEACHER_TABLE_ROOT",
)


def default_name(cfg: CfgNode, options: Sequence[str] = ()) -> str:
    """EXPERIMENT.NAME, or the tag with the command line's settings and the seed."""
    if cfg.EXPERIMENT.NAME:
        return cfg.EXPERIMENT.NAME
    apart = [
        f"{k.split('.', 1)[1]}={Path(v).name}"
        for k, v in as_pairs(options).items()
        if not _is_place(k) and k != "SOLVER.SEED"
    ]
    name = ",".join([cfg.EXPERIMENT.TAG, *apart, f"seed{cfg.SOLVER.SEED}"])
    # File systems count bytes.
    return re.sub(r"[^\w.,=+-]+", "_", name).encode()[-200:].decode(errors="ignore")


def earlier_state(cfg: CfgNode, folder: Path, resume: bool) -> dict[str, Any] | None:
    """What `latest` holds, or None for a run that starts.

    Raises:
        ConfigError: the folder holds a run and `resume` is false, or its config is another.
        RunError: `latest` is damaged.
    """
    latest = folder / "latest"
    if not resume and (latest.exists() or (folder / "record.json").exists()):
        raise ConfigError(
            f"{folder} holds a run already: continue it with --resume, or start another "
            f"with a different EXPERIMENT.NAME or SOLVER.SEED"
        )
    if not latest.exists():
        return None
    state = load(latest)
    changed = differences(state["config"], plain(cfg))
    if changed:
        raise ConfigError(f"{latest}: was trained with another config: {'; '.join(changed)}")
    return state


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two configs in plain types, places apart: "KEY before -> now"."""
    one, other = dict(leaves(before)), dict(leaves(now))
    return [
        f"{key} {one.get(key)!r} -> {other.get(key)!r}"
        for key in {**one, **other}
        if not _is_place(key) and one.get(key) != other.get(key)
    ]


def finished_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run that has come to its end, else None."""
    file = folder / "record.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    return record if record.get("status") == "finished" else None


def plain(cfg: CfgNode) -> dict[str, Any]:
    """What a run depends on, in plain types."""
    return json.loads(json.dumps(shown(cfg)))


def _is_place(key: str) -> bool:
    return key.startswith(PLACES)
