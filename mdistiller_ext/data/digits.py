"""scikit-learn's handwritten digits: 1,797 real 8x8 images that come with its wheel."""

import numpy as np
import torch

from .views import ImageSet

TEST_SHARE = 0.7  # little to learn from, much to measure on
TRAINING = [53, 55, 53, 55, 54, 55, 54, 54, 52, 54]  # images of each class


def load() -> tuple[ImageSet, ImageSet]:
    """(train, test) of 539 and 1,258 images, each class split alike, always in the same way."""
    # Here, because scikit-learn takes as long to import as all else but torch.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, targets = load_digits(return_X_y=True)
    pixels = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8).repeat(3, axis=1)
    split = train_test_split(
        pixels, targets, test_size=TEST_SHARE, random_state=0, stratify=targets
    )
    scaled = split[0] / 255
    mean, std = (float(scaled.mean()),) * 3, (float(scaled.std()),) * 3
    train, test = (
        # Shifts by one pixel; a mirrored digit is another sign.
        ImageSet.build(torch.from_numpy(x), torch.from_numpy(y), mean, std, padding=1, flips=False)
        for x, y in (split[::2], split[1::2])
    )
    return train, test
