"""The tables of a report, as people read them: every cell is text."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, NamedTuple

import pandas as pd
from yacs.config import CfgNode

from ..config import PLACES, acts, get_cfg
from ..engine.environment import CONDITIONS
from ..errors import counted
from ..settings import leaves
from .analysis import Arm, Findings, beyond, interval, signed
from .plan import Study
from .statistics import ALPHA, EXACT, MOST_PAIRS, RESAMPLES, Difference

Records = dict[str, dict[str, Any]]
# Of an environment, what the report shows: conditions.csv has all of it.
SHOWN = (*CONDITIONS, "mdistiller_ext", "git_commit", "git_dirty", "threads", "together")
HASHES = {"code", "toolkit", "git_commit"}
DIGITS = 12  # of a hash


class Section(NamedTuple):
    """A table with its heading and what must be known to read it."""

    heading: str
    note: str
    frame: pd.DataFrame


def sections(study: Study, records: Records, findings: Findings) -> list[Section]:
    """All tables of a report that have rows, without columns in which nothing stands."""
    found = [
        *_grids(study, findings),
        _accuracy(findings),
        _claims(study, findings),
        _power(findings),
        _differences(
            f"Differences to {study.baseline}",
            "Points of top-1, paired by seed. The 95 % interval holds all shifts that the "
            "sign-flip test does not reject, not corrected for their number. Below 6 pairs it is "
            "unbounded; there the t interval, which assumes normal differences, is all there is. "
            "The sd if unpaired is that of the same runs without their correlation: how much "
            "larger it is than the sd, is what pairing by seed gains.",
            findings.arms,
            lambda arm: arm.to_baseline,
        ),
        _differences(
            f"Differences to {study.baseline}, each pair on one kind of processor",
            "The same without the pairs whose two runs were made on different kinds of processor.",
            findings.arms,
            lambda arm: arm.to_baseline_one_processor,
        ),
        _differences(
            f"Differences to {study.alone}",
            f"As those to {study.baseline}.",
            findings.arms,
            lambda arm: arm.to_alone,
        ),
        _others(findings),
        settings(study, findings),
        _conditions(study, records),
    ]
    return [
        Section(heading, note, frame.loc[:, (frame != "").any()])
        for heading, note, frame in found
        if len(frame)
    ]


def settings(study: Study, findings: Findings) -> Section:
    """What all arms of a student set that is not the default, and what differs between them."""
    rows: list[dict[str, str]] = []

    def add(student: str, arm: str, items: Iterable[tuple[str, str]]) -> None:
        text = ", ".join(" ".join(item) for item in items)
        rows.append({"student": student, "arm": arm, "settings": text})

    for student in dict.fromkeys(arm.student for arm in findings.arms):
        names = [arm.arm for arm in findings.arms if arm.student == student]
        cfgs = {job.arm: job.cfg for job in study.jobs if job.student == student}
        found = {arm: _settings(cfgs[arm], cfgs[arm]).items() for arm in names}
        first = study.baseline if study.baseline in names else names[0]
        same = set.intersection(*map(set, found.values()))
        usual = _settings(get_cfg(), cfgs[first]).items()
        add(student, "all arms", (item for item in found[first] if item in same - usual))
        for arm, own in found.items():
            known = same if arm == first else found[first]
            add(student, arm, (item for item in own if item not in known))
    note = (
        f"Of all arms what they have in common and is not the default; of {first} what differs in "
        f"another arm, of the other arms what differs from it. Keys without a section are those of "
        f"the method's own."
    )
    return Section("What each arm set", note, pd.DataFrame(rows))


def condensed(study: Study, left_out: list[str]) -> list[str]:
    """Of the lines for runs that have not run, one for each arm of a student."""
    missing = {f"{job.name}: has not run": job for job in study.jobs}
    lines = [line for line in left_out if line not in missing]
    jobs = sorted(
        (missing[line] for line in left_out if line in missing),
        key=lambda job: (study.students.index(job.student), study.arms.index(job.arm), job.seed),
    )
    for (student, arm), group in groupby(jobs, lambda job: (job.student, job.arm)):
        seeds = [job.seed for job in group]
        lines.append(f"{student}, {arm}: {counted(len(seeds), 'run')} to go, seed {spans(seeds)}")
    return lines


def spans(numbers: Iterable[int]) -> str:
    """ "0 to 3, 5" of 0, 1, 2, 3, 5."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(
        f"{span[0]} to {span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in found
    )


def of_test(findings: Findings) -> str:
    """What the p values are of."""
    pairs = [claim.found.n for claim in findings.claims]
    many, few = any(n > EXACT for n in pairs), any(n <= EXACT for n in pairs)
    exact = "exact" + (f" up to {EXACT} pairs" if many else "")
    drawn = f"of {RESAMPLES:,} random sign patterns" + (" above" if few else "")
    return f"the sign-flip test, two-sided, {' and '.join([exact] * few + [drawn] * many)}"


def _accuracy(findings: Findings) -> Section:
    rows = [
        {
            **_name(arm),
            "n": str(arm.top1.n),
            "top-1 (%)": _number(arm.top1.mean, 2),
            "sd": _number(arm.top1.sd, 2),
            "95 % t interval": _interval(arm.top1.low, arm.top1.high),
            "best epoch (test-selected)": _number(arm.best, 2),
            "gap": signed(arm.best - arm.top1.mean),
        }
        for arm in findings.arms
    ]
    note = (
        "Top-1 is that of the last epoch, which selects nothing. The 95 % t intervals are each "
        "arm's own, not corrected for their number"
    )
    note += "; a t interval is not limited to 0 to 100 %." if beyond(findings.arms) else "."
    return Section("Accuracy", note, pd.DataFrame(rows))


def _grids(study: Study, findings: Findings) -> list[Section]:
    """A table for each grid, the best cell of a student first."""
    return [
        Section(
            f"Grid of {grid}",
            "Top-1 of the last epoch on the held-out images, over the seeds that all these cells "
            "have. It chooses a cell, and is too high to say how good that one is.",
            pd.DataFrame(
                {
                    "student": cell.student,
                    **{key: str(value) for key, value in cell.settings.items()},
                    "n": str(cell.top1.n),
                    "held-out top-1 (%)": _number(cell.top1.mean, 2),
                    "sd": _number(cell.top1.sd, 2),
                }
                for cell in findings.cells
                if cell.grid == grid
            ),
        )
        for grid in study.grids
    ]


def _claims(study: Study, findings: Findings) -> Section:
    family = findings.family
    level = "simultaneous 95 % interval" if family > 1 else "95 % interval"
    rows = [
        {
            "student": claim.student,
            "arm": claim.arm,
            "claimed": signed(claim.claimed),
            "found": signed(claim.found.mean),
            level: interval(claim.low, claim.high) if claim.found.sd != 0 else "",
            "p": _p(claim.found.p),
            "corrected p": _p(claim.corrected_p),
            "pairs": str(claim.found.n),
        }
        for claim in findings.claims
    ]
    note = (
        f"Points over {study.baseline}, paired by seed. p is that of {of_test(findings)}; the "
        f"interval holds all shifts that this test does not reject, so that it excludes 0 where a "
        f"difference is shown, and only there."
    )
    if family > 1:
        note += (
            f" Both are corrected by Bonferroni for the {family} claims of the study file: the "
            f"intervals cover together with 95 %."
        )
    return Section("Claims", note, pd.DataFrame(rows))


def methods(study: Study, findings: Findings) -> Section:
    """One row a method: top-1 of each student, and the difference to the baseline."""
    shown = {
        (claim.student, claim.arm)
        for claim in findings.claims
        if claim.low is not None and claim.high is not None and not claim.low <= 0 <= claim.high
    }
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for arm in findings.arms:
        spread = "" if arm.top1.sd is None else f"±{_number(arm.top1.sd, 2)}"
        mark = "*" if (arm.student, arm.arm) in shown else ""
        difference = f"{signed(arm.to_baseline.mean)}{mark}" if arm.to_baseline else ""
        rows[arm.arm] |= {
            "method": arm.arm,
            arm.student: f"{_number(arm.top1.mean, 2)}{spread}",
            f"{arm.student} diff.": difference,
        }
    sizes = {arm.top1.n for arm in findings.arms}
    runs = f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else f"{max(sizes)}"
    note = f"Top-1 of the last epoch in percent, mean ± sd of {runs} runs"
    if study.baseline:
        note += f", and points over {study.baseline}, paired by seed"
    if shown:
        note += f"; * a claimed difference that the test shows, corrected p at most {ALPHA}"
    frame = pd.DataFrame(rows.values()).fillna("")
    return Section("Methods", f"{note}.", frame.loc[:, (frame != "").any()])


def _power(findings: Findings) -> Section:
    rows = []
    for found in findings.power:
        unknown = "" if found.sd else "nothing can be said: the differences do not vary"
        rows.append(
            {
                "student": found.student,
                "difference (points)": f"{found.difference:g}",
                "sd of a difference": _number(found.sd, 2),
                "pairs": str(found.pairs),
                "power with these": unknown or f"{100 * (found.power or 0):.0f} %",
                "seeds for 80 %": "" if unknown else str(found.seeds or f"more than {MOST_PAIRS}"),
            }
        )
    note = (
        f"The probability that the test of the claims finds a true difference (corrected p of at "
        f"most {ALPHA}), for normal differences. Their sd is pooled over the claimed arms, and "
        f"known no better than so many pairs allow; the pairs are the fewest that a claimed arm "
        f"has."
    )
    return Section("What the test can see", note, pd.DataFrame(rows))


def _differences(
    heading: str, note: str, arms: list[Arm], of: Callable[[Arm], Difference | None]
) -> Section:
    rows = [
        {
            **_name(arm),
            "pairs": str(found.n),
            "points": signed(found.mean),
            "95 % interval": interval(found.low, found.high),
            "95 % t interval": _interval(found.t_low, found.t_high),
            "sd": _number(found.sd, 2),
            "sd if unpaired": _number(found.unpaired_sd, 2),
            "correlation": _number(found.correlation, 2),
        }
        for arm in arms
        if (found := of(arm))
    ]
    return Section(heading, note, pd.DataFrame(rows))


def _others(findings: Findings) -> Section:
    rows = [
        {
            **_name(arm),
            "agreement (%)": _number(arm.means.get("agreement"), 1),
            "KL (nats)": _number(arm.means.get("kl"), 3),
            "L2": _number(arm.means.get("l2"), 3),
            "NLL (nats)": _number(arm.means.get("nll"), 3),
            "ECE": _number(arm.means.get("ece"), 3),
            "seconds": _number(arm.means.get("seconds"), 0),
            "runs at once": str(arm.together),
        }
        for arm in findings.arms
    ]
    note = "Means over the runs at the last epoch; the seconds are those of a whole run"
    if any(arm.together > 1 for arm in findings.arms):
        note += (
            ", or, where a process trained several at once (up to so many), of the whole group: "
            "no run has seconds of its own there"
        )
    return Section("Closeness to the teacher, calibration, cost", f"{note}.", pd.DataFrame(rows))


def _conditions(study: Study, records: Records) -> Section:
    found: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)  # -> seed by run
    for job in study.jobs:
        for session in records[job.name]["environments"] if job.name in records else []:
            for key in SHOWN:
                if session.get(key) is not None:
                    value = str(session[key])[: DIGITS if key in HASHES else None]
                    found[key, value][job.name] = job.seed
    rows = [
        {"what": key, "value": value, "runs": str(len(seeds)), "seeds": spans(seeds.values())}
        for (key, value), seeds in sorted(found.items(), key=lambda item: SHOWN.index(item[0][0]))
    ]
    note = (
        f"On and with what the runs were made; of hashes the first {DIGITS} digits. A run that was "
        f"continued under another condition counts in both."
    )
    return Section("Conditions", note, pd.DataFrame(rows))


def _settings(cfg: CfgNode, of: CfgNode) -> dict[str, str]:
    """Key -> value as text of what acts in `of`; without places and seed, and without the name of
    the method's node."""
    return {
        key.removeprefix(f"{of.DISTILLER.TYPE}."): str(value) or "''"
        for key, value in leaves(json.loads(json.dumps(cfg)))
        if acts(key, of) and not key.startswith(PLACES) and key != "SOLVER.SEED"
    }


def _name(arm: Arm) -> dict[str, str]:
    return {"student": arm.student, "arm": arm.arm}


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.00


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None else interval(low, high)


def _p(value: float | None) -> str:
    return "<0.0001" if value is not None and value < 1e-4 else _number(value, 4)
