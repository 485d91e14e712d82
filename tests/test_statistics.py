"""Known answers, and what the intervals and tests do in simulation."""

import numpy as np
import pytest
from scipy import stats

from mdistiller_ext.study.statistics import (
    holm,
    paired_difference,
    pairs_needed,
    seeds_to_see,
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
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-7)
    assert found.sd == pytest.approx(1.229995, abs=1e-6)
    one = summarise(SECOND)
    assert (one.mean, one.sd) == pytest.approx((2.33, 2.002249), abs=1e-6)
    assert (one.low, one.high) == pytest.approx((0.8976775, 3.7623225), abs=1e-7)


def test_fishers_exact_count_of_darwins_plants():
    assert sign_flip_p(DARWIN) == pytest.approx(1726 / 2**15, rel=1e-9)


def test_holm():
    """The values of statsmodels' multipletests(p, method="holm")."""
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_what_a_design_can_reach():
    assert smallest_p(6) == 0.03125 == sign_flip_p([1, 2, 3, 4, 5, 6])
    assert (pairs_needed(1), pairs_needed(6)) == (6, 8)
    assert smallest_p(7, 6) > 0.05 > smallest_p(8, 6)


def test_seeds_to_see():
    """statsmodels' TTestPower().solve_power gives 12.95 and 6.11 pairs."""
    assert seeds_to_see(0.3, 0.25 * 2**0.5) == 13
    assert seeds_to_see(0.5, 0.25 * 2**0.5) == 7
    assert seeds_to_see(0.5, 0.0) == 2


def test_degenerate_samples():
    same = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.mean, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    single = paired_difference([2.0], [1.0])
    assert (single.n, single.mean, single.low, single.p) == (1, 1.0, None, None)
    with pytest.raises(ValueError, match="3 values cannot be paired with 2"):
        paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="no values"):
        summarise([])


@pytest.mark.parametrize("n", [6, 10])
def test_intervals_and_tests_in_simulation(n):
    """The t interval covers 95 %, the sign-flip test errs in at most 5 %, so does the family."""
    rng = np.random.default_rng(n)
    samples = rng.normal(0.3, 0.25, size=(4000, n))
    low, high = stats.t.interval(0.95, n - 1, samples.mean(1), samples.std(1, ddof=1) / np.sqrt(n))
    found = summarise(samples[0])
    assert (found.low, found.high) == pytest.approx((low[0], high[0]))
    assert np.mean((low <= 0.3) & (high >= 0.3)) == pytest.approx(0.95, abs=0.015)

    signs = np.array(np.meshgrid(*[[-1, 1]] * n)).reshape(n, -1)
    null = rng.normal(0.0, 0.25, size=(2000, n))
    means = np.abs(null @ signs)
    p = (means >= np.abs(null.sum(1))[:, None] * (1 - 1e-12)).mean(1)
    assert p[:5].tolist() == pytest.approx([sign_flip_p(row) for row in null[:5]])
    assert np.mean(p <= 0.05) <= 0.05 + 0.015
    families = p[: len(p) // 6 * 6].reshape(-1, 6)
    assert np.mean([min(holm(family)) <= 0.05 for family in families]) <= 0.05 + 0.03


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
