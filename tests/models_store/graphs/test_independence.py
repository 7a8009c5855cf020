import re

import numpy as np
import pytest

from models_store.graphs.independence import fault
from models_store.inputs.kinds import probes
from models_store.manifest import InputSpec

SHAPE = (1, 4, 4)
WEIGHTS = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)


def logits(images):
    return images.reshape(len(images), -1) @ WEIGHTS


def minus_mean(images):
    return logits(images - images.mean(axis=0))


def by_largest(images):
    return logits(images / max(1e-6, images.max()))


def after_the_one_before(images):
    return logits(images) + 0.1 * np.roll(logits(images), 1, axis=0)


def by_position(images):
    return logits(images) * np.arange(1, len(images) + 1)[:, None]


def only_among_many(images):
    return logits(images - images.mean(axis=0)) if len(images) > 6 else logits(images)


def nearly_constant(images):
    """An untrained network: its outputs are nearly equal for all images, so the effect of the batch is small, too."""
    return 1e-4 * minus_mean(images)


def squeezed(images):
    return logits(images).squeeze()


def batch_of_two(images):
    return logits(images.reshape(2, *SHAPE))


GENERATOR = np.random.default_rng(0)


def random(images):
    return logits(images) + GENERATOR.normal(size=(len(images), 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (minus_mean, "alone and with other images"),
        (by_largest, "alone and with other images"),
        (only_among_many, "alone and with other images"),
        (nearly_constant, "alone and with other images"),
        (after_the_one_before, "another position"),
        (by_position, "another position"),
        (squeezed, r"one image with an array \(3,\).*squeeze"),
        (batch_of_two, "does not run on 6 images"),
        (random, "random"),
    ],
)
def test_answers_that_depend_on_the_batch_are_found(answer, said):
    assert re.search(said, fault(answer, probes(InputSpec(shape=SHAPE))))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_a_network_that_answers_row_by_row_passes_whatever_its_scale(scale):
    generator = np.random.default_rng(0)

    def rounded(images):
        # Another batch size uses another kernel, which rounds differently.
        found = scale * logits(images)
        return (found * (1 + 1e-6 * generator.normal(size=found.shape))).astype(np.float32)

    assert fault(rounded, probes(InputSpec(shape=SHAPE))) is None


def test_a_network_that_divides_by_the_largest_pixel_of_each_image_passes_though_black_is_nan():
    def answer(images):
        with np.errstate(invalid="ignore"):
            return logits(images / images.max(axis=(1, 2, 3), keepdims=True))

    assert np.isnan(answer(probes(InputSpec(shape=SHAPE)))).any()
    assert fault(answer, probes(InputSpec(shape=SHAPE))) is None


def test_a_chaotic_network_is_not_blamed_for_its_rounding():
    """Untrained, it amplifies the last bit of a pixel to its whole output; another batch size rounds differently."""

    def chaotic(images):
        wave = logits(images).astype(np.float64) * 1e9
        return np.sin(wave * (1 + 1e-7 * (len(images) % 2))).astype(np.float32)

    assert fault(chaotic, probes(InputSpec(shape=SHAPE))) is None


def test_given_images_are_among_those_asked():
    given = np.full((5, *SHAPE), 0.25, np.float32)
    assert (probes(InputSpec(shape=SHAPE), given)[:2] == given[:2]).all()
    assert (
        len({image.tobytes() for image in probes(InputSpec(shape=SHAPE))}) == len(probes(InputSpec(shape=SHAPE))) == 6
    )
