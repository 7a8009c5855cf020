"""Generated images have the shape of the ensemble's, fill [0, 1], and are always the same ones."""

import numpy as np
import pytest

from training.data import generated


@pytest.mark.parametrize("name", generated.SETS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 20)])
def test_generated_images_are_images(name, shape):
    images = generated.SETS[name](shape, 50)
    assert (images.shape, images.dtype) == ((50, *shape), np.float32)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.1
    assert (images == generated.SETS[name](shape, 50)).all()
    assert len(np.unique(images.reshape(50, -1), axis=0)) == 50


def neighbours(images):
    """Correlation of pixels that are next to each other."""
    return np.corrcoef(images[..., 1:].ravel(), images[..., :-1].ravel())[0, 1]


def test_textures_are_smooth_and_noise_is_not():
    assert neighbours(generated.textures((1, 28, 28), 100)) > 0.5
    assert abs(neighbours(generated.noise((1, 28, 28), 100))) < 0.05
