import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from training.data.contract import Contract
from training.errors import DataError

CONTRACT = Contract("The train split of 'pets'")
NAMED = Contract("The train split of 'pets'", ["cat", "dog", "owl"])
PIXELS = np.arange(3 * 2 * 4 * 5, dtype=np.uint8).reshape(3, 2, 4, 5)
FLOATS = (PIXELS / 255).astype(np.float32)
LABELS = [2, 0, 1]


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "images",
    [
        torch.from_numpy(FLOATS), FLOATS, FLOATS.astype(np.float64), torch.from_numpy(FLOATS).double(),
        torch.from_numpy(FLOATS).requires_grad_(), FLOATS.astype(">f4"), read_only(FLOATS.copy()), FLOATS[::-1].copy()[::-1],
    ],
)  # fmt: skip
def test_floating_point_images_of_any_form_become_the_same_float32_tensor(images):
    found, _ = CONTRACT.arrays(images, LABELS)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(found, torch.from_numpy(FLOATS))


def test_bytes_stay_bytes():
    found, _ = CONTRACT.arrays(PIXELS, LABELS)
    assert found.dtype == torch.uint8
    assert np.array_equal(found, PIXELS)


@pytest.mark.parametrize(
    "labels",
    [
        LABELS, tuple(LABELS), np.array(LABELS), np.array(LABELS, np.int32), np.array(LABELS, np.uint8), torch.tensor(LABELS),
        torch.tensor(LABELS, dtype=torch.int16), torch.tensor(LABELS, dtype=torch.float32), np.array(LABELS, np.float64),
        torch.tensor(LABELS)[:, None], torch.eye(3)[LABELS], np.eye(3, dtype=bool)[LABELS], read_only(np.array(LABELS)),
        ["owl", "cat", "dog"], np.array(["owl", "cat", "dog"]), np.array(["owl", "cat", "dog"], object),
    ],
)  # fmt: skip
def test_labels_of_any_form_become_the_same_int64_tensor(labels):
    _, found = NAMED.arrays(FLOATS, labels)
    assert found.dtype == torch.int64
    assert found.tolist() == LABELS


def test_pixels_outside_by_rounding_are_clamped_and_more_is_refused_with_enough_digits():
    rounded = FLOATS.copy()
    rounded[0, 0, 0, 0], rounded[1, 0, 0, 0] = 1.0000001, -1e-7
    images, _ = NAMED.arrays(rounded, LABELS)
    assert (float(images.min()), float(images.max())) == (0, 1)
    rounded[0, 0, 0, 0] = 1.0001
    with pytest.raises(DataError, match=r"from -1e-07 to 1.0001, first in row 0"):
        NAMED.arrays(rounded, LABELS)


@pytest.mark.parametrize(
    ("images", "labels", "cause"),
    [
        (FLOATS, [0, 1], "3 images and 2 labels"),
        (FLOATS * 255, LABELS, r"from 0 to 119, first in row 0; they must lie in \[0, 1\].*divide by 255"),
        (FLOATS * 2 - 1, LABELS, r"--mean, --std"),
        (FLOATS * 2.4, LABELS, r"from 0 to 1.12, first in row 2.*clamp"),
        (np.where(PIXELS == 50, np.nan, FLOATS), LABELS, "row 1, has NaN"),
        (np.where(PIXELS == 50, np.inf, FLOATS), LABELS, "row 1, has infinite"),
        (PIXELS.astype(np.int64), LABELS, "int64: give uint8"),
        (PIXELS > 3, LABELS, "bool: give uint8"),
        (FLOATS[:, 0], LABELS, r"add the channel axis: images\[:, None\]"),
        (FLOATS[0, 0], LABELS, r"it must be \(N, C, H, W\)"),
        (FLOATS[:, :, :0], LABELS, "without pixels"),
        (np.array([FLOATS[0], None, None], object), LABELS, "different sizes"),
        (FLOATS[:0], [], "is empty"),
        (FLOATS, [0.5, 1, 2], "integers; row 0 has 0.5"),
        (FLOATS, [0, 1, float("nan")], "integers; row 2 has nan"),
        (FLOATS, ["owl", "bat", "dog"], "row 1, has the label 'bat'.*missing"),
        (FLOATS, np.full((3, 3), 1 / 3), "row 0 is not one-hot"),
        (FLOATS, np.eye(4)[LABELS], "one-hot labels of 4 classes, but 3 class names"),
        (FLOATS, [[1], [1, 2], [3]], "integers"),
        (FLOATS, 1, "integers"),
        (FLOATS, None, "integers"),
    ],
)  # fmt: skip
def test_arrays_that_break_the_contract_are_refused_with_the_cause(images, labels, cause):
    with pytest.raises(DataError, match=cause):
        NAMED.arrays(images, labels)


@given(shape=st.tuples(*[st.integers(1, 8)] * 3))
def test_images_are_refused_as_channels_last_only_where_no_other_reading_is_likely(shape):
    certain = shape[0] > 4 and shape[1] > 4 and shape[2] in (1, 3, 4)
    for give in (
        lambda: CONTRACT.arrays(torch.zeros(2, *shape), [0, 1]),
        lambda: CONTRACT.read([(torch.zeros(shape), 0)], [0]),
    ):
        if certain:
            with pytest.raises(DataError, match=r"looks like \(H, W, C\); permute"):
                give()
        else:
            assert tuple(give()[0].shape[1:]) == shape


@pytest.mark.parametrize("image", [torch.from_numpy(PIXELS[0]), PIXELS[0]])
@pytest.mark.parametrize(
    "label", [1, 1.0, True, np.int32(1), np.array(1), np.array([1]), torch.tensor(1), torch.tensor([1.0]), [0, 1, 0],
              torch.eye(3)[1], "dog", np.str_("dog"), np.array(["dog"])],
)  # fmt: skip
def test_items_of_any_form_become_the_same_image_and_label(image, label):
    for item in ((image, label), [image, label], {"image": image, "label": label, "file": "x"}):
        images, labels = NAMED.read([item], [0])
        assert np.array_equal(images[0], PIXELS[0])
        assert labels.tolist() == [1]


def test_pil_images_are_their_pixels():
    colour = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    images, _ = CONTRACT.read([(Image.fromarray(colour), 0)], [0])
    assert np.array_equal(images[0], colour.transpose(2, 0, 1))
    images, _ = CONTRACT.read([(Image.fromarray(colour[..., 0]), 0)], [0])
    assert np.array_equal(images[0], colour[None, ..., 0])
    with pytest.raises(DataError, match="mode P"):
        CONTRACT.read([(Image.fromarray(colour).convert("P"), 0)], [0])


class Later:
    """Ten rows, one of which is bad."""

    def __init__(self, image=None, label=0, error=None):
        self.item, self.error = (torch.rand(1, 4, 4) if image is None else image, label), error

    def __len__(self):
        return 10

    def __getitem__(self, row):
        if row != 7:
            return torch.rand(1, 4, 4), row % 2
        if self.error:
            raise self.error
        return self.item


class Batched(Later):
    def __getitems__(self, rows):
        return [self[row] for row in rows]


LATER = [
    ({"image": torch.rand(1, 4, 4) * 255}, r"first in row 7; they must lie in \[0, 1\]"),
    ({"image": torch.full((1, 4, 4), float("nan"))}, "row 7, has NaN"),
    ({"image": torch.rand(1, 5, 4)}, r"row 7, is an image of shape \(1, 5, 4\)"),
    ({"image": torch.zeros(1, 4, 4, dtype=torch.uint8)}, "row 7, is an image of torch.uint8"),
    ({"image": torch.zeros(1, 4, 4, dtype=torch.complex64)}, "row 7, of torch.complex64"),
    ({"image": torch.rand(4, 4)}, r"row 7, .*add the channel axis"),
    ({"image": "a.png"}, "row 7, must be an image.*it is str"),
    ({"label": 2}, "row 7, has the label 2; with 2 classes labels are 0 … 1. Labels seem to begin at 1"),
    ({"label": -1}, "row 7, has the label -1.*leave them out"),
    ({"label": 0.5}, "integers; row 7 has 0.5"),
    ({"label": None}, "integers; row 7 has None"),
    ({"label": 10**30}, "integers; row 7"),
    ({"label": [1, 1]}, "integers; row 7"),
    ({"label": "cat"}, "row 7, has the label 'cat'"),
    ({"error": OSError("image file is truncated")}, "row 7 raises OSError: image file is truncated"),
    ({"error": FileNotFoundError("a.png")}, "row 7 raises FileNotFoundError"),
    ({"error": DataError("a.png is damaged")}, "^a.png is damaged$"),
]


@pytest.mark.parametrize("kind", [Later, Batched])
@pytest.mark.parametrize(("fault", "cause"), LATER)
def test_a_row_that_breaks_the_contract_is_named(kind, fault, cause):
    contract = Contract("The train split of 'pets'", classes=2, shape=(1, 4, 4), dtype=torch.float32)
    assert len(contract.read(kind(**fault), [0, 9])[0]) == 2
    with pytest.raises(DataError, match=cause):
        contract.read(kind(**fault), [0, 9, 7, 1])


@pytest.mark.parametrize(
    ("item", "cause"),
    [
        ((torch.rand(1, 4, 4),), "row 0 has 1 value"),
        ({"pixels": 1, "label": 2}, "row 0 is dict with the keys 'pixels', 'label'"),
        (torch.rand(1, 4, 4), "row 0 is Tensor"),
        (None, "row 0 is NoneType"),
    ],
)
def test_items_that_are_no_pairs_are_refused(item, cause):
    with pytest.raises(DataError, match=cause):
        CONTRACT.read([item], [0])


def test_what_a_data_set_gives_beside_image_and_label_is_left_out():
    image = torch.rand(1, 4, 4)
    images, labels = CONTRACT.read([(image, 1, "a.png", {"size": 3})], [0])
    assert torch.equal(images[0], image)
    assert labels.tolist() == [1]
