import numpy as np
import pytest
import torch

from training import data
from training.data import DataOptions, transforms
from training.data.augment import Augment
from training.errors import DataError

SHAPE = (3, 16, 16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "name", ["RandAugment", "TrivialAugmentWide", "AugMix", "ColorJitter:brightness=0.3,hue=0.1", "RandomErasing:p=1.0",
             "RandomResizedCrop:size=16", "GaussianBlur:kernel_size=3", "randomrotation:degrees=[-10, 10]"],
)  # fmt: skip
def test_each_image_is_transformed_by_draws_of_its_own_and_stays_in_0_to_1(name):
    each, _ = transforms.parse([name], SHAPE, 4)
    image = torch.rand(SHAPE, generator=generator(3))
    found = transforms.Transformed(Augment(), each)(image.repeat(24, 1, 1, 1), generator())
    assert found.shape == (24, *SHAPE)
    assert found.dtype == torch.float32
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert len({one.numpy().tobytes() for one in found}) > 2


def test_draws_depend_on_the_generator_alone():
    each, mix = transforms.parse(["RandAugment", "mixup", "cutmix"], SHAPE, 4)
    images, labels = torch.rand(8, *SHAPE), torch.arange(8) % 4
    made = transforms.Transformed(Augment(crop=2, flip=True), each)

    def once(seed, disturb):
        torch.manual_seed(disturb)
        own = generator(seed)
        return mix(made(images, own), labels, own)

    for first, second in zip(once(5, 1), once(5, 2), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(once(5, 1)[0], once(6, 1)[0])


def test_drawing_leaves_the_global_generator_alone():
    each, mix = transforms.parse(["RandAugment", "mixup"], SHAPE, 4)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    images = transforms.Transformed(Augment(), each)(torch.rand(4, *SHAPE, generator=generator()), generator())
    mix(images, torch.tensor([0, 1, 2, 3]), generator())
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_mixup_mixes_images_and_labels_in_the_same_shares():
    _, mix = transforms.parse(["mixup:alpha=1.0"], (1, 4, 4), 3)
    labels = torch.tensor([0, 1, 2])
    images = torch.nn.functional.one_hot(labels, 3).float()  # each image holds its class
    images = images[:, :, None, None].repeat(1, 1, 2, 2)
    mixed, shares = mix(images, labels, generator(2))
    torch.testing.assert_close(mixed[:, :, 0, 0], shares)
    np.testing.assert_allclose(shares.sum(dim=1), 1, rtol=1e-6)
    assert ((shares > 0.01).sum(dim=1) == 2).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RandAugmented", "has no transform 'RandAugmented'"),
        ("ColorJitter:0.2", "arguments have the form NAME:key=value"),
        ("ColorJitter:light=0.2", "It takes brightness"),
        ("CenterCrop:size=8", "Images must keep their size"),
        ("Normalize:mean=[0.5]*3,std=[0.2]*3", "arguments have the form"),
        ("Normalize:mean=[0.5,0.5,0.5],std=[0.1,0.1,0.1]", "Leave normalisation out"),
        ("Lambda", "It takes"),
        ("mixup:num_classes=7", "leave num_classes out"),
    ],
)
def test_what_cannot_be_applied_is_refused_with_the_cause(name, message):
    with pytest.raises(DataError, match=message.replace("[", r"\[")):
        transforms.parse([name], SHAPE, 4)


def test_transforms_are_for_images():
    with pytest.raises(DataError, match="are for images"):
        data.load(DataOptions("wine", transforms=("RandAugment",)))


def test_a_transform_that_rarely_changes_the_size_is_named_when_it_does():
    each, _ = transforms.parse(["RandomZoomOut:p=0.02"], SHAPE, 4)
    made = transforms.Transformed(Augment(), each)
    with pytest.raises(DataError, match="RandomZoomOut made"):
        for seed in range(40):
            made(torch.rand(16, *SHAPE), generator(seed))
