"""EAT's schedule and DAT's ranking."""

import pytest
import torch

from mdistiller_ext.policies.dat import sample_temperature
from mdistiller_ext.policies.eat import epoch_temperature


def schedule(epochs, temperature=4.0, spread=0.4, step_epochs=10):
    return [
        epoch_temperature(e, temperature, spread, step_epochs, epochs) for e in range(1, epochs + 1)
    ]


def test_eat_of_the_paper():
    temperatures = schedule(80)
    steps = [5.6, 36 / 7, 32.8 / 7, 29.6 / 7, 26.4 / 7, 23.2 / 7, 20 / 7, 2.4]
    assert temperatures[::10] == pytest.approx(steps)
    assert temperatures == [t for t in temperatures[::10] for _ in range(10)]


def test_eat_with_a_short_last_stage():
    assert schedule(25) == pytest.approx([5.6] * 10 + [4.0] * 10 + [2.4] * 5)


def test_eat_with_one_stage_is_constant():
    assert schedule(10) == [4.0] * 10


def test_eat_stays_in_its_last_stage_beyond_the_end():
    assert epoch_temperature(200, 4.0, 0.4, 10, 80) == pytest.approx(2.4)


@pytest.mark.parametrize("temperature", [4.0, 3.3, 5.142857142857142])
def test_eat_without_range_is_the_temperature_itself(temperature):
    assert schedule(80, temperature, spread=0.0) == [temperature] * 80


def test_dat_raises_the_hardest_and_lowers_the_easiest():
    divergence = torch.arange(20.0).flip(0)
    temperatures = sample_temperature(divergence, 4.0, 0.05, 0.1)
    expected = torch.full((20,), 4.0)
    expected[:2], expected[-2:] = 4.2, 3.8
    torch.testing.assert_close(temperatures, expected)


@pytest.mark.parametrize(("size", "count"), [(1, 0), (9, 0), (10, 1), (16, 1), (64, 6)])
def test_dat_counts_floor_of_the_fraction(size, count):
    temperatures = sample_temperature(torch.rand(size), 4.0, 0.05, 0.1)
    assert (temperatures > 4).sum() == count
    assert (temperatures < 4).sum() == count


def test_dat_breaks_ties_by_place():
    temperatures = sample_temperature(torch.zeros(10), 4.0, 0.5, 0.2)
    assert temperatures.tolist() == [2.0, 2.0] + [4.0] * 6 + [6.0, 6.0]


def test_dat_half_and_half_leaves_the_middle():
    assert sample_temperature(torch.arange(5.0), 4.0, 0.5, 0.5).tolist() == [2, 2, 4, 6, 6]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_dat_without_range_is_the_temperature_itself(fraction):
    temperatures = sample_temperature(torch.rand(64), 5.142857142857142, 0.0, fraction)
    assert torch.equal(temperatures, torch.full((64,), 5.142857142857142))


def test_dat_passes_no_gradient():
    divergence = torch.rand(10, requires_grad=True)
    assert not sample_temperature(divergence, 4.0, 0.05, 0.1).requires_grad


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"epoch": 0}, "epoch is 0, expected at least 1"),
        ({"step_epochs": 0}, "step_epochs is 0, expected at least 1"),
        ({"epochs": 0}, "epochs is 0, expected at least 1"),
        ({"epoch": 0, "epochs": 10}, "epoch is 0"),  # in the one stage of a short run too
        ({"temperature": 0.0}, "temperature is 0.0, expected a positive number"),
        ({"temperature": -4.0}, "temperature is -4.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"spread": 1.0}, "spread is 1.0, expected above -1 and below 1"),
        ({"spread": -1.5}, "spread is -1.5"),
    ],
)
def test_eat_refuses_what_is_outside_its_range(changes, fault):
    given = {"epoch": 1, "temperature": 4.0, "spread": 0.4, "step_epochs": 10, "epochs": 80}
    with pytest.raises(ValueError, match=fault):
        epoch_temperature(**given | changes)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"temperature": -4.0}, "temperature is -4.0, expected a positive number"),
        ({"temperature": torch.ones(10, 1)}, r"temperature has shape \(10, 1\), expected \(\)$"),
        ({"spread": 1.5}, "spread is 1.5, expected above -1 and below 1"),
        ({"fraction": 2.0}, "fraction is 2.0, expected 0 to 0.5"),
        ({"fraction": -0.1}, "fraction is -0.1"),
        ({"divergence": torch.rand(10, 1)}, r"divergence has shape \(10, 1\), expected \(B,\)"),
    ],
)
def test_dat_refuses_what_is_outside_its_range(changes, fault):
    given = {"divergence": torch.rand(10), "temperature": 4.0, "spread": 0.05, "fraction": 0.1}
    with pytest.raises(ValueError, match=fault):
        sample_temperature(**given | changes)


def test_a_tensors_values_are_not_looked_at():
    """That would wait for its device; meta tensors have none."""
    divergence, temperature = torch.empty(10, device="meta"), torch.empty((), device="meta")
    assert sample_temperature(divergence, temperature, 0.05, 0.1).shape == (10,)
