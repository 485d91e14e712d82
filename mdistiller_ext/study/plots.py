"""The pictures of a report, each a matplotlib figure."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from ..pruning import pruned_count, pruning_mask
from .analysis import Findings
from .plan import Study

matplotlib.use("Agg")
# Okabe and Ito (2008): told apart with any colour vision.
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
LINES = ["-", "--", "-.", ":"]
STYLE: Any = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}
WIDTH = 9.0  # inches
SCHEDULED = ("temperature", "pruned_ratio")  # constant within an epoch


def forest(study: Study, findings: Findings) -> Figure:
    """Paired differences to the baseline with their 95 % t intervals, and the claims."""
    rows = [arm for arm in findings.arms if arm.to_baseline and arm.arm != study.alone]
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
        axes.margins(y=0.5 / len(rows) if rows else None)
        axes.invert_yaxis()
        axes.set_xlabel(f"top-1 of the last epoch minus that of {study.baseline}, points")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def by_epoch(
    study: Study, records: dict[str, dict[str, Any]], student: str, key: str, label: str
) -> Figure | None:
    """A metric by epoch: each arm's mean over seeds, and the band of mean ± sd.

    The axis fits the last three quarters of the run, where arms differ by little.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
        axes = figure.add_subplot()
        low, high = np.inf, -np.inf
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
            axes.plot(
                epochs,
                mean,
                color=colour,
                ls=line,
                lw=2,
                drawstyle="steps-mid" if key in SCHEDULED else "default",
                label=f"{arm} (n = {len(series)})",
            )
            sd = series.std(0, ddof=1) if len(series) > 1 else np.zeros_like(mean)
            axes.fill_between(epochs, mean - sd, mean + sd, color=colour, alpha=0.15, lw=0)
            late = slice(len(epochs) // 4, None)
            low, high = min(low, (mean - sd)[late].min()), max(high, (mean + sd)[late].max())
        if not axes.lines:
            return None
        margin = 0.05 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(label)
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=11)
    return figure


def dat_groups(
    study: Study, records: dict[str, dict[str, Any]], student: str, arm: str
) -> Figure | None:
    """The mean KL of the samples whose temperature DAT raised, lowered and left, by epoch."""
    names = ("dat_raised_kl", "dat_lowered_kl", "dat_kl", "dat_raised", "dat_lowered")
    epochs = [
        records[job.name]["epochs"]
        for job in study.jobs
        if (job.student, job.arm) == (student, arm) and job.name in records
        if all(records[job.name]["epochs"][-1].get(name) for name in (*names, "dat_images"))
    ]
    if not epochs:
        return None
    raised_kl, lowered_kl, kl, raised, lowered = (
        np.asarray([[epoch[name] for epoch in run] for run in epochs]).mean(0) for name in names
    )
    images = epochs[0][0]["dat_images"]
    groups = {
        "raised: the hardest": raised_kl / raised,
        "left": (kl - raised_kl - lowered_kl) / (images - raised - lowered),
        "lowered: the easiest": lowered_kl / lowered,
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for (name, values), colour, line in zip(groups.items(), COLOURS[1:], LINES, strict=False):
            axes.plot(
                np.arange(1, len(values) + 1), values, color=colour, ls=line, lw=2, label=name
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("KL(teacher ‖ student), nats")
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def softened(
    images: Tensor, logits: Tensor, targets: Tensor, temperature: float, ratio: float
) -> Figure:
    """What a teacher says of images at T = 1, at a temperature, and there after pruning.

    Args:
        images: raw, (N, 3, H, W), uint8.
        logits: the teacher's, (N, C); targets: labels, (N,).
        ratio: the share of the classes that LP prunes.
    """
    pruned = pruning_mask(logits, targets, pruned_count(ratio, logits.shape[1]))
    soft = (logits / temperature).softmax(1)
    kept = (logits / temperature).masked_fill(pruned, float("-inf")).softmax(1)
    order = logits.argsort(dim=1, descending=True)
    classes = np.arange(1, logits.shape[1] + 1)
    with matplotlib.rc_context({**STYLE, "font.size": 12}):
        figure = Figure(figsize=(WIDTH + 2, 2.6 * len(images) + 0.6), layout="constrained")
        grid = figure.subplots(len(images), 4, width_ratios=[1, 2, 2, 2], squeeze=False)
        titles = "T = 1", f"T = {temperature:g}", f"T = {temperature:g}, {100 * ratio:g} % pruned"
        for row, axes in enumerate(grid):
            axes[0].imshow(images[row].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[0].set_axis_off()
            axes[0].set_title(f"label {int(targets[row])}", fontsize=11)
            for column, values in enumerate((logits.softmax(1), soft, kept), start=1):
                heights = values[row, order[row]].numpy()
                axes[column].bar(classes, heights, width=1.0, color=COLOURS[1])
                place = int((order[row] == targets[row]).nonzero())
                axes[column].bar(classes[place], heights[place], width=1.0, color=COLOURS[2])
                if row == 0:
                    axes[column].set_title(titles[column - 1])
                if row == len(images) - 1:
                    axes[column].set_xlabel("class, by the teacher's rank")
            axes[1].set_ylabel("probability")
        figure.legend(
            [Patch(color=COLOURS[2]), Patch(color=COLOURS[1])],
            ["the label's class", "the others"],
            loc="outside upper center",
            ncols=2,
            frameon=False,
        )
    return figure


def _n(arm: Any) -> int:
    return arm.to_baseline.n
