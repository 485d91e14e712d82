"""CRD's contrastive samples: who may be drawn, and how often each is."""

import pytest
import torch
from scipy.stats import chisquare

from mdistiller_ext.toolkit.contrastive import ContrastiveSampler

TARGETS = torch.tensor([0, 1, 2, 0, 1, 2, 2, 0, 2, 2])
INDEX = torch.tensor([0, 1, 2, 9])


def draw(count, mode="exact", repeats=2000):
    """(repeats, B, 1 + count)"""
    sampler = ContrastiveSampler(TARGETS, count, mode)
    generator = torch.Generator().manual_seed(0)
    return torch.stack([sampler(INDEX, generator) for _ in range(repeats)])


@pytest.mark.parametrize("count", [1, 5, 6, 30])
def test_negatives_are_of_other_classes_and_uniform_among_them(count):
    samples = draw(count)
    assert samples.shape == (2000, 4, 1 + count)
    for column, index in enumerate(INDEX):
        same = TARGETS[index] == TARGETS
        drawn = samples[:, column, 1:].flatten()
        counts = torch.bincount(drawn, minlength=len(TARGETS))
        assert counts[same].sum() == 0
        # Without replacement counts spread less than a multinomial's: the test is a safe one.
        assert chisquare(counts[~same].numpy()).pvalue > 1e-3


def test_without_replacement_as_long_as_there_are_enough():
    samples = draw(6)  # class 2 has 5 images of other classes, classes 0 and 1 have 7 and 8
    unique = [[len(row.unique()) for row in column] for column in samples[:, :, 1:].unbind(1)]
    assert set(unique[0]) == set(unique[1]) == {6}
    assert max(unique[2]) <= 5 and len(set(unique[2])) > 1


def test_the_positive_is_the_image_itself_or_any_of_its_class():
    assert (draw(3)[:, :, 0] == INDEX).all()
    positives = draw(3, "relax")[:, :, 0]
    for column, index in enumerate(INDEX):
        counts = torch.bincount(positives[:, column], minlength=len(TARGETS))
        same = TARGETS[index] == TARGETS
        assert counts[~same].sum() == 0
        assert chisquare(counts[same].numpy()).pvalue > 1e-3


def test_the_generator_decides():
    assert torch.equal(draw(5, repeats=3), draw(5, repeats=3))
    assert not torch.equal(*draw(5, repeats=2))
