"""A study's report: in the terminal, as Markdown, JSON, CSV, LaTeX and one HTML page."""

import base64
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from ..config import NUM_CLASSES
from ..data import get_dataset
from ..engine import predict
from ..engine.record import printable
from ..errors import ConfigError, RunError
from ..files import write_atomically, writing
from ..models import cifar_model_dict
from ..teacher import load_into, load_weights
from . import plots
from .analysis import Findings, analyse
from .plan import Study, slug
from .records import check_conditions, collect, table
from .statistics import BCA_PAIRS, Difference

TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(study: Study, allowed: Iterable[str] = ()) -> tuple[str, Path]:
    """Read the records, conclude, and write everything into `report/` of the study's folder.

    Args:
        allowed: conditions that may differ between the runs.

    Returns:
        The report as Markdown, and the folder.

    Raises:
        ConfigError: runs were made under different conditions.
        RunError: there is no finished run.
    """
    records, left_out = collect(study, allowed)
    if not records:
        raise RunError(f"{study.folder}: no finished run yet\n" + "\n".join(left_out))
    check_conditions(study, records, allowed)
    runs = table(study, records)
    findings = analyse(study, runs)
    folder = study.folder / "report"
    with writing(folder):
        folder.mkdir(exist_ok=True)
    pictures = _pictures(study, records, findings)
    for name, (_, figure) in pictures.items():
        for kind in ("svg", "png"):
            _write(folder / f"{name}.{kind}", _rendered(figure, kind))
    intro = _intro(records)
    tables = arm_tables(study, findings)
    if findings.claims:
        tables["Claims"] = claim_table(findings)
    markdown = _markdown(study, findings, intro, tables, left_out)
    content = {
        "study": study.name,
        "intro": intro,
        **findings.plain(),
        "left_out": left_out,
    }
    texts = {
        "report.md": markdown,
        "report.json": json.dumps(content, indent=1),
        "report.csv": tables["Accuracy"]
        .merge(tables["Paired differences, points"])
        .to_csv(index=False),
        "runs.csv": runs.to_csv(index=False),
        "report.tex": "\n".join(t.to_latex(index=False, escape=True) for t in tables.values()),
        "report.html": _html(study, findings, intro, tables, left_out, pictures),
    }
    for name, text in texts.items():
        _write(folder / name, text.encode())
    return markdown, folder


def arm_tables(study: Study, findings: Findings) -> dict[str, pd.DataFrame]:
    """Heading -> one row an arm, as the report shows it."""
    accuracy, differences, others = [], [], []
    for arm in findings.arms:
        top1, name = arm.top1, {"student": arm.student, "arm": arm.arm}
        accuracy.append(
            {
                **name,
                "n": top1.n,
                "top-1 (%)": f"{top1.mean:.2f}",
                "sd": "" if top1.sd is None else f"{top1.sd:.2f}",
                "95 % interval": _interval(top1.low, top1.high),
                "best epoch (test-selected)": f"{arm.best:.2f}",
                "gap": f"{arm.best - top1.mean:+.2f}",
            }
        )
        row = dict(name)
        for other, found in ((study.baseline, arm.to_baseline), (study.alone, arm.to_alone)):
            row[f"minus {other}"] = _difference(found)
            row[f"BCa, minus {other}"] = (
                "" if found is None else _interval(found.bca_low, found.bca_high)
            )
        differences.append(row)
        others.append(
            {
                **name,
                "agreement (%)": _number(arm.means.get("agreement"), 1),
                "KL (nats)": _number(arm.means.get("kl"), 3),
                "L2": _number(arm.means.get("l2"), 3),
                "NLL (nats)": _number(arm.means.get("nll"), 3),
                "ECE": _number(arm.means.get("ece"), 3),
                "seconds a run": _number(arm.means.get("seconds"), 0),
            }
        )
    return {
        "Accuracy": pd.DataFrame(accuracy),
        "Paired differences, points": pd.DataFrame(differences),
        "Closeness to the teacher, calibration, cost": pd.DataFrame(others),
    }


def claim_table(findings: Findings) -> pd.DataFrame:
    """One row a claim."""
    return pd.DataFrame(
        {
            "student": claim.student,
            "arm": claim.arm,
            "claimed": f"{claim.claimed:+.2f}",
            "found": _difference(claim.found),
            "p": _number(claim.found.p, 4),
            "Holm p": _number(claim.corrected_p, 4),
            "pairs": claim.found.n,
            "conclusion": claim.verdict,
        }
        for claim in findings.claims
    )


def _intro(records: dict[str, dict[str, Any]]) -> str:
    first = next(iter(records.values()))
    place, teachers = first["environments"][-1], {}
    for record in records.values():
        if record["teacher"]:
            teachers[record["teacher"]["name"]] = record["teacher"]["test_top1"]
    teacher = ", ".join(f"{name} ({top1:.2f} % top-1)" for name, top1 in teachers.items())
    return (
        f"{len(records)} finished runs of {first['config']['SOLVER']['EPOCHS']} epochs on "
        f"{first['config']['DATASET']['TYPE']}; teacher: {teacher or 'none'}; "
        f"{place['device_name']}, torch {place['torch']}, "
        f"mdistiller-ext {place['mdistiller_ext']}. "
        f"Top-1 is that of the last epoch, which selects nothing; differences are paired by seed, "
        f"in points, with 95 % t intervals; BCa intervals, which truly cover 85 % at {BCA_PAIRS} "
        f"pairs and 90 % at 10, stand beside them from {BCA_PAIRS} pairs on; p values are of the "
        f"exact sign-flip test."
    )


def _needed(findings: Findings) -> list[str]:
    return [
        f"{student}: "
        + ", ".join(f"a difference of {points} points takes {n}" for points, n in needed.items())
        + " seeds, to be seen with 80 % power in one test at 5 %."
        for student, needed in findings.seeds_to_see.items()
    ]


def _markdown(
    study: Study,
    findings: Findings,
    intro: str,
    tables: dict[str, pd.DataFrame],
    left_out: list[str],
) -> str:
    parts = [f"# Study {_literal(study.name)}", _literal(intro)]
    parts += [f"**Warning:** {text}" for text in findings.warnings]
    for heading, frame in tables.items():
        parts += [f"## {heading}", frame.to_markdown(index=False, disable_numparse=True)]
    if needed := _needed(findings):
        parts += ["## Seeds that such a study needs", *needed]
    if left_out:
        parts += ["## Left out", "\n".join(f"- {_literal(line)}" for line in left_out)]
    return "\n\n".join(parts) + "\n"


def _html(
    study: Study,
    findings: Findings,
    intro: str,
    tables: dict[str, pd.DataFrame],
    left_out: list[str],
    pictures: dict[str, tuple[str, Figure]],
) -> str:
    sections: list[tuple[str, list[str], str]] = [
        (heading, [], frame.to_html(index=False, border=0, classes=slug(heading)))
        for heading, frame in tables.items()
    ]
    sections.append(("Seeds that such a study needs", _needed(findings), ""))
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True)
    return template.render(
        title=f"Study {study.name}",
        intro=intro,
        warnings=findings.warnings,
        sections=sections,
        pictures=[
            (caption, "data:image/svg+xml;base64," + base64.b64encode(_rendered(f, "svg")).decode())
            for caption, f in pictures.values()
        ],
        left_out=left_out,
    )


def _pictures(
    study: Study, records: dict[str, dict[str, Any]], findings: Findings
) -> dict[str, tuple[str, Figure]]:
    """File name -> (caption, figure)."""
    found = {
        "forest": (
            f"Paired differences to {study.baseline} by arm.",
            plots.forest(study, findings),
        )
    }
    for student in study.students:
        for name, key, label, caption in (
            ("top1", "test_top1", "test top-1, %", "Test accuracy by epoch, mean ± sd over seeds."),
            (
                "l2",
                "test_l2_probabilities",
                "L2 distance to the teacher's softmax",
                "Distance between student and teacher by epoch (the paper's Figure 3).",
            ),
            ("temperature", "temperature", "temperature", "The temperature schedules as run."),
            ("pruning", "pruned_ratio", "pruned share of the classes", "The pruning as run."),
        ):
            figure = plots.by_epoch(study, records, student, key, label)
            if figure:
                found[f"{name}_{slug(student)}"] = (f"{student}: {caption}", figure)
        for arm in study.arms:
            figure = plots.dat_groups(study, records, student, arm)
            if figure:
                place = f"dat_{slug(student)}_{slug(arm)}"
                found[place] = (f"{student}, {arm}: the groups of DAT, by their loss.", figure)
    try:
        found["teacher"] = (
            "What the teacher says of three test images: one it is sure of, one in between, one it "
            "doubts (the paper's Figures 1 and 2).",
            _teacher_picture(study, records),
        )
    except (ConfigError, RunError) as error:
        print(f"no picture of the teacher: {error}")
    return found


def _teacher_picture(study: Study, records: dict[str, dict[str, Any]]) -> Figure:
    job = next((j for j in study.jobs if j.name in records and records[j.name]["teacher"]), None)
    if job is None:
        raise ConfigError("no run has one")
    facts, cfg = records[job.name]["teacher"], job.cfg
    weights = load_weights(Path(facts["file"]))
    if weights.sha256 != facts["sha256"]:
        raise RunError(f"{weights.file}: not the one that the runs had")
    name = cfg.DISTILLER.TEACHER
    teacher = cifar_model_dict[name][0](num_classes=NUM_CLASSES[cfg.DATASET.TYPE])
    load_into(teacher, weights, name)
    test = get_dataset(cfg)[1]
    logits = predict(teacher, test, 250)
    sure = logits.softmax(1).amax(1).argsort(descending=True)
    chosen = sure[[len(sure) // 10, len(sure) * 7 // 10, len(sure) * 19 // 20]]
    side = slice(test.padding, test.padded.shape[2] - test.padding)
    images = test.padded[chosen][:, :, side, side]
    return plots.softened(images, logits[chosen], test.targets[chosen], 4.0, 0.4)


def _literal(text: str) -> str:
    """What a record says, as text in Markdown: no HTML and no link."""
    return re.sub(r"[\\`*<>&\[\]|]", r"\\\g<0>", printable(text))


def _write(file: Path, content: bytes) -> None:
    write_atomically(file, lambda sink: sink.write(content))


def _rendered(figure: Figure, kind: str) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return sink.getvalue()


def _difference(found: Difference | None) -> str:
    return "" if found is None else f"{found.mean:+.2f} {_interval(found.low, found.high)}".strip()


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
