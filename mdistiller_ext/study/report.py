"""A study's report: in the terminal, as Markdown, JSON, CSV, LaTeX and one HTML page."""

import json
import re
import subprocess
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from ..data import facts
from ..engine.facts import limited
from ..errors import ConfigError, RunError, counted
from ..files import write_atomically, writing
from ..inert import weak_teacher
from ..yaml_file import parse_yaml, read_yaml
from . import formats
from .analysis import Findings, analyse
from .formats import Report, drawn
from .pictures import pictures
from .plan import Study, inert_arms, slug
from .records import check_conditions, collect, table
from .tables import DIGITS, Records, condensed, methods, sections, settings


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
        _verdicts(study, records, findings),
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
        "verdicts": report.verdicts,
        "settings": settings(study, findings).frame.to_dict("records"),
        "conditions": conditions,
        "left_out": report.left_out,
    }
    captions = {name: caption for name, (caption, _) in figures.items()}
    first = [name for name in captions if name == "forest"]
    files = {
        "report.md": formats.markdown(report, {f"{name}.svg": captions[name] for name in first}),
        "report.html": formats.html(
            report,
            [(captions[name], drawings[name]) for name in first],
            [(caption, drawings[name]) for name, caption in captions.items() if name not in first],
        ),
        "report.json": json.dumps(content, indent=1, allow_nan=False),
        "report.csv": _flat(plain["arms"]),
        "claims.csv": _flat(plain["claims"]),
        "conditions.csv": _flat([about | row for row in conditions]),
        "runs.csv": runs.to_csv(index=False),
    }
    for section in (methods(study, findings), *report.sections):
        name = slug(f"table_{section.heading.lower()}".replace(",", ""))
        files[f"{name}.tex"] = formats.latex(section, report.title)
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


def _verdicts(study: Study, records: Records, findings: Findings) -> list[str]:
    """What a grid chooses; what is concluded of each claim, what must be known beside it, and how
    far it reaches."""
    lines = []
    for _, cells in groupby(findings.cells, lambda cell: (cell.student, cell.grid)):
        best, *others = cells
        before = f", {best.top1.mean - others[0].top1.mean:.2f} above {others[0].arm}"
        lines.append(
            f"{best.student}: of the grid of {best.grid}, {best.arm} has the highest top-1 on the "
            f"held-out images: {best.top1.mean:.2f} % over {counted(best.top1.n, 'seed')}"
            f"{before if others else ''}. That is the cell to choose; what it gains is for runs "
            f"with DATASET.HOLDOUT 0 and other seeds."
        )
    if not findings.claims:
        return lines
    pairs = {
        f"{job.student} taught by {records[job.name]['teacher']['name']}": None
        for job in study.jobs
        if job.student in study.claims and job.name in records and records[job.name]["teacher"]
    }
    lines += [f"{c.student}, {c.arm}: {c.verdict}. {c.beside}" for c in findings.claims]
    if pairs:
        which = " and of ".join(pairs)
        lines.append(f"All of it is of {which}, and says nothing of other pairs.")
    return lines + _beforehand(study, records)


def _beforehand(study: Study, records: Records) -> list[str]:
    """Whether the commit that the first run names has the study file as it is, but for its words.

    Nothing is said where that commit, or the file in it, is not there.
    """
    sessions = [session for record in records.values() for session in record["environments"]]
    first = min(sessions, key=lambda session: session.get("started") or "~")
    commit = str(first.get("git_commit"))
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        return []
    words = ["-C", str(study.file.parent), "cat-file", "blob", f"{commit}:./{study.file.name}"]
    try:
        shown = subprocess.run(["git", *words], capture_output=True, check=True).stdout
        before, now = parse_yaml(shown, str(study.file)), read_yaml(study.file, str(study.file))
    except (OSError, subprocess.CalledProcessError, ConfigError):
        return []
    before = before if isinstance(before, dict) else {}
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed := [key for key in changed if key != "note"]:
        return [
            f"Not as it was before the first run: since commit {commit[:DIGITS]}, which that run "
            f"names, the study file's {' and '.join(changed)} changed."
        ]
    return [
        f"Fixed before the first run: commit {commit[:DIGITS]}, which that run names, has the "
        f"study file with the same arms, seeds and claims."
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
