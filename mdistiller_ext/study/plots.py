"""The pictures of a report, each a matplotlib figure."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from ..policies.lp import pruned_count, pruning_mask
from .analysis import Findings, beyond, pairs
from .plan import Study
from .statistics import Difference, Summary

matplotlib.use("Agg")
# Okabe and Ito (2008): told apart with any colour vision.
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
LINES = ["-", "--", "-.", ":"]
STYLE: Any = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}
WIDTH = 9.0  # inches
Epochs = Sequence[Mapping[str, float]]  # of a run, as its record has them


def forest(study: Study, runs: pd.DataFrame, findings: Findings) -> Figure | None:
    """Paired differences to the baseline: each pair, mean and 95 % interval, and the claims."""
    rows = [arm for arm in findings.arms if arm.to_baseline and arm.arm != study.alone]
    if not rows:
        return None
    claims = {(claim.student, claim.arm): claim for claim in findings.claims}
    with matplotlib.rc_context(STYLE):
        names = [
            (arm.student, arm.arm, f"{found.n}{', unbounded' if found.low is None else ''}")
            for arm in rows
            if (found := arm.to_baseline)
        ]
        figure, axes = _rows_of_arms(names, "mean, 95 % interval of its own")
        for place, arm in enumerate(rows):
            values, baseline = pairs(runs, arm.student, arm.arm, study.baseline)
            _row(axes, place, np.subtract(values, baseline), arm.to_baseline)
            if claim := claims.get((arm.student, arm.arm)):
                if claim.low is not None and claim.high is not None:
                    axes.plot([claim.low, claim.high], [place] * 2, color=COLOURS[1], lw=1)
                axes.plot(claim.claimed, place, "D", color=COLOURS[2], ms=8, mfc="w")
        if claims:
            axes.plot([], [], color=COLOURS[1], lw=1, label="the claims' simultaneous intervals")
            axes.plot([], [], "D", color=COLOURS[2], mfc="w", ls="", label="claimed")
        axes.axvline(0, color="0.6", lw=1, zorder=0)
        axes.set_xlabel(f"top-1 of the last epoch minus that of {study.baseline}, points")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def accuracy(study: Study, runs: pd.DataFrame, findings: Findings, student: str) -> Figure:
    """Top-1 of the last epoch by arm: each run, mean and 95 % t interval."""
    arms = [arm for arm in findings.arms if arm.student == student]
    with matplotlib.rc_context(STYLE):
        names = [(student, arm.arm, str(arm.top1.n)) for arm in arms]
        figure, axes = _rows_of_arms(names, "mean, 95 % t interval of its own")
        for place, arm in enumerate(arms):
            mine = (runs["student"] == student) & (runs["arm"] == arm.arm)
            _row(axes, place, runs.loc[mine, "top1"].to_numpy(), arm.top1)
        said = "; t intervals are not limited to 0 to 100" if beyond(arms) else ""
        axes.set_xlabel(f"test top-1 of the last epoch, %{said}")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def by_epoch(
    study: Study,
    records: dict[str, dict[str, Any]],
    student: str,
    key: str,
    label: str,
    most: float = np.inf,
) -> Figure | None:
    """A metric by epoch, each arm's mean over seeds: the whole run, and its last quarter larger.

    Args:
        most: what the metric cannot exceed; the least is 0. The bands of mean ± sd end there.
    """
    curves = _curves(study, records, student, key)
    if not curves:
        return None
    last = max(epochs[-1] for epochs, _ in curves.values())
    first = last - last // 4
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH + 2, 5.0), layout="constrained")
        whole, late = figure.subplots(1, 2)
        ends = []
        for arm, (epochs, series) in curves.items():
            mean, end = series.mean(0), epochs >= first
            style = _style(study.arms.index(arm))
            marker = "." if end.sum() < 3 else ""
            whole.plot(epochs, mean, lw=2, marker=marker, **style)
            late.plot(epochs[end], mean[end], lw=2, marker=marker, **style)
            if len(series) > 1:
                sd = series.std(0, ddof=1)
                low, high = (mean - sd).clip(0, most), (mean + sd).clip(0, most)
                whole.fill_between(epochs, low, high, color=style["color"], alpha=0.12, lw=0)
            ends.append((f"{arm} (n = {len(series)})", epochs[-1], mean[-1], style["color"]))
        whole.set_ylim(bottom=0)
        whole.set_title("mean ± sd", fontsize=12)
        whole.set_ylabel(label)
        start = f"{late.get_ylim()[0]:.4g}"
        late.set_title(f"means from epoch {first} on; this axis starts at {start}", fontsize=12)
        for axes in (whole, late):
            _epochs(axes)
        _name_ends(late, ends)
    return figure


def schedule(
    study: Study, records: dict[str, dict[str, Any]], student: str, key: str, quantity: str
) -> Figure | None:
    """What is constant within an epoch, as it was in each; arms with the same share a line."""
    arms: dict[tuple[float, ...], list[str]] = {}
    for arm, (_, series) in _curves(study, records, student, key).items():
        arms.setdefault(tuple(series[0]), []).append(arm)
    if not arms:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for values, names in arms.items():
            edges = np.arange(len(values) + 1) + 0.5
            label = textwrap.fill(", ".join(names), 80)
            axes.stairs(
                values,
                edges,
                baseline=None,
                lw=2,
                clip_on=False,
                label=label,
                **_style(study.arms.index(names[0])),
            )
        axes.set_ylim(0, 1.05 * max(map(max, arms)) or 1)
        axes.set_ylabel(quantity)
        axes.margins(x=0)
        _epochs(axes)
        figure.legend(loc="outside upper center", frameon=False, fontsize=11)
    return figure


def by_run(runs: Mapping[str, Epochs], keys: Mapping[str, str], *, steps: bool) -> Figure | None:
    """What single runs had in each epoch, a panel for each figure that one of them has.

    Args:
        runs: by their names.
        keys: the figures, and what their axes are called.
        steps: they are constant within an epoch.
    """
    shown = [key for key in keys if any(key in epoch for run in runs.values() for epoch in run)]
    if not shown:
        return None
    rows, columns = -(-len(shown) // 2), min(2, len(shown))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH + 2, 0.6 + 3.4 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, key in zip(panels, shown, strict=False):
            for number, (name, epochs) in enumerate(runs.items()):
                found = {epoch["epoch"]: epoch[key] for epoch in epochs if key in epoch}
                look = _style(number) | {"drawstyle": "steps-mid" if steps else "default"}
                look["marker"] = "." if len(found) < 3 else ""
                axes.plot(list(found), list(found.values()), lw=2, label=name, **look)
            axes.set_ylabel(keys[key])
            _epochs(axes)
            if key == "lr":
                axes.set_yscale("log")
            elif axes.dataLim.y0 >= 0:
                axes.set_ylim(bottom=0)
        for axes in panels[len(shown) :]:
            axes.remove()
        if len(runs) > 1:
            lines, names = panels[0].get_legend_handles_labels()
            figure.legend(
                lines, names, loc="outside upper center", ncols=2, frameon=False, fontsize=11
            )
    return figure


def dat_groups(runs: Sequence[Epochs]) -> Figure | None:
    """The mean KL of the samples whose temperature DAT raised, lowered and left, by epoch.

    Args:
        runs: equally long; of several it is the mean.
    """
    names = ("dat_raised_kl", "dat_lowered_kl", "dat_kl", "dat_raised", "dat_lowered")
    needed = (*names, "dat_images")
    epochs = [run for run in runs if run and all(run[-1].get(name) for name in needed)]
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
        _epochs(axes)
        axes.set_ylabel("KL(teacher ‖ student), nats")
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """How many images of each label (rows) are taken for each class (columns), as shares of the
    label's.

    Args:
        names: of the classes; of more than 30 they are left out.
    """
    found = np.asarray(counts, float)
    shares = 100 * found / np.maximum(found.sum(1, keepdims=True), 1)
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(WIDTH, WIDTH - 1), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(image, label="% of the label's images")
        if len(names) <= 30:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="taken for", ylabel="label")
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
            axes[3].sharey(axes[2])
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


def _rows_of_arms(arms: list[tuple[str, str, str]], label: str) -> tuple[Figure, Axes]:
    """A figure with a row for each (student, arm, n); the label is that of their intervals."""
    figure = Figure(figsize=(WIDTH, 1.5 + 0.5 * len(arms)), layout="constrained")
    axes = figure.add_subplot()
    several = len({student for student, _, _ in arms}) > 1
    names = [f"{f'{student}: ' if several else ''}{arm} (n = {n})" for student, arm, n in arms]
    axes.set_yticks(range(len(arms)), names)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.plot([], [], "o-", color=COLOURS[1], lw=2.5, label=label)
    axes.plot([], [], "o", color="0.6", ms=4, label="one seed")
    return figure, axes


def _row(axes: Axes, place: int, values: Any, found: Summary | Difference | None) -> None:
    """The values of the seeds, a little below their mean and its interval."""
    assert found is not None
    axes.plot(values, [place + 0.25] * len(values), "o", color="0.6", ms=4, mew=0, alpha=0.8)
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [place] * 2, color=COLOURS[1], lw=2.5)
    axes.plot(found.mean, place, "o", color=COLOURS[1], ms=8)


def _curves(
    study: Study, records: dict[str, dict[str, Any]], student: str, key: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Arm -> a metric of its runs that have it: the epochs, (E,), and its values, (runs, E)."""
    found: dict[str, list[pd.Series]] = {arm: [] for arm in study.arms}
    for job in study.jobs:
        if job.student == student and job.name in records:
            values = {e["epoch"]: e[key] for e in records[job.name]["epochs"] if key in e}
            if values:
                found[job.arm].append(pd.Series(values))
    frames = {arm: pd.concat(runs, axis=1).dropna() for arm, runs in found.items() if runs}
    return {arm: (frame.index.to_numpy(), frame.to_numpy().T) for arm, frame in frames.items()}


def _style(number: int) -> dict[str, Any]:
    line = LINES[(number // 2 + number // len(COLOURS)) % len(LINES)]
    return {"color": COLOURS[number % len(COLOURS)], "ls": line}


def _epochs(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _name_ends(axes: Axes, ends: list[tuple[str, float, float, str]]) -> None:
    """Name lines at their ends, (name, x, y, colour), below each other where they end close."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    axes.set(xlim=(left, right), ylim=(low, high))
    ends = sorted(ends, key=lambda end: end[2])
    gap = (high - low) * min(0.07, 1 / len(ends))
    places: list[float] = []
    for _, _, y, _ in ends:
        places.append(max(y, places[-1] + gap) if places else y)
    for back in range(len(places)):
        places[-1 - back] = min(places[-1 - back], high - back * gap)
    beside = right + 0.05 * (right - left)
    for (name, x, y, colour), place in zip(ends, places, strict=True):
        axes.plot([x, beside], [y, place], color=colour, lw=1, clip_on=False)
        axes.text(beside, place, f" {name}", va="center", fontsize=11)
