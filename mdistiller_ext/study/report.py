"""A study's report: in the terminal, as Markdown, JSON, CSV, LaTeX and one HTML page."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ..data import facts
from ..engine.facts import limited
from ..errors import RunError, counted
from ..files import write_atomically, writing
from ..inert import weak_teacher
from . import formats
from .analysis import analyse
from .formats import Report, drawn
from .pictures import pictures
from .plan import Study, inert_arms
from .records import check_conditions, collect, table
from .tables import DIGITS, Records, condensed, sections, settings


def write_report(study: Study, allowed: Iterable[str] = ()) -> tuple[str, Path]:
    """Read the records, conclude, and write everything into `report/` of the study's folder.

    Args:
        allowed: conditions that may differ between the runs.

    Returns:
        The report as text for the terminal, and the folder.

    Raises:
        ConfigError: runs were made under different conditions.
        RunError: there is no finished run.
    """
    records, left_out = collect(study, allowed)
    left_out = condensed(study, left_out)
    if not records:
        raise RunError(f"{study.folder}: no finished run yet\n" + "\n".join(left_out))
    check_conditions(study, records, allowed)
    runs = table(study, records)
    findings = analyse(study, runs)
    figures, missing = pictures(study, records, runs, findings)
    drawings = {name: drawn(figure, "svg") for name, (_, figure) in figures.items()}
    names = [job.name for job in study.jobs if job.name in records]
    report = Report(
        f"Study {study.name}",
        _intro(study, records),
        [
            *findings.warnings,
            *inert_arms(study),
            *_doubtful_teachers(study, records),
            *_limits(records),
        ],
        sections(study, records, findings),
        left_out + missing,
        runs.assign(name=names),
    )
    plain = findings.plain()
    conditions = [
        {"run": name, **session} for name in names for session in records[name]["environments"]
    ]
    about = {"study": study.name, "note": study.note, "file_sha256": study.file_sha256}
    content = {
        **about,
        "intro": report.intro,
        **plain,
        "warnings": report.warnings,
        "settings": settings(study, findings).frame.to_dict("records"),
        "conditions": conditions,
        "left_out": report.left_out,
    }
    files = {
        "report.md": formats.markdown(report),
        "report.tex": formats.latex(report),
        "report.html": formats.html(
            report, [(caption, drawings[name]) for name, (caption, _) in figures.items()]
        ),
        "report.json": json.dumps(content, indent=1, allow_nan=False),
        "report.csv": _flat(plain["arms"]),
        "claims.csv": _flat(plain["claims"]),
        "conditions.csv": _flat([about | row for row in conditions]),
        "runs.csv": runs.to_csv(index=False),
    }
    folder = study.folder / "report"
    with writing(folder):
        folder.mkdir(exist_ok=True)
    for name, text in files.items():
        _write(folder / name, text.encode())
    for name, (_, figure) in figures.items():
        _write(folder / f"{name}.svg", drawings[name])
        _write(folder / f"{name}.png", drawn(figure, "png"))
    return formats.text(report), folder


def _intro(study: Study, records: Records) -> list[str]:
    """What was run, and from what: note, runs and teachers, dates and versions."""
    configs = [record["config"] for record in records.values()]
    sessions = [session for record in records.values() for session in record["environments"]]
    teachers = {
        f"{record['teacher']['name']} ({record['teacher']['test_top1']:.2f} % top-1)": None
        for record in records.values()
        if record["teacher"]
    }

    def of(key: str, digits: int | None = None) -> str:
        values = {str(session[key])[:digits] for session in sessions if session.get(key)}
        return " and ".join(sorted(values)) or "unknown"

    epochs = " and ".join(
        counted(n, "epoch") for n in sorted({c["SOLVER"]["EPOCHS"] for c in configs})
    )
    held = {record["data"]["evaluated_on"] for record in records.values() if record.get("data")}
    held -= {"the test set"}
    days = sorted(s["started"][:10] for s in sessions if s.get("started")) or ["unknown"]
    return [
        *([study.note] if study.note else []),
        *(f"No test set: all accuracies are of {images}." for images in sorted(held)),
        f"{counted(len(records), 'finished run')} of {epochs} on "
        f"{' and '.join(sorted({c['DATASET']['TYPE'] for c in configs}))}; teacher: "
        f"{', '.join(teachers) or 'none'}.",
        f"Started {' to '.join(dict.fromkeys([days[0], days[-1]]))} (UTC) on "
        f"{of('device_name')}, with torch {of('torch')}, mdistiller-ext {of('mdistiller_ext')}, "
        f"commit {of('git_commit', DIGITS)}, code {of('code', DIGITS)}; sha256 of the study file "
        f"{study.file_sha256[:DIGITS]}.",
    ]


def _doubtful_teachers(study: Study, records: Records) -> list[str]:
    lines = []
    for job in study.jobs:
        if job.name in records and (teacher := records[job.name]["teacher"]):
            data = records[job.name].get("data") or facts(job.cfg.DATASET)._asdict()
            lines.append(weak_teacher(teacher["name"], teacher["test_top1"], data["classes"]))
            lines.append(teacher.get("holdout", ""))  # new
    return list(filter(None, dict.fromkeys(lines)))


def _limits(records: Records) -> list[str]:
    """One line for each part of a training set that runs had instead of it."""
    limits = {name: r["config"]["DATASET"].get("LIMIT", 0) for name, r in records.items()}
    found = [limited(n, records[k]["data"]["train_images"]) for k, n in limits.items() if n]
    return [*dict.fromkeys(found)]


def _flat(rows: list[dict[str, Any]]) -> str:
    """As CSV, a column for each number."""
    frame = pd.json_normalize(rows, sep="_")
    return frame.dropna(axis="columns", how="all").to_csv(index=False)


def _write(file: Path, content: bytes) -> None:
    write_atomically(file, lambda sink: sink.write(content))
