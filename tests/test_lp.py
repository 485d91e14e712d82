"""LP's schedule and its mask."""

import numpy as np
import pytest
import torch

from mdistiller_ext.policies.lp import epoch_ratio, pruned_count, pruning_mask

RATIOS = [0.0, 0.13, 0.27, 0.4]


def test_schedule_of_the_paper():
    ratios = [epoch_ratio(epoch, RATIOS, 20) for epoch in range(1, 81)]
    assert ratios == [ratio for ratio in RATIOS for _ in range(20)]
    assert epoch_ratio(500, RATIOS, 20) == 0.4


@pytest.mark.parametrize(
    ("ratio", "classes", "count"),
    [(0.0, 100, 0), (0.13, 100, 13), (0.4, 100, 40), (0.13, 10, 1), (0.25, 10, 3), (0.98, 100, 98)],
)
def test_count_rounds_half_up(ratio, classes, count):
    assert pruned_count(ratio, classes) == count


@pytest.mark.parametrize(("ratio", "classes"), [(0.99, 100), (0.9, 10), (0.5, 2)])
def test_a_class_beside_the_target_must_stay(ratio, classes):
    with pytest.raises(ValueError, match="the target and one other class must stay"):
        pruned_count(ratio, classes)


@pytest.mark.parametrize("count", [0, 1, 13, 40, 98])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_mask_takes_the_lowest_teacher_logits(batch, count):
    teacher = torch.randn(batch, 100, generator=torch.Generator().manual_seed(0))
    target = teacher.argmin(dim=1)  # the lowest of all, which must stay
    mask = pruning_mask(teacher, target, count)
    for row, logits, y in zip(mask.numpy(), teacher.numpy(), target.tolist(), strict=True):
        others = np.delete(np.arange(100), y)
        lowest = others[np.argsort(logits[others])[:count]]
        assert set(np.flatnonzero(row)) == set(lowest)


def test_equal_logits_are_pruned_in_class_order():
    mask = pruning_mask(torch.zeros(1, 6), torch.tensor([1]), 3)
    assert mask.tolist() == [[True, False, True, True, False, False]]


def test_count_may_be_a_tensor():
    teacher, target = torch.randn(4, 10), torch.tensor([0, 1, 2, 3])
    assert torch.equal(
        pruning_mask(teacher, target, torch.tensor(4)), pruning_mask(teacher, target, 4)
    )


@pytest.mark.parametrize(
    ("epoch", "ratios", "fault"),
    [
        (0, RATIOS, "epoch is 0, expected at least 1"),  # it was the last ratio
        (-3, RATIOS, "epoch is -3"),
        (1, [], "stages is 0"),
    ],
)
def test_the_schedule_refuses_epochs_that_count_from_0(epoch, ratios, fault):
    with pytest.raises(ValueError, match=fault):
        epoch_ratio(epoch, ratios, 20)


@pytest.mark.parametrize(
    ("shapes", "count", "fault"),
    [
        (((4, 10), (4,)), 9, "a mask takes 9 of 10 classes away, expected 0 to 8: the target and"),
        (((4, 10), (4,)), -1, "a mask takes -1 of 10 classes away"),
        (((4, 10), (3,)), 1, r"shapes \(4, 10\) and \(3,\), expected \(B, C\) and \(B,\)"),
        (((10,), (10,)), 1, r"shapes \(10,\) and \(10,\)"),
    ],
)
def test_a_mask_that_makes_no_sense_is_refused(shapes, count, fault):
    teacher, target = torch.randn(shapes[0]), torch.zeros(shapes[1], dtype=torch.int64)
    with pytest.raises(ValueError, match=fault):
        pruning_mask(teacher, target, count)


def test_a_mask_looks_at_no_values():
    """That would wait for the device; meta tensors have none."""
    teacher, target = torch.empty(4, 10, device="meta"), torch.empty(4, device="meta").long()
    assert pruning_mask(teacher, target, torch.empty((), device="meta")).shape == (4, 10)
