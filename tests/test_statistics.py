"""Known answers, and what the intervals and tests do in simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from mdistiller_ext.study.statistics import (
    ALPHA,
    holm,
    paired_difference,
    pairs_needed,
    pairs_to_see,
    power,
    sign_flip_p,
    smallest_p,
    summarise,
    t_interval,
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
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-7)
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


def test_holm():
    """The values of statsmodels' multipletests(p, method="holm")."""
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_what_a_design_can_reach():
    assert smallest_p(6) == 0.03125 == sign_flip_p([1, 2, 3, 4, 5, 6])
    assert (pairs_needed(1), pairs_needed(6)) == (6, 8)
    assert smallest_p(7, 6) > 0.05 > smallest_p(8, 6)


@pytest.mark.parametrize(("n", "claims", "shift"), [(8, 1, 1.0), (9, 6, 1.6), (20, 3, 0.8)])
def test_the_power_is_that_of_the_test(n, claims, shift):
    """Of 600 studies whose other claims fail, as many have a corrected p below 5 %."""
    rng = np.random.default_rng([n, claims])
    studies = rng.normal(shift, 1.0, size=(600, n))
    p_values = [permutation_p(study, np.inf if n <= 16 else 1999) for study in studies]
    found = np.mean([holm([p, *[1.0] * (claims - 1)])[0] <= ALPHA for p in p_values])
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
    assert (same.mean, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    # In the last bits these two differences are not equal.
    assert paired_difference([68.83, 70.12], [68.53, 69.82]).sd == 0.0
    single = paired_difference([2.0], [1.0])
    assert (single.n, single.mean, single.low, single.p) == (1, 1.0, None, None)
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


@pytest.mark.parametrize("n", [6, 10])
def test_intervals_and_tests_in_simulation(n):
    """Each interval and those of a family cover 95 %; the test errs in at most 5 %, so do both."""
    rng = np.random.default_rng(n)
    samples = rng.normal(0.3, 0.25, size=(2000, 6, n))
    mean, sd = samples.mean(-1), samples.std(-1, ddof=1)
    low, high = t_interval(n, mean, sd)
    assert np.mean((low <= 0.3) & (high >= 0.3)) == pytest.approx(0.95, abs=0.01)
    assert np.mean(((low <= 0.3) & (high >= 0.3)).all(1)) < 0.80
    low, high = t_interval(n, mean, sd, claims=6)
    assert np.mean(((low <= 0.3) & (high >= 0.3)).all(1)) == pytest.approx(0.95, abs=0.015)

    p = sign_flip_p(samples - 0.3)
    assert np.mean(p <= 0.05) <= 0.05 + 0.01
    assert np.mean([min(holm(family)) <= 0.05 for family in p]) <= 0.05 + 0.015


@pytest.mark.parametrize(("n", "coverage"), [(6, 0.85), (10, 0.90)])
def test_the_coverage_of_bca_is_below_its_name(n, coverage):
    """Which is why the t interval stands first; of 2,000 simulations it was 84.9 % and 90.2 %."""
    rng = np.random.default_rng(0)
    hits = []
    for values in rng.normal(0.3, 0.25, size=(300, n)):
        found = paired_difference(values, np.zeros(n))
        hits.append(found.bca_low <= 0.3 <= found.bca_high)
    assert np.mean(hits) == pytest.approx(coverage, abs=0.05)


def test_there_is_no_bca_interval_of_a_few_pairs():
    found = paired_difference([1.0, 2.0, 4.0, 3.0, 2.5], np.zeros(5))
    assert found.low < found.mean < found.high and found.bca_low is found.bca_high is None
