"""From a table of runs to what can, and what cannot, be concluded."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from .plan import Study
from .statistics import (
    ALPHA,
    Difference,
    Summary,
    holm,
    paired_difference,
    pairs_needed,
    seeds_to_see,
    smallest_p,
    summarise,
)

TO_SEE = (0.15, 0.3, 0.5)  # points


@dataclass(frozen=True)
class Arm:
    """One arm of one student: top-1 in percent, differences in points.

    Attributes:
        top1: of the last epoch, which selects nothing.
        best: mean of the best epoch's top-1, selected on the test set.
        means: of the other figures at the last epoch, and the seconds of a run.
        to_baseline, to_alone: paired by seed; None for the arm itself, or without common seeds.
    """

    student: str
    arm: str
    top1: Summary
    best: float
    means: dict[str, float]
    to_baseline: Difference | None
    to_alone: Difference | None


@dataclass(frozen=True)
class Claim:
    """A claimed difference to the baseline, in points, and what the runs say of it."""

    student: str
    arm: str
    claimed: float
    found: Difference
    corrected_p: float | None
    verdict: str


@dataclass(frozen=True)
class Findings:
    """Everything that a report says."""

    arms: list[Arm]
    claims: list[Claim]
    warnings: list[str]
    seeds_to_see: dict[str, dict[str, int]]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self, dict_factory=_plain)


def analyse(study: Study, runs: pd.DataFrame) -> Findings:
    """Summaries of all arms, paired differences, and the family of claims, corrected by Holm."""
    arms = []
    for student in study.students:
        for arm in study.arms:
            rows = _rows(runs, student, arm)
            if rows.empty:
                continue
            figures = rows.drop(columns=["student", "arm", "top1", "best"])
            arms.append(
                Arm(
                    student,
                    arm,
                    summarise(rows["top1"].to_numpy()),
                    float(rows["best"].mean()),
                    {k: float(v) for k, v in figures.mean().items() if not np.isnan(v)},
                    _paired(runs, student, arm, study.baseline),
                    _paired(runs, student, arm, study.alone),
                )
            )
    claims, warnings = _claims(study, runs)
    return Findings(arms, claims, warnings, _needed(study, arms))


def _claims(study: Study, runs: pd.DataFrame) -> tuple[list[Claim], list[str]]:
    family, warnings = [], []
    for student, claims in study.claims.items():
        for arm, points in claims.items():
            found = _paired(runs, student, arm, study.baseline)
            if found is None:
                warnings.append(f"{student}, {arm}: no seed has both it and {study.baseline}")
            else:
                family.append((student, arm, points, found))
    tested = [claim for claim in family if claim[3].p is not None]
    size = sum(len(claims) for claims in study.claims.values())
    # A claim without runs yet counts as one that failed: the family does not shrink.
    p_values = [claim[3].p or 0.0 for claim in tested] + [1.0] * (size - len(tested))
    corrected = dict(zip((claim[:2] for claim in tested), holm(p_values), strict=False))
    for student, arm, _, found in family:
        if smallest_p(found.n, size) > ALPHA:
            least, corrected_least = smallest_p(found.n), smallest_p(found.n, size)
            warnings.append(
                f"{student}, {arm}: {found.n} pairs cannot reach significance whatever happens: "
                f"p is at least {least:.3g}, and {corrected_least:.3g} corrected for {size} "
                f"claims; {pairs_needed(size)} pairs can"
            )
    return [
        Claim(*claim, p, _verdict(study, claim[2], claim[3], p))
        for claim in family
        for p in [corrected.get(claim[:2])]
    ], warnings


def _verdict(study: Study, claimed: float, found: Difference, p: float | None) -> str:
    if p is None or found.low is None or found.high is None:
        return "one pair: nothing can be concluded"
    if p <= ALPHA:
        result = f"{'better' if found.mean > 0 else 'worse'} than {study.baseline}"
    else:
        result = f"no difference to {study.baseline} shown"
    inside = "contains" if found.low <= claimed <= found.high else "excludes"
    return f"{result} (corrected p = {p:.3g}); the interval {inside} the claimed {claimed:+.2f}"


def _needed(study: Study, arms: list[Arm]) -> dict[str, dict[str, int]]:
    """For each student, the seeds that would show a difference of so many points."""
    found = {}
    for student in study.students:
        variances = [
            arm.to_baseline.sd**2
            for arm in arms
            if arm.student == student and arm.to_baseline and arm.to_baseline.sd is not None
        ]
        if variances:
            sd = float(np.sqrt(np.mean(variances)))
            found[student] = {f"{points:g}": seeds_to_see(points, sd) for points in TO_SEE}
    return found


def _paired(runs: pd.DataFrame, student: str, arm: str, other: str) -> Difference | None:
    if arm == other:
        return None
    both = _rows(runs, student, arm).merge(_rows(runs, student, other), on="seed")
    if both.empty:
        return None
    return paired_difference(both["top1_x"].to_numpy(), both["top1_y"].to_numpy())


def _rows(runs: pd.DataFrame, student: str, arm: str) -> pd.DataFrame:
    return runs[(runs["student"] == student) & (runs["arm"] == arm)]


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return value._asdict() if isinstance(value, (Summary, Difference)) else value

    return {key: plain(value) for key, value in pairs}
