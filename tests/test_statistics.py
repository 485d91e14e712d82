"""Known answers, and what the intervals and tests do in simulation."""

import math

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from mdistiller_ext.study.statistics import (
    ALPHA,
    paired_difference,
    pairs_needed,
    pairs_to_see,
    power,
    sign_flip_interval,
    sign_flip_p,
    smallest_p,
    summarise,
)

# Student's (1908) sleep data: hours gained by ten patients with two drugs. R's
# t.test(extra ~ group, paired = TRUE): t = -4.0621, p = 0.002833, interval -2.4598858 -0.7001142.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
# Darwin's plants, as in Fisher (1935, section 21): cross- minus self-fertilised, eighths of an
# inch. Of 2^15 sign patterns 1726 are as extreme.
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


def test_students_sleep_data():
    found = paired_difference(FIRST, SECOND)
    assert (found.n, found.mean) == (10, pytest.approx(-1.58))
    assert (found.t_low, found.t_high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-7)
    assert found.sd == pytest.approx(1.229995, abs=1e-6)
    one = summarise(SECOND)
    assert (one.mean, one.sd) == pytest.approx((2.33, 2.002249), abs=1e-6)
    assert (one.low, one.high) == pytest.approx((0.8976775, 3.7623225), abs=1e-7)


def test_fishers_exact_count_of_darwins_plants():
    assert sign_flip_p(DARWIN) == pytest.approx(1726 / 2**15, rel=1e-9)


def permutation_p(differences, resamples=np.inf, seed=1):
    """scipy's test, whose patterns are its own."""
    return stats.permutation_test(
        (np.asarray(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    ).pvalue


@pytest.mark.parametrize("n", [2, 5, 9])
def test_the_sign_flip_test_is_scipys(n):
    """Of values with ties too, which accuracies of a small test set have."""
    rng = np.random.default_rng(n)
    samples = np.vstack([rng.normal(0.3, 0.5, (6, n)), rng.integers(-3, 4, (6, n)) * 0.1])
    expected = [permutation_p(row) for row in samples]
    assert sign_flip_p(samples) == pytest.approx(expected, rel=1e-9)
    assert sign_flip_p(samples.reshape(3, 4, n)).shape == (3, 4)


def test_above_16_pairs_the_patterns_are_drawn():
    values = np.random.default_rng(0).normal(0.4, 1.0, 20)
    p = sign_flip_p(values)
    assert p == pytest.approx(permutation_p(values, 200_000), abs=0.01) and p == sign_flip_p(values)
    assert sign_flip_p(np.full(20, 0.1)) == 1 / 10_000  # never 0
    assert sign_flip_p(DARWIN + DARWIN[:2]) * 10_000 % 1 == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 8, 11, 18])
@pytest.mark.parametrize("alpha", [ALPHA, ALPHA / 3, ALPHA / 25])
def test_the_interval_holds_the_shifts_that_the_test_does_not_reject(n, alpha):
    """On both sides of its ends, and at 0, of values with ties and of some without."""
    rng = np.random.default_rng(n)
    samples = np.vstack([rng.normal(0.3, 0.5, (4, n)), rng.integers(-3, 6, (8, n)) * 0.1])
    low, high = sign_flip_interval(samples, alpha)
    assert low.shape == (12,) and (low <= samples.mean(1)).all() and (high >= samples.mean(1)).all()
    assert (np.isfinite(low) == (smallest_p(n) <= alpha)).all()
    assert (np.isfinite(high) == np.isfinite(low)).all()
    for row, ends in zip(samples, zip(low, high, strict=True), strict=True):
        assert (sign_flip_p(row) <= alpha) == (not ends[0] <= 0 <= ends[1])
        for end, outwards in zip(ends, (-1e-6, 1e-6), strict=True):
            if np.isfinite(end):
                p = [sign_flip_p(row - end + step) for step in (outwards, -outwards)]
                assert p[0] > alpha >= p[1]
    mirrored = sign_flip_interval(-samples, alpha)
    assert np.array_equal(mirrored[0], -high) and np.array_equal(mirrored[1], -low)


def test_the_ends_are_means_of_subsets():
    """Of five pairs at 1/8: the second smallest of the 31 means of some of them, and the second
    largest; counted one by one."""
    values = np.array([0.3, -0.1, 0.8, 0.45, 0.2])
    chosen = [[k for k in range(5) if number >> k & 1] for number in range(1, 32)]
    means = sorted(values[some].mean() for some in chosen)
    assert sign_flip_interval(values, 1 / 8) == pytest.approx((means[1], means[-2]))
    assert sign_flip_interval(values, 1 / 16) == pytest.approx((-0.1, 0.8))
    assert sign_flip_interval(values, 1 / 17) == (-np.inf, np.inf)
    # In its last bits the mean of -0.3, 0.1 and 0.2 is not 0.
    assert sign_flip_interval([1.0, 0.2, 0.8, -0.3, 0.2, 0.1, 1.1, 0.9])[0] == 0.0


def test_what_a_design_can_reach():
    assert smallest_p(6) == 0.03125 == sign_flip_p([1, 2, 3, 4, 5, 6])
    assert (pairs_needed(1), pairs_needed(6)) == (6, 8)
    assert smallest_p(7, 6) > 0.05 > smallest_p(8, 6)


@pytest.mark.parametrize(("n", "claims", "shift"), [(8, 1, 1.0), (9, 6, 1.6), (20, 3, 0.8)])
def test_the_power_is_that_of_the_test(n, claims, shift):
    """Of 600 studies, as many have a corrected p of at most 5 %."""
    rng = np.random.default_rng([n, claims])
    studies = rng.normal(shift, 1.0, size=(600, n))
    p_values = [permutation_p(study, np.inf if n <= 16 else 1999) for study in studies]
    found = np.mean(np.multiply(p_values, claims) <= ALPHA)
    assert 0.3 < found < 0.95
    assert power(0.5 * shift, 0.5, n, claims) == pytest.approx(found, abs=0.05)


def test_power_where_the_design_decides():
    """A t test would see 0.5 points with 5 pairs; no pattern of 5 signs is significant."""
    assert power(0.5, 0.1, 5) == 0.0 == power(9.0, 0.1, 7, claims=6)
    assert power(0.5, 0.1, 6) > 0.99 and power(0.5, 0.1, 8, claims=6) > 0.99
    assert power(0.5, 1e-12, 30) == 1.0
    assert pairs_to_see(9.0, 0.1, claims=6) == 8
    assert pairs_to_see(0.5, 20.0) is None


def test_power_is_continuous_where_simulation_ends():
    """At 17 pairs the noncentral t distribution takes over."""
    for claims in (1, 6):
        simulated, exact = power(0.8, 1.0, 16, claims), power(0.8, 1.0, 17, claims)
        assert -0.01 < exact - simulated < 0.06


def test_the_pairs_that_a_difference_takes():
    for claims in (1, 3):
        for points, sd in ((0.5, 0.35), (0.3, 0.35), (0.15, 0.25)):
            n = pairs_to_see(points, sd, claims)
            assert power(points, sd, n - 1, claims) < 0.8 <= power(points, sd, n, claims)
    # Guenther's (1981) approximation for the t test.
    z, z_power = stats.norm.ppf([0.975, 0.8])
    assert pairs_to_see(0.15, 0.35) == math.ceil(((z + z_power) * 0.35 / 0.15) ** 2 + z**2 / 2)


def test_degenerate_samples():
    same = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.mean, same.t_low, same.t_high, same.p) == (0.0, 0.0, 0.0, 1.0)
    # In the last bits these two differences are not equal.
    assert paired_difference([68.83, 70.12], [68.53, 69.82]).sd == 0.0
    single = paired_difference([2.0], [1.0])
    assert (single.n, single.mean, single.low, single.p, single.sd) == (1, 1.0, None, 1.0, None)
    with pytest.raises(ValueError, match="3 values cannot be paired with 2"):
        paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="no values"):
        summarise([])


def test_what_pairing_gains():
    """The two columns have sd 1.789010 and 2.002249, and a correlation of 0.7951702."""
    found = paired_difference(FIRST, SECOND)
    assert (found.correlation, found.unpaired_sd) == pytest.approx(
        (0.7951702, math.hypot(1.789010, 2.002249)), abs=1e-6
    )
    assert found.sd < found.unpaired_sd / 2
    assert paired_difference([1.0, 2.0, 4.0], [3.0, 3.0, 3.0]).correlation is None
    assert paired_difference([1.0, 2.0], [5.0, 3.0]).correlation is None  # any two give 1 or -1


# What docs/studies.md states, in percent: one interval alone, and those of three claims together.
COVERAGE = {"normal": (95.3, 95.4), "heavy-tailed": (95.3, 95.4), "skewed": (90.4, 87.0)}
DRAWS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "heavy-tailed": lambda rng, size: rng.standard_t(3, size=size),
    "skewed": lambda rng, size: rng.exponential(size=size) - 1,
}


@pytest.mark.parametrize(
    ("studies", "margin"), [(10_000, 0.7), pytest.param(200_000, 0.06, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", DRAWS)
def test_coverage_in_simulation(kind, studies, margin):
    """Of studies of three claims with eight pairs each, whose differences have mean 0."""
    samples = DRAWS[kind](np.random.default_rng(0), (studies, 3, 8))

    def covered(values, alpha):
        low, high = sign_flip_interval(values, alpha)
        return (low <= 0) & (high >= 0)

    alone, together = covered(samples[:, 0], ALPHA), covered(samples, ALPHA / 3)
    found = 100 * alone.mean(), 100 * together.all(1).mean()
    assert found == pytest.approx(COVERAGE[kind], abs=margin)
    assert np.array_equal(3 * sign_flip_p(samples) <= ALPHA, ~together)
    text = (ROOT / "docs" / "studies.md").read_text()
    assert f"| {kind} | {COVERAGE[kind][0]} | {COVERAGE[kind][1]} |" in text
