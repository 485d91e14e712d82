"""A study's records: which can be believed, which belong together."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from ..engine.environment import CONDITIONS, changes
from ..engine.folder import differences, plain
from ..engine.record import printable, read_record
from ..errors import ConfigError, RunError, brief
from .plan import RUNS, Study, conditions_of, mixed

METRICS = {
    "top1": "last_epoch_top1",
    "best": "best_epoch_top1_selected_on_test",
    "mean_last_10": "mean_last_10_top1",
    "seconds": "wall_seconds",
}
LAST_EPOCH = {
    "agreement": "test_agreement",
    "kl": "test_kl",
    "l2": "test_l2_probabilities",
    "nll": "test_nll",
    "ece": "test_ece",
}
FIGURES = ["mean_last_10", "seconds", *LAST_EPOCH]  # beside the two accuracies


def collect(
    study: Study, allowed: Iterable[str] = ()
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The study's records by the name of their run, and one line for each that is left out.

    Args:
        allowed: names of conditions that may differ between the sessions of a run.
    """
    jobs = {job.name: job for job in study.jobs}
    found, left_out = {}, []
    for file in sorted((study.folder / RUNS).glob("*/record.json")):
        try:
            record = read_record(file)
            reason = _fault(record, file, jobs) or _changed(record, allowed)
        except RunError as error:
            reason = str(error).removeprefix(f"{file}: ")
        if reason:
            left_out.append(printable(f"{file.parent.name}: left out: {reason}"))
        else:
            found[file.parent.name] = record
    missing = [job.name for job in study.jobs if not (job.folder / "record.json").exists()]
    left_out += [f"{name}: has not run" for name in missing]
    return found, left_out


def check_conditions(
    study: Study, records: dict[str, dict[str, Any]], allowed: Iterable[str]
) -> None:
    """Refuse runs of one student that were not made under the same conditions.

    Args:
        allowed: names of conditions that may differ.

    Raises:
        ConfigError: names each condition that differs, its values and how many runs have them; or
            a name in `allowed` that is no condition.
    """
    known = {*CONDITIONS, "teacher"}.union(*(conditions(r) for r in records.values()))
    if unknown := [key for key in allowed if key not in known]:
        raise ConfigError(
            f"--allow: {', '.join(map(brief, unknown))} is no condition, expected one of "
            f"{', '.join(sorted(known))}"
        )
    found = {name: conditions(record) for name, record in records.items()}
    if faults := mixed(study, found, allowed):
        raise ConfigError("\n".join(faults))


def conditions(record: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for two runs to be compared; what a run does not have is left out."""
    session = record["environments"][-1]
    found = {key: session[key] for key in CONDITIONS if session.get(key) is not None}
    if record["teacher"]:
        found["teacher"] = record["teacher"]["sha256"]
    return found | conditions_of(record["config"])


def table(study: Study, records: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row a run: student, arm, seed, its figures, and on what it was made.

    `together` is how many runs its process trained at once: then the seconds are their group's.
    `device_name` is None for a run that was continued on another kind of device.
    """
    rows = []
    for job in study.jobs:
        if job.name not in records:
            continue
        record = records[job.name]
        row: dict[str, Any] = {"student": job.student, "arm": job.arm, "seed": job.seed}
        row |= {name: record[key] for name, key in METRICS.items()}
        row |= {name: record["epochs"][-1].get(key) for name, key in LAST_EPOCH.items()}
        if len(record["epochs"]) < 10:
            row["mean_last_10"] = None
        kinds = {session["device_name"] for session in record["environments"]}
        row["device_name"] = kinds.pop() if len(kinds) == 1 else None
        row["together"] = max(session.get("together", 1) for session in record["environments"])
        rows.append(row)
    columns = ["student", "arm", "seed", *METRICS, *LAST_EPOCH, "device_name", "together"]
    return pd.DataFrame(rows, columns=columns)


def _changed(record: dict[str, Any], allowed: Iterable[str]) -> str:
    """Which conditions changed between the sessions of a run, or ""."""
    faults = []
    for before, now in pairwise(record["environments"]):
        faults += [
            f"{change} in epoch {now['first_epoch']}"
            for change in changes(before, now)
            if change.split()[0] not in allowed
        ]
    return f"its sessions differ: {'; '.join(faults)}" if faults else ""


def _fault(record: dict[str, Any], file: Path, jobs: dict[str, Any]) -> str:
    name = file.parent.name
    if name not in jobs:
        copied = record["name"] if record["name"] in jobs else ""
        return f"a copy of {copied}" if copied else "no run of this study"
    if record["name"] != name:
        return f"a copy of {record['name']}"
    if record["status"] != "finished":
        reason = record.get("error") or f"{len(record['epochs'])} epochs"
        return f"{record['status']}: {reason}"
    apart = differences(record["config"], plain(jobs[name].cfg))
    if apart:
        return f"another config: {'; '.join(apart)}"
    epochs, expected = len(record["epochs"]), jobs[name].cfg.SOLVER.EPOCHS
    return "" if epochs == expected else f"{epochs} epochs, expected {expected}"
