"""From a table of runs to what can, and what cannot, be concluded."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..errors import counted
from .plan import Study
from .records import FIGURES
from .statistics import (
    ALPHA,
    Difference,
    Summary,
    paired_difference,
    pairs_to_see,
    power,
    summarise,
    too_few,
)

TO_SEE = (0.15, 0.3, 0.5)  # points


@dataclass(frozen=True)
class Arm:
    """One arm of one student: top-1 in percent, differences in points.

    Attributes:
        top1: of the last epoch, which selects nothing.
        best: mean of the best epoch's top-1, selected on the test set.
        means: of the other figures, as `records.table` has them.
        together: the most runs that one process trained at once; above 1, seconds are a group's.
        to_baseline, to_alone: paired by seed; None for the arm itself, or without common seeds.
        to_baseline_one_processor: of the pairs whose runs were made on one kind of processor; None
            also where there is one kind only.
    """

    student: str
    arm: str
    top1: Summary
    best: float
    means: dict[str, float]
    together: int
    to_baseline: Difference | None
    to_alone: Difference | None
    to_baseline_one_processor: Difference | None


@dataclass(frozen=True)
class Claim:
    """A claimed difference to the baseline, in points, and what the runs say of it.

    Attributes:
        low, high: the simultaneous interval: all shifts that the sign-flip test does not reject at
            the level of each claim, ALPHA / family; None where it is unbounded. The verdict is
            better or worse where it excludes 0, and only there.
        corrected_p: by Bonferroni.
        beside: what a reader of the verdict must know of the seeds.
    """

    student: str
    arm: str
    claimed: float
    found: Difference
    low: float | None
    high: float | None
    corrected_p: float
    verdict: str
    beside: str


@dataclass(frozen=True)
class Power:
    """What the test of the claims can see of a difference.

    Attributes:
        sd: of a paired difference, pooled over the claimed arms that vary; 0 where none does.
        pairs: the fewest that a claimed arm has.
        power: with these; None where sd is 0.
        seeds: that give a power of 80 %; None where sd is 0, or no MOST_PAIRS do.
    """

    student: str
    sd: float
    pairs: int
    difference: float
    power: float | None
    seeds: int | None


@dataclass(frozen=True)
class Cell:
    """One cell of a grid.

    Attributes:
        grid, arm: the arm that has the grid, and the cell's own name.
        settings: what the cell has of the grid.
        top1: of the held-out images, in percent, over the seeds that all its cells with runs have.
    """

    student: str
    grid: str
    arm: str
    settings: dict[str, Any]
    top1: Summary


@dataclass(frozen=True)
class Findings:
    """Everything that a report says.

    Attributes:
        cells: of each student and grid, the best one first.
        family: the number of claims in the study file.
    """

    arms: list[Arm]
    cells: list[Cell]
    family: int
    claims: list[Claim]
    power: list[Power]
    warnings: list[str]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self, dict_factory=_plain)


def analyse(study: Study, runs: pd.DataFrame) -> Findings:
    """Summaries of all arms, paired differences, and the family of claims, tested together."""
    # Of a run that was continued on another kind it is None.
    of_one_kind = runs.dropna(subset="device_name")
    several = len(of_one_kind) < len(runs) or runs["device_name"].nunique() > 1
    arms = []
    for student in study.students:
        for arm in study.arms:
            rows = _rows(runs, student, arm)
            if rows.empty:
                continue
            means = rows[FIGURES].astype(float).mean().dropna()
            same = _paired(of_one_kind, student, arm, study.baseline, "device_name")
            arms.append(
                Arm(
                    student,
                    arm,
                    summarise(rows["top1"].to_numpy()),
                    float(rows["best"].mean()),
                    means.to_dict(),
                    int(rows["together"].max()),
                    _paired(runs, student, arm, study.baseline),
                    _paired(runs, student, arm, study.alone),
                    same if several else None,
                )
            )
    family = sum(len(claims) for claims in study.claims.values())
    claims, warnings = _claims(study, runs, family)
    cells, without = _cells(study, runs)
    seen = _power(study, claims, family)
    return Findings(arms, cells, family, claims, seen, warnings + without)


def pairs(
    runs: pd.DataFrame, student: str, arm: str, other: str, *also: str
) -> tuple[list[float], list[float]]:
    """The top-1 of two arms, seed by seed; `also` names columns in which a pair must agree."""
    rows = [_rows(runs, student, name) for name in (arm, other)]
    both = rows[0].merge(rows[1], on=["seed", *also])
    return both["top1_x"].tolist(), both["top1_y"].tolist()


def beyond(arms: list[Arm]) -> bool:
    """Whether a t interval of an accuracy leaves 0 to 100 %."""
    ends = [end for arm in arms for end in (arm.top1.low, arm.top1.high) if end is not None]
    return bool(ends) and not 0 <= min(ends) <= max(ends) <= 100


def signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # no -0.00


def interval(low: float | None, high: float | None) -> str:
    """As text, to two digits; to more where an end would be shown as the 0 that it is not."""
    if low is None or high is None:
        return "unbounded"
    return f"[{_end(low)}, {_end(high)}]"


def _end(value: float) -> str:
    value += math.copysign(1e-9, value)  # the mean of a few is often half of a last digit
    texts = (f"{round(value, digits) + 0.0:.{digits}f}" for digits in range(2, 9))
    return next((text for text in texts if float(text)), "0.00")


def _cells(study: Study, runs: pd.DataFrame) -> tuple[list[Cell], list[str]]:
    found, warnings = [], []
    for student in study.students:
        for grid, cells in study.grids.items():
            top1 = {arm: _rows(runs, student, arm).set_index("seed")["top1"] for arm in cells}
            if without := [arm for arm in cells if top1[arm].empty]:
                names = ", ".join(without)
                warnings.append(f"{student}: the grid of {grid} lacks {names}: no finished run")
            there = [arm for arm in cells if arm not in without]
            seeds = sorted(set.intersection(*(set(top1[arm].index) for arm in there or cells)))
            ranked = [
                Cell(student, grid, arm, cells[arm], summarise(top1[arm][seeds].to_numpy()))
                for arm in (there if seeds else ())
            ]
            if there and not seeds:
                warnings.append(f"{student}: no seed has all other cells of the grid of {grid}")
            found += sorted(ranked, key=lambda cell: -cell.top1.mean)
    return found, warnings


def _claims(study: Study, runs: pd.DataFrame, family: int) -> tuple[list[Claim], list[str]]:
    found, warnings = [], []
    few: dict[int, list[str]] = {}
    for student, claims in study.claims.items():
        for arm, claimed in claims.items():
            both = pairs(runs, student, arm, study.baseline)
            if arm == study.baseline or not both[0]:
                warnings.append(f"{student}, {arm}: no seed has both it and {study.baseline}")
                continue
            claim = _claim(student, arm, claimed, study.baseline, both, family)
            found.append(claim)
            if too_few(claim.found.n, family):
                few.setdefault(claim.found.n, []).append(f"{student}, {arm}")
    warnings += [f"{'; '.join(names)}: {too_few(n, family)}" for n, names in few.items()]
    return found, warnings


def _claim(
    student: str,
    arm: str,
    claimed: float,
    baseline: str,
    both: tuple[list[float], list[float]],
    family: int,
) -> Claim:
    found = paired_difference(*both)
    widened = paired_difference(*both, ALPHA / family)
    low, high, p = widened.low, widened.high, min(1.0, family * found.p)
    shown = 0
    if not found.sd:
        same = "one pair" if found.n == 1 else f"every pair gives {signed(found.mean)}"
        low = high = None
        verdict = f"{same}: nothing can be concluded"
    elif low is None or high is None:
        few = f"{counted(found.n, 'pair')} can show no difference to {baseline}"
        verdict = f"{few}: the interval is unbounded"
    else:
        shown = (low > 0) - (high < 0)
        result = {1: "better than {}", 0: "no difference to {} shown", -1: "worse than {}"}[shown]
        zero, there = ("contains" if low <= v <= high else "excludes" for v in (0, claimed))
        verdict = (
            f"{result.format(baseline)} (corrected p = {p:.3g}): the interval "
            f"{interval(low, high)} {zero} 0 and {'' if there == zero else f'{there} '}the claimed "
            f"{signed(claimed)}"
        )
    beside = _beside(found, baseline, both, shown)
    return Claim(student, arm, claimed, found, low, high, p, verdict, beside)


def _beside(
    found: Difference, baseline: str, both: tuple[list[float], list[float]], shown: int
) -> str:
    """How the seeds differ; where a difference is shown and few of them carry it, which."""
    text = f"Higher in {found.higher} of {counted(found.n, 'seed')}, median {signed(found.median)}"
    if shown:
        largest = np.sort(shown * np.subtract(*both))[::-1]
        few = int((largest.cumsum() > largest.sum() / 2).argmax()) + 1
        if few <= found.n / 4:
            values = ", ".join(signed(shown * value) for value in largest[:few])
            text += f"; {counted(few, 'seed')} ({values}) carry more than half of the mean"
    if found.n > 1:
        own, other = (float(np.std(side, ddof=1)) for side in both)
        text += f"; sd over seeds {own:.2f}, of {baseline} {other:.2f}"
    return f"{text}."


def _power(study: Study, claims: list[Claim], family: int) -> list[Power]:
    found = []
    for student in study.students:
        differences = [claim.found for claim in claims if claim.student == student]
        if not any(d.sd is not None for d in differences):
            continue
        # An arm that is its baseline, bit for bit, says nothing of how others vary.
        spread = [(d.n - 1, d.sd) for d in differences if d.sd]
        freedom = sum(df for df, _ in spread)
        sd = math.sqrt(sum(df * sd**2 for df, sd in spread) / freedom) if spread else 0.0
        n = min(d.n for d in differences)
        for points in TO_SEE:
            seen = (power(points, sd, n, family), pairs_to_see(points, sd, family)) if sd else ()
            found.append(Power(student, sd, n, points, *(seen or (None, None))))
    return found


def _paired(
    runs: pd.DataFrame, student: str, arm: str, other: str, *also: str
) -> Difference | None:
    values, baseline = pairs(runs, student, arm, other, *also)
    return paired_difference(values, baseline) if values and arm != other else None


def _rows(runs: pd.DataFrame, student: str, arm: str) -> pd.DataFrame:
    return runs[(runs["student"] == student) & (runs["arm"] == arm)]


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return value._asdict() if isinstance(value, (Summary, Difference)) else value

    return {key: plain(value) for key, value in pairs}
