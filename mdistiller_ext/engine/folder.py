"""The folder of a run: its name, its lock, and what it holds from before."""

import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from ..config import as_pairs, get_cfg, is_place, shown
from ..data import is_own
from ..distillers import source
from ..errors import ConfigError, RunError
from ..files import check_finite, load, read, save, writing
from ..settings import leaves
from ..teacher import find_weights
from .environment import CODE
from .record import history_fault, read_record

# What is to be done about a folder that another run fills.
ANEW = "start another with a different EXPERIMENT.NAME, or anew with --fresh, which keeps the old"
Planned = Callable[[int], dict[str, float]]
LATEST, PREVIOUS = "latest", "latest.previous"
# What `latest` holds.
STATE: dict[str, Any] = {
    "epoch": int,
    "model": dict,
    "optimizer": dict,
    "random": dict,
    "environments": list,
    "history": list,
    "meter": dict,
    "spent": float,
    "config": dict,
    "teacher_sha256": (str, type(None)),
    "average": dict,
    "planned": dict,
}
LATER: dict[str, Any] = {"average": {}, "planned": {}}  # what once it did not

# What a config file's tag is about.
TAGGED = {"DATASET.TYPE", "DISTILLER.TYPE", "DISTILLER.TEACHER", "DISTILLER.STUDENT"}
_EPOCHS = r",EPOCHS=\d+"
LONGEST = 200  # bytes of a name, as file systems count


def default_name(cfg: CfgNode, options: Sequence[str] = ()) -> str:
    """EXPERIMENT.NAME, or the tag with the command line's settings and the seed.

    Where the command line changes the method, a network or the data, but no tag, the file's would
    lie; what runs takes its place. A file of weights that is named counts by its content.

    Raises:
        ConfigError: DISTILLER.TEACHER_CKPT does not exist.
        RunError: it cannot be read.
    """
    if cfg.EXPERIMENT.NAME:
        return cfg.EXPERIMENT.NAME
    node, values, given = cfg.DISTILLER, dict(leaves(shown(cfg))), as_pairs(options)
    alone = node.TYPE == "NONE"
    parts, said = [cfg.EXPERIMENT.TAG], {"SOLVER.SEED"}
    if given.keys() & TAGGED and "EXPERIMENT.TAG" not in given:
        theirs = ["mdistiller"] if source(node) == "mdistiller" else []
        networks = [node.STUDENT] if alone else [node.TEACHER, node.STUDENT]
        parts = [node.TYPE.lower(), *theirs, *networks, cfg.DATASET.TYPE]
        said |= TAGGED
    short = Counter(key.split(".", 1)[1] for key in values)
    for key, value in values.items():
        own = key == "DATASET.ROOT" and is_own(cfg.DATASET.TYPE)  # it tells the images apart
        if key in given and key not in said and (own or not is_place(key)):
            last = key.split(".", 1)[1]
            parts.append(f"{last if short[last] == 1 else key}={value}")
    if node.TEACHER_CKPT and not alone:
        file = find_weights(node.TEACHER, cfg.DATASET.TYPE, node.TEACHER_CKPT)
        parts.append(f"TEACHER_CKPT={content_digest(file) if file else node.TEACHER_CKPT}")
    name = re.sub(r"[^\w.,=+-]+", "_", ",".join([*parts, f"seed{cfg.SOLVER.SEED}"]))
    content = name.encode()
    if len(content) <= LONGEST:
        return name
    return f"{_digest(content)},{content[9 - LONGEST :].decode(errors='ignore')}"


def former_name(cfg: CfgNode, name: str) -> str:
    """The name of the run that there is of another number of epochs, where there is none of this
    name, or "".

    Raises:
        ConfigError: there are several.
    """
    home = Path(cfg.LOG.PREFIX, cfg.EXPERIMENT.PROJECT)
    if (home / name).exists() or not home.is_dir():
        return ""
    bare = re.sub(_EPOCHS, "", name)
    others = [file.name for file in home.iterdir() if re.sub(_EPOCHS, "", file.name) == bare]
    if len(others) > 1:
        raise ConfigError(
            f"--resume: {home} has no {name}, but {', '.join(sorted(others))}: name one of them "
            f"with EXPERIMENT.NAME"
        )
    return others[0] if others else ""


def finished_before(cfg: CfgNode, folder: Path, resume: bool) -> dict[str, Any] | None:
    """The record of this very run if it has come to its end.

    Raises:
        ConfigError: `resume` is false, and the run was made by other code.
        RunError: the record is damaged.
    """
    record = finished_record(folder)
    if not record or differences(record["config"], plain(cfg)):
        return None
    code = record["environments"][-1].get("code")
    if not resume and code != CODE:
        raise ConfigError(
            f"{folder} holds a finished run of other code (sha256 {str(code)[:12]}, this is "
            f"{CODE[:12]}): {ANEW}"
        )
    return record


def set_aside(folder: Path) -> None:
    """Move what a folder holds, but for its lock, to one beside it: NAME,old1, NAME,old2, ...

    Raises:
        RunError: it cannot be moved.
    """
    found = [file for file in folder.iterdir() if file.name != "lock"]
    if not found:
        return
    places = (folder.with_name(f"{folder.name},old{number}") for number in count(1))
    place = next(place for place in places if not place.exists())
    with writing(place):
        place.mkdir()
        for file in found:
            file.rename(place / file.name)
    print(f"{folder}: what it held is in {place}")


def earlier_state(cfg: CfgNode, folder: Path, resume: bool) -> dict[str, Any] | None:
    """What `latest` holds, or None for a run that starts.

    Raises:
        ConfigError: the folder holds a run and `resume` is false, or its config is another in
            more than that it was to end sooner.
        RunError: `latest` is damaged, or gone.
    """
    latest, record = folder / LATEST, folder / "record.json"
    there = latest.exists() or (folder / PREVIOUS).exists()
    if not there and not (record.exists() and read_record(record)["epochs"]):
        return None  # it ended before anything of it was kept
    if not resume:
        raise ConfigError(
            f"{folder} holds a run already: continue it with --resume, or start another "
            f"with a different EXPERIMENT.NAME or SOLVER.SEED, or anew with --fresh"
        )
    if there and not latest.exists():
        (folder / PREVIOUS).replace(latest)  # killed between two renames
    try:
        state = _read_state(latest)
    except RunError as error:
        raise RunError(f"{error}; {_way_out(folder)}") from error
    changed = differences(state["config"], plain(cfg))
    longer = state["epoch"] < cfg.SOLVER.EPOCHS and len(changed) == 1
    if changed and not (longer and changed[0].startswith("SOLVER.EPOCHS ")):
        raise ConfigError(f"{latest}: was trained with another config: {'; '.join(changed)}")
    return state


def check_history(history: Sequence[dict[str, float]], expected: Planned, folder: Path) -> None:
    """Refuse to go on with epochs that a run of this config would have trained otherwise.

    Args:
        expected: epoch -> the learning rate and what the method schedules.

    Raises:
        ConfigError: names the first setting that differs.
    """
    for epoch in history:
        for key, value in expected(int(epoch["epoch"])).items():
            if epoch.get(key) != value:
                was = f"it was {epoch[key]:g}" if key in epoch else "there was none"
                raise ConfigError(
                    f"{folder}: cannot go on: in a run of so many epochs the {key} of epoch "
                    f"{epoch['epoch']} is {value:g}, {was}"
                )


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Make it what a resumed run starts from, and keep the one before."""
    save(state, folder / LATEST, previous=folder / PREVIOUS)


@contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Turns the errors of a `latest` that does not fit into one line.

    Raises:
        RunError: instead of these.
    """
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(
            f"{folder / LATEST}: does not fit its config: {' '.join(str(error).split())}"
        ) from error


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two configs in plain types, places apart: "KEY before -> now".

    A key that did not exist when the first was made had its default's effect. Of what lies in
    files, as images and assistants, the content decides, which a config does not have.
    """
    other = dict(leaves(now))
    one = {k: v for k, v in leaves(get_cfg()) if k in other} | dict(leaves(before))
    for config in (one, other):
        chain = config.get("DISTILLER.ASSISTANTS", [])
        config["DISTILLER.ASSISTANTS"] = [
            Path(name).name if name.endswith((".yaml", ".yml")) else name for name in chain
        ]
    return [
        f"{key} {one.get(key)!r} -> {other.get(key)!r}"
        for key in {**one, **other}
        if not is_place(key) and one.get(key) != other.get(key)
    ]


def finished_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run that has come to its end, else None.

    Raises:
        RunError: it is damaged.
    """
    file = folder / "record.json"
    if not file.exists():
        return None
    try:
        record = read_record(file)
    except RunError as error:
        raise RunError(f"{error}; remove it, and --resume writes it anew") from error
    return record if record["status"] == "finished" else None


def plain(cfg: CfgNode) -> dict[str, Any]:
    """What a run depends on, in plain types."""
    return json.loads(json.dumps(shown(cfg)))


def _read_state(file: Path) -> dict[str, Any]:
    state = load(file)
    state = LATER | state if isinstance(state, dict) else state
    if not isinstance(state, dict) or state.keys() != STATE.keys():
        raise RunError(f"{file}: expected a dict of {', '.join(STATE)}, found something else")
    for key, kind in STATE.items():
        if not isinstance(state[key], kind):
            raise RunError(f"{file}: {key} is a {type(state[key]).__name__}")
    if len(state["history"]) != state["epoch"]:
        raise RunError(f"{file}: {len(state['history'])} epochs, expected {state['epoch']}")
    if fault := history_fault(state["history"]):
        raise RunError(f"{file}: {fault}")
    check_finite(file, state)
    return state


def _way_out(folder: Path) -> str:
    """What is to be done about a `latest` that cannot be used."""
    latest, previous = folder / LATEST, folder / PREVIOUS
    try:
        epoch = _read_state(previous)["epoch"]
    except RunError:
        return f"there is no state before it: remove {folder} to start anew"
    command = shlex.join(["mv", str(previous), str(latest)])
    return f"{previous} holds the state after epoch {epoch}: {command} and --resume go on from it"


def content_digest(file: Path) -> str:
    """The first eight digits of the sha256 of a file.

    Raises:
        RunError: it cannot be read.
    """
    return _digest(read(file))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]
