"""record.json: everything about a run that a reader of its numbers may ask."""

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

from ..errors import RunError
from ..files import read, write_atomically

# What a reader of records takes from them, and its types; of a teacher, where there is one.
TYPES = {
    "name": str,
    "status": str,
    "config": dict,
    "environments": list,
    "epochs": list,
    "wall_seconds": (int, float),
}
SESSION_TYPES = {"first_epoch": int, "torch": str, "device_name": str, "mdistiller_ext": str}
CLASS_TYPES = {"top1": list, "confusion": list}
TEACHER_TYPES = {"name": str, "file": str, "sha256": str, "test_top1": (int, float)}


# The figures of an epoch that every reader of records knows, by name and by how it begins.
KNOWN = {"epoch", "lr", "warmup", "temperature", "pruned_ratio", "loss", "train_top1", "seconds"}
KNOWN |= {"mean_temperature", "mean_pruned_ratio", "teacher_table_hits", "images_per_s"}
KNOWN_PREFIXES = ("loss_", "test_", "dat_")


def own_figures(history: Sequence[Mapping[str, float]]) -> list[str]:
    """The names of further ones: what a method schedules or logs by itself."""
    names = dict.fromkeys(name for epoch in history for name in epoch)
    return [n for n in names if n not in KNOWN and not n.startswith(KNOWN_PREFIXES)]


def summary(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """The run's test accuracies, in percent. The last epoch is the headline: it selects nothing.

    They are of the epochs that were evaluated, as the last one of a finished run is; the mean is
    of those among the last ten.
    """
    tested = [epoch for epoch in history if "test_top1" in epoch]
    if not tested:
        return {}
    averages = [epoch["test_ema_top1"] for epoch in tested if "test_ema_top1" in epoch]
    best = max(tested, key=itemgetter("test_top1"))  # of equals the first
    late = [epoch["test_top1"] for epoch in tested if epoch["epoch"] > tested[-1]["epoch"] - 10]
    return {
        "last_epoch_top1": tested[-1]["test_top1"],
        **({"last_epoch_ema_top1": averages[-1]} if averages else {}),
        "mean_last_10_top1": sum(late) / len(late),
        "best_epoch_top1_selected_on_test": best["test_top1"],
        "best_epoch": best["epoch"],
    }


def by_class(confusion: Sequence[Sequence[int]]) -> dict[str, list]:
    """For the record, by label: top-1 in percent, None of a class without an image; and how many of
    its images are taken for each class, as text: "97 0 3".

    Args:
        confusion: as `evaluation.confusion` counts them.
    """
    top1 = [100 * row[n] / sum(row) if sum(row) else None for n, row in enumerate(confusion)]
    return {"top1": top1, "confusion": [" ".join(map(str, row)) for row in confusion]}


def confusion_of(record: Mapping[str, Any]) -> list[list[int]]:
    """The counts that `by_class` has written into a record, or [] of a run that has none."""
    rows = record.get("by_class", {}).get("confusion", [])
    return [[*map(_integer, str(row).split())] for row in rows]


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU, else the resident memory of the process; 0 where none is told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record, with the sha256 of its content in it."""
    record["sha256"] = digest(record)
    try:
        text = json.dumps(record, indent=1, allow_nan=False)
    except ValueError as error:
        raise RunError(f"{path}: cannot be written: {error}") from error
    write_atomically(path, lambda file: file.write(text.encode()))


def read_record(path: Path) -> dict[str, Any]:
    """Read a record that can be believed: whole, unchanged since it was written, of one piece.

    Raises:
        RunError: it is not; the line says what is wrong with it.
    """
    try:
        record = json.loads(
            read(path), parse_constant=_number, parse_float=_number, parse_int=_integer
        )
        fault = _fault(record)
    except (ValueError, RecursionError) as error:
        fault = f"damaged: {type(error).__name__}: {error}"
    if fault:
        raise RunError(f"{path}: {fault}")
    return record


def printable(text: str) -> str:
    """What a record says, in one line and without control of a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def digest(record: dict[str, Any]) -> str:
    """sha256 of a record's content, the entry "sha256" left out."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def history_fault(epochs: list[Any]) -> str:
    """Why these cannot be the figures of a run's epochs, or ""."""
    tested: set[str] = set()  # the figures of an epoch that was evaluated
    for number, epoch in enumerate(epochs, start=1):
        if fault := _misfit(epoch, {"epoch": int}, f"epoch {number}"):
            return fault
        own = {key for key in epoch if str(key).startswith("test_")}
        tested = tested or own
        fault = _misfit(epoch, {"test_top1": (int, float)} if own else {}, f"epoch {number}")
        if fault:
            return fault
        if not all(type(value) in (int, float) for value in epoch.values()):
            return f"epoch {number} holds something else than numbers"
        # A run may go on where there is no room for a teacher table.
        apart = (epoch.keys() ^ epochs[0].keys()) - tested - {"teacher_table_hits"}
        if apart or own not in (tested, set()):
            return f"epoch {number} has other figures than the first"
        if epoch["epoch"] != number:
            return f"epoch {number} is called {epoch['epoch']}"
        if own and not 0 <= epoch["test_top1"] <= 100:
            return f"epoch {number} has a test_top1 of {epoch['test_top1']} %"
    return ""


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def _integer(text: str) -> int:
    if len(text) > 19:
        raise ValueError(f"{text[:19]}... is too large")
    return int(text)


def _fault(record: Any) -> str:
    fault = _misfit(record, TYPES, "the record")
    if not fault and not record["environments"]:
        fault = "it names no environment"
    for session in [] if fault else record["environments"]:
        fault = fault or _misfit(session, SESSION_TYPES, "an environment")
    if not fault and record.get("teacher") is not None:
        fault = _misfit(record["teacher"], TEACHER_TYPES, "teacher")
    if not fault and "by_class" in record:
        types = {"by_class": CLASS_TYPES, "data": {"class_names": list}}
        fault = _misfit(record, types, "the record") or _class_fault(record)
    if fault:
        return f"damaged: {fault}"
    if record.get("sha256") != digest(record):
        return "changed after it was written (its sha256 does not match)"
    if fault := history_fault(record["epochs"]):
        return f"damaged: {fault}"
    if record["status"] == "finished" and "test_top1" not in (record["epochs"] or [{}])[-1]:
        return "damaged: its last epoch was not evaluated"
    expected = summary(record["epochs"])
    wrong = [key for key, value in expected.items() if record.get(key) != value]
    return f"its epochs give another {', '.join(wrong)}" if wrong else ""


def _class_fault(record: dict[str, Any]) -> str:
    rows, names = confusion_of(record), record["data"]["class_names"]
    square = all(len(row) == len(rows) and min(row) >= 0 for row in rows)
    if not square or len(names) != len(rows) or by_class(rows) != record["by_class"]:
        return "by_class is no table of its classes"
    return ""


def _misfit(value: Any, expected: Any, name: str) -> str:
    """How a value of JSON differs from the expected type, or dict of such, or ""."""
    kinds = dict if isinstance(expected, dict) else expected
    if not isinstance(value, kinds) or isinstance(value, bool):
        return f"{name} is a {type(value).__name__}"
    if isinstance(expected, dict):
        for key, kind in expected.items():
            if fault := _misfit(value.get(key), kind, key):
                return fault
    return ""
