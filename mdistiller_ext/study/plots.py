"""The pictures of a report, each a matplotlib figure."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .analysis import Findings
from .plan import Study

matplotlib.use("Agg")
# Okabe and Ito (2008): told apart with any colour vision.
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
LINES = ["-", "--", "-.", ":"]
STYLE: Any = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}
WIDTH = 9.0  # inches


def forest(study: Study, findings: Findings) -> Figure:
    """Paired differences to the baseline with their 95 % t intervals, and the claims."""
    rows = [arm for arm in findings.arms if arm.to_baseline and arm.arm != study.baseline]
    claimed = {(claim.student, claim.arm): claim.claimed for claim in findings.claims}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.4 + 0.42 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for place, arm in enumerate(rows):
            found = arm.to_baseline
            assert found is not None
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [place, place], color=COLOURS[1], lw=2.5)
            axes.plot(found.mean, place, "o", color=COLOURS[1], ms=8)
            if (arm.student, arm.arm) in claimed:
                axes.plot(
                    claimed[arm.student, arm.arm], place, "D", color=COLOURS[2], ms=8, mfc="w"
                )
        axes.plot([], [], "o-", color=COLOURS[1], lw=2.5, label="mean, 95 % t interval")
        if claimed:
            axes.plot([], [], "D", color=COLOURS[2], mfc="w", ls="", label="claimed by the paper")
        axes.axvline(0, color="0.6", lw=1, zorder=0)
        several = len(study.students) > 1
        names = [f"{arm.student}: {arm.arm}" if several else arm.arm for arm in rows]
        axes.set_yticks(
            range(len(rows)),
            [f"{name} (n = {_n(arm)})" for name, arm in zip(names, rows, strict=True)],
        )
        axes.invert_yaxis()
        axes.set_xlabel(f"top-1 of the last epoch minus that of {study.baseline}, points")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def by_epoch(
    study: Study, records: dict[str, dict[str, Any]], student: str, key: str, label: str
) -> Figure | None:
    """A metric by epoch: each arm's mean over seeds, and the band of mean ± sd."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
        axes = figure.add_subplot()
        for number, arm in enumerate(study.arms):
            values = [
                [epoch[key] for epoch in records[job.name]["epochs"]]
                for job in study.jobs
                if job.student == student and job.arm == arm and job.name in records
                if key in records[job.name]["epochs"][-1]
            ]
            if not values:
                continue
            series = np.asarray(values)
            epochs, mean = np.arange(1, series.shape[1] + 1), series.mean(0)
            colour, line = COLOURS[number % len(COLOURS)], LINES[number // 2 % len(LINES)]
            axes.plot(epochs, mean, color=colour, ls=line, lw=2, label=f"{arm} (n = {len(series)})")
            if len(series) > 1:
                sd = series.std(0, ddof=1)
                axes.fill_between(epochs, mean - sd, mean + sd, color=colour, alpha=0.15, lw=0)
        if not axes.lines:
            return None
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=11)
    return figure


def _n(arm: Any) -> int:
    return arm.to_baseline.n
