"""The tables of a report, as people read them: every cell is text."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, NamedTuple

import pandas as pd

from ..config import PLACES
from ..engine.environment import CONDITIONS
from ..engine.folder import plain
from ..errors import counted
from ..settings import leaves
from .analysis import Arm, Findings, beyond
from .plan import Study
from .statistics import ALPHA, BCA_PAIRS, EXACT, MOST_PAIRS, RESAMPLES, Difference

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
        _accuracy(findings),
        _claims(study, findings),
        _power(findings),
        _differences(
            f"Differences to {study.baseline}",
            "Points of top-1, paired by seed, with their 95 % t intervals, each for itself and not "
            "corrected for their number. BCa intervals, which truly cover 85 % at "
            f"{BCA_PAIRS} pairs and 90 % at 10, stand beside them from {BCA_PAIRS} pairs on. The "
            "sd if unpaired is that of the same runs without their correlation: how much larger "
            "it is than the sd, is what pairing by seed gains.",
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
    """What each arm's config says: the baseline's whole, of the others what differs from it."""
    rows = []
    configs = {(job.student, job.arm): _settings(plain(job.cfg)) for job in study.jobs}
    for arm in findings.arms:
        own, base = configs[arm.student, arm.arm], configs[arm.student, study.baseline]
        apart = own if arm.arm == study.baseline else dict(own.items() - base.items())
        text = ", ".join(f"{key} {own[key]}" for key in own if key in apart)
        rows.append({"student": arm.student, "arm": arm.arm, "settings": text})
    note = (
        f"{study.baseline} in full, of the other arms what differs from it. Keys without a section "
        f"are those of the method's own."
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
            "gap": _signed(arm.best - arm.top1.mean),
        }
        for arm in findings.arms
    ]
    note = (
        "Top-1 is that of the last epoch, which selects nothing. The 95 % t intervals are each "
        "arm's own, not corrected for their number"
    )
    note += "; a t interval is not limited to 0 to 100 %." if beyond(findings.arms) else "."
    return Section("Accuracy", note, pd.DataFrame(rows))


def _claims(study: Study, findings: Findings) -> Section:
    rows = [
        {
            "student": claim.student,
            "arm": claim.arm,
            "claimed": _signed(claim.claimed),
            "found": _signed(claim.found.mean),
            "simultaneous 95 % interval": _interval(claim.low, claim.high),
            "p": _p(claim.found.p),
            "Holm p": _p(claim.corrected_p),
            "pairs": str(claim.found.n),
            "conclusion": claim.verdict,
        }
        for claim in findings.claims
    ]
    note = (
        f"Points over {study.baseline}, paired by seed. The p values are those of "
        f"{of_test(findings)}; Holm's are corrected for the {counted(findings.family, 'claim')} "
        f"of the study file. The intervals are simultaneous, too: t intervals widened by "
        f"Bonferroni, so that all {findings.family} hold together with 95 %."
    )
    return Section("Claims", note, pd.DataFrame(rows))


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
        f"The probability that the test of the claims finds a true difference, at the hardest of "
        f"Holm's steps (p of at most {ALPHA} / {findings.family}), for normal differences. Their "
        f"sd is pooled over the claimed arms, and known no better than so many pairs allow; the "
        f"pairs are the fewest that a claimed arm has."
    )
    return Section("What the test can see", note, pd.DataFrame(rows))


def _differences(
    heading: str, note: str, arms: list[Arm], of: Callable[[Arm], Difference | None]
) -> Section:
    rows = [
        {
            **_name(arm),
            "pairs": str(found.n),
            "points": _signed(found.mean),
            "95 % t interval": _interval(found.low, found.high),
            "BCa interval": _interval(found.bca_low, found.bca_high),
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


def _settings(config: dict[str, Any]) -> dict[str, str]:
    """Key -> value as text; without places and seed, and without the name of the method's node."""
    node = f"{config['DISTILLER']['TYPE']}."
    return {
        key.removeprefix(node): str(value) or "''"
        for key, value in leaves(config)
        if not key.startswith(PLACES) and key != "SOLVER.SEED"
    }


def _name(arm: Arm) -> dict[str, str]:
    return {"student": arm.student, "arm": arm.arm}


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.00


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{_number(low, 2)}, {_number(high, 2)}]"


def _p(value: float | None) -> str:
    return "<0.0001" if value is not None and value < 1e-4 else _number(value, 4)
