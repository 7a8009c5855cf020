import pytest
import torch

from training.data.augment import Augment


def draw(augment, images, seed=0):
    return augment(images, torch.Generator().manual_seed(seed))


def test_nothing_asked_for_changes_nothing():
    images = torch.rand(4, 3, 5, 5)
    assert torch.equal(draw(Augment(), images), images)


def test_every_crop_is_a_window_of_its_own_padded_image():
    images = torch.rand(60, 2, 5, 6)
    cropped = draw(Augment(crop=2), images)
    padded = torch.nn.functional.pad(images, [2] * 4)
    offsets = set()
    for image, wide in zip(cropped, padded, strict=True):
        windows = {(r, c): wide[:, r : r + 5, c : c + 6] for r in range(5) for c in range(5)}
        found = [at for at, window in windows.items() if torch.equal(window, image)]
        assert found
        offsets.add(found[0])
    assert len(offsets) > 15  # of 25 possible ones: each image gets its own


def test_about_half_of_the_images_are_mirrored_and_the_others_untouched():
    images = torch.rand(400, 1, 3, 3)
    flipped = draw(Augment(flip=True), images)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert (mirrored | (flipped == images).flatten(1).all(1)).all()
    assert 140 < int(mirrored.sum()) < 260


@pytest.mark.parametrize("seed", [0, 1])
def test_the_generator_decides(seed):
    images = torch.rand(8, 1, 4, 4)
    augment = Augment(crop=1, flip=True)
    assert torch.equal(draw(augment, images, seed), draw(augment, images, seed))
    assert not torch.equal(draw(augment, images, seed), draw(augment, images, seed + 1))
