"""The 162 views of an image against torchvision's own transforms, and how they are drawn."""

import pytest
import torch
from scipy.stats import chisquare
from torchvision.transforms import functional as tv
from torchvision.transforms.functional import to_pil_image

from mdistiller_ext.data import ImageSet, cifar100


def image_set(images=4, flips=True, padding=4, side=32):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, side, side), generator=generator, dtype=torch.uint8)
    data = ImageSet.build(
        pixels, torch.arange(images), cifar100.MEAN, cifar100.STD, padding=padding, flips=flips
    )
    return pixels, data


def test_all_162_views_equal_torchvision():
    pixels, data = image_set()
    for number, raw in enumerate(pixels):
        image = to_pil_image(raw)
        for dy in range(9):
            for dx in range(9):
                for flip in (False, True):
                    crop = tv.crop(tv.pad(image, [4]), dy, dx, 32, 32)
                    expected = tv.to_tensor(tv.hflip(crop) if flip else crop)
                    expected = tv.normalize(expected, list(cifar100.MEAN), list(cifar100.STD))
                    view = (dy * 9 + dx) * 2 + flip
                    batch = data.batch(torch.tensor([number]), torch.tensor([view]))
                    assert torch.equal(batch.image[0], expected)


def test_plain_equals_torchvision_and_covers_all():
    pixels, data = image_set(images=7)
    batches = list(data.plain(3))
    assert [len(b.target) for b in batches] == [3, 3, 1]
    expected = torch.stack(
        [
            tv.normalize(tv.to_tensor(to_pil_image(p)), list(cifar100.MEAN), list(cifar100.STD))
            for p in pixels
        ]
    )
    assert torch.equal(torch.cat([b.image for b in batches]), expected)
    assert torch.cat([b.target for b in batches]).tolist() == list(range(7))


def test_an_epoch_has_every_image_once_and_the_view_its_key_names():
    _, data = image_set(images=50)
    batches = list(data.epoch(16, torch.Generator().manual_seed(0)))
    assert [len(b.target) for b in batches] == [16, 16, 16, 2]
    order = torch.cat([b.index for b in batches])
    assert order.tolist() != list(range(50)) and sorted(order.tolist()) == list(range(50))
    for b in batches:
        again = data.batch(b.index, b.view)
        assert torch.equal(b.image, again.image) and torch.equal(b.target, b.index)


def test_epochs_repeat_with_their_seed_and_differ_without():
    _, data = image_set(images=50)
    first, same, other = (
        torch.cat([b.image for b in data.epoch(16, torch.Generator().manual_seed(seed))])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_views_are_uniform():
    _, data = image_set(images=2, side=4)
    seen = torch.zeros(data.num_views)
    for seed in range(4000):
        for b in data.epoch(2, torch.Generator().manual_seed(seed)):
            seen[b.view] += 1
    assert len(seen) == 162 and chisquare(seen.numpy()).pvalue > 0.001


@pytest.mark.parametrize(
    ("padding", "flips", "views"), [(1, False, 9), (0, False, 1), (0, True, 2)]
)
def test_other_distributions(padding, flips, views):
    _, data = image_set(images=3, flips=flips, padding=padding, side=8)
    seen = {
        int(view)
        for seed in range(60)
        for b in data.epoch(3, torch.Generator().manual_seed(seed))
        for view in b.view
    }
    assert len(seen) == data.num_views == views
