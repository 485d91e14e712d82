"""What the seeds of a study allow to say. Differences are paired."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ..errors import counted

CONFIDENCE = 0.95
ALPHA = 0.05
RESAMPLES = 9999
EXACT = 16  # pairs up to which every sign pattern is counted
SIMULATED = 2000  # studies, for the power up to EXACT pairs
MOST_PAIRS = 1000  # more are not looked for
AT_ONCE = 2**18  # numbers in memory


class Summary(NamedTuple):
    """Of one arm: n, mean, sd (None below 2 values), and the t interval of the mean."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """Of paired values; what needs 2 pairs is None below.

    Attributes:
        higher: pairs whose difference is above 0.
        low, high: the interval of the sign-flip test; None where it is unbounded.
        p: of that test.
        sd: of the differences.
        unpaired_sd: what it were without correlation, the root of both sides' summed variances.
        correlation: of the two sides; None also of 2 pairs, whose correlation is always 1 or -1,
            and where one side is constant.
        t_low, t_high: the 95 % t interval.
    """

    n: int
    mean: float
    median: float
    higher: int
    low: float | None
    high: float | None
    p: float
    sd: float | None = None
    unpaired_sd: float | None = None
    correlation: float | None = None
    t_low: float | None = None
    t_high: float | None = None


def summarise(values: Sequence[float]) -> Summary:
    """Mean and 95 % t interval.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("no values")
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Summary(n, mean, None, None, None)
    sd = _sd(values)
    return Summary(n, mean, sd, *t_interval(n, mean, sd))


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], alpha: float = ALPHA
) -> Difference:
    """values - baseline, pair by pair.

    Args:
        alpha: level of the test whose interval it has.

    Raises:
        ValueError: the two are not of one length, or empty.
    """
    if len(values) != len(baseline) or not len(values):
        raise ValueError(f"{len(values)} values cannot be paired with {len(baseline)}")
    # What rounding leaves of equal differences is no spread.
    differences = np.round(np.subtract(values, baseline), 9)
    n, mean = len(differences), float(differences.mean())
    low, high = map(float, sign_flip_interval(differences, alpha))
    bounded = math.isfinite(low)
    found = Difference(
        n,
        mean,
        float(np.median(differences)),
        int((differences > 0).sum()),
        low if bounded else None,
        high if bounded else None,
        float(sign_flip_p(differences)),
    )
    if n < 2:
        return found
    sd, sds = _sd(differences), (_sd(values), _sd(baseline))
    told = n > 2 and min(sds) > 0
    t_low, t_high = t_interval(n, mean, sd)
    return found._replace(
        sd=sd,
        unpaired_sd=math.hypot(*sds),
        correlation=float(np.corrcoef(values, baseline)[0, 1]) if told else None,
        t_low=t_low,
        t_high=t_high,
    )


def t_interval(n: int, mean: float, sd: float) -> tuple[float, float]:
    """The 95 % t interval of a mean of n values."""
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return mean - half, mean + half


def sign_flip_p(differences: ArrayLike) -> np.ndarray:
    """Two-sided p of the mean difference among the patterns of signs: (..., n) -> (...).

    Among all 2^n up to EXACT pairs; from there on among the one found and RESAMPLES random ones,
    the same in every call.
    """
    values = np.asarray(differences, dtype=float)
    signs, found = _signs(values.shape[-1]), []
    for part in _parts(values, signs):
        # Patterns with the same sum, which rounding sets apart, are as extreme.
        least = np.abs(part.sum(1)) - 1e-9 * np.abs(part).sum(1)
        found.append((np.abs(part @ signs.T) >= least[:, None]).mean(1))
    return np.concatenate(found).reshape(values.shape[:-1])


def sign_flip_interval(
    differences: ArrayLike, alpha: float = ALPHA
) -> tuple[np.ndarray, np.ndarray]:
    """All shifts of which `sign_flip_p(differences - shift)` is above alpha: (..., n) -> 2 (...).

    A pattern is as extreme as the one found for the shifts between two means, that of the
    differences whose sign it flips and that of the others; where it flips none or all, for every
    shift. So the ends are order statistics of these means. They are -inf and inf where so few pairs
    cannot be significant at alpha.

    References:
        Hartigan (1969): Using subsample values as typical values. JASA 64, 1303-1317.
    """
    values = np.asarray(differences, dtype=float)
    signs, found = _signs(values.shape[-1]), []
    flipped = signs < 0
    size = flipped.sum(1)
    trivial = (size == 0) | (size == values.shape[-1])
    rank = math.floor(alpha * len(signs) + 1e-9)
    for part in _parts(values, signs):
        one = part @ flipped.T / np.maximum(size, 1)
        other = part @ ~flipped.T / np.maximum(values.shape[-1] - size, 1)
        low = np.where(trivial, -np.inf, np.minimum(one, other))
        high = np.where(trivial, np.inf, np.maximum(one, other))
        ends = np.partition(low, rank)[:, rank], np.partition(high, ~rank)[:, ~rank]
        found.append(np.round(ends, 9))  # as in the test, what rounding sets apart is equal
    low, high = np.concatenate(found, axis=1)
    return low.reshape(values.shape[:-1]), high.reshape(values.shape[:-1])


def smallest_p(pairs: int, claims: int = 1) -> float:
    """The least corrected p that a sign-flip test of so many pairs can reach."""
    return min(1.0, claims * 2.0 ** (1 - pairs))


def pairs_needed(claims: int, alpha: float = ALPHA) -> int:
    """The fewest pairs with which the largest of `claims` effects can be significant at all."""
    return next(n for n in range(1, 100) if smallest_p(n, claims) <= alpha)


def too_few(pairs: int, claims: int) -> str:
    """Why so many pairs can show none of the claims, or ""."""
    if smallest_p(pairs, claims) <= ALPHA:
        return ""
    return (
        f"{counted(pairs, 'pair')} cannot reach significance whatever happens: p is at least "
        f"{smallest_p(pairs):.3g}, and {smallest_p(pairs, claims):.3g} corrected for "
        f"{counted(claims, 'claim')}; {pairs_needed(claims)} pairs can"
    )


@cache  # half of a report's time
def power(difference: float, sd: float, pairs: int, claims: int = 1) -> float:
    """The probability that `sign_flip_p` finds a difference: p <= ALPHA / claims.

    With too few pairs it is 0. For normal differences: by a seeded simulation of the test up to
    EXACT pairs, of standard error 0.01; above them by the noncentral t distribution, which the
    test's power is within 0.01 of.

    Args:
        difference: in the units of `sd`.
        sd: standard deviation of the paired differences, positive.
    """
    if pairs > EXACT:
        critical = stats.t.ppf(1 - ALPHA / (2 * claims), pairs - 1)
        shift = min(difference / sd * math.sqrt(pairs), 50.0)  # farther out scipy gives NaN
        return float(stats.nct.sf(critical, pairs - 1, shift))
    noise = np.random.default_rng(0).normal(size=(SIMULATED, EXACT))[:, :pairs]
    return float(np.mean(sign_flip_p(difference + sd * noise) * claims <= ALPHA))


def pairs_to_see(difference: float, sd: float, claims: int = 1, wanted: float = 0.8) -> int | None:
    """The fewest pairs with which `power` is as wanted; None above MOST_PAIRS."""
    counts = range(pairs_needed(claims), MOST_PAIRS + 1)
    place = bisect_left(counts, wanted, key=lambda n: power(difference, sd, n, claims))
    return counts[place] if place < len(counts) else None


def _sd(values: Sequence[float] | np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if np.ptp(values) > 0 else 0.0


def _parts(values: np.ndarray, signs: np.ndarray) -> list[np.ndarray]:
    """Rows of differences, as many at a time as memory has room for with all their patterns."""
    rows = values.reshape(-1, values.shape[-1])
    return np.array_split(rows, -(-len(rows) * len(signs) // AT_ONCE))


def _signs(n: int) -> np.ndarray:
    """Patterns (N, n) of -1 and 1; the first is all 1."""
    if n > EXACT:
        drawn = np.random.default_rng(0).integers(2, size=(RESAMPLES, n))
        return np.vstack([np.ones(n), 1.0 - 2.0 * drawn])
    # A pattern and its opposite are as extreme: the last sign stays.
    return 1.0 - 2.0 * (np.arange(2 ** (n - 1))[:, None] >> np.arange(n) & 1)
