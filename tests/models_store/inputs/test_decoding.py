import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from models_store.errors import DecodeError
from models_store.inputs.decoding import open_image, to_array
from models_store.manifest import InputSpec

GREY = InputSpec(shape=(1, 4, 6))
RGB = InputSpec(shape=(3, 4, 6))
rng = np.random.default_rng(0)
grey = rng.integers(0, 256, (4, 6), np.uint8)
rgb = rng.integers(0, 256, (4, 6, 3), np.uint8)


def file(pixels, kind="PNG", mode=None, **options):
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def decoded(encoded, spec):
    return to_array(open_image(encoded), spec)


def test_bytes_become_floats_in_0_1_with_the_channels_first():
    assert decoded(file(grey), GREY) == pytest.approx((grey / 255)[None], abs=1e-7)
    found = decoded(file(rgb), RGB)
    assert found == pytest.approx((rgb / 255).transpose(2, 0, 1), abs=1e-7)
    assert (found.dtype, found.flags.c_contiguous) == (np.float32, True)


def test_grey_and_rgb_become_what_the_members_take():
    assert decoded(file(grey), RGB) == pytest.approx(np.repeat((grey / 255)[None], 3, axis=0), abs=1e-7)
    luma = rgb @ np.array([0.299, 0.587, 0.114]) / 255  # ITU-R 601
    assert decoded(file(rgb), GREY)[0] == pytest.approx(luma, abs=1 / 255)


def test_alpha_is_composed_on_white():
    alpha = rng.integers(0, 256, (4, 6, 1), np.uint8)
    expected = (rgb / 255 * (alpha / 255) + 1 - alpha / 255).transpose(2, 0, 1)
    assert decoded(file(np.concatenate([rgb, alpha], axis=2)), RGB) == pytest.approx(expected, abs=1.01 / 255)
    assert decoded(file(Image.new("LA", (6, 4), (0, 0))), GREY).min() == 1


def test_palettes_with_a_transparent_colour_too():
    image = Image.new("P", (6, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert decoded(file(image, transparency=0), GREY).min() == 1
    assert decoded(file(image), GREY).max() == 0


def test_16_bit_grey_keeps_its_depth():
    deep = rng.integers(0, 65536, (4, 6)).astype(np.uint16)
    assert decoded(file(deep), GREY)[0] == pytest.approx(deep / 65535, abs=1e-6)
    assert decoded(file(deep), RGB)[2] == pytest.approx(deep / 65535, abs=1e-6)


def test_cmyk_and_black_and_white_are_converted():
    assert decoded(file(rgb, "JPEG", "CMYK"), RGB).shape == (3, 4, 6)
    bits = grey > 127
    assert decoded(file(bits), GREY)[0].tolist() == bits.astype(float).tolist()


@pytest.mark.parametrize(("orientation", "turned"), [(3, lambda x: x[::-1, ::-1]), (2, lambda x: x[:, ::-1])])
def test_the_exif_orientation_is_applied(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decoded(file(grey, exif=exif), GREY)[0] == pytest.approx(turned(grey) / 255, abs=1e-7)


def test_a_turned_image_has_its_turned_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded(file(np.ascontiguousarray(grey.T), exif=exif), GREY).shape == (1, 4, 6)


def test_another_size_is_refused_stretched_or_cropped_as_the_manifest_says():
    large = file(rng.integers(0, 256, (40, 30, 3), np.uint8))
    with pytest.raises(DecodeError, match="30 × 40 pixels; this ensemble takes 6 × 4"):
        decoded(large, RGB)
    assert decoded(large, InputSpec(shape=(3, 4, 6), resize="stretch")).shape == (3, 4, 6)
    assert decoded(large, InputSpec(shape=(3, 4, 6), resize="crop")).shape == (3, 4, 6)


@pytest.mark.parametrize("size", [(30, 41), (41, 30), (33, 33), (8, 100), (5, 7)])
def test_crop_is_torchvisions_resize_and_centre_crop(size):
    transforms = pytest.importorskip("torchvision.transforms", reason="the training extra is not installed")
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    expected = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16), transforms.ToTensor()])(image)
    assert decoded(file(image), InputSpec(shape=(3, 16, 16), resize="crop")) == pytest.approx(
        expected.numpy(), abs=1e-6
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_file_cut_off_anywhere_is_refused(kind):
    whole = file(rng.integers(0, 256, (64, 64), np.uint8), kind)
    for length in (0, 1, 10, 40, len(whole) // 2):
        with pytest.raises(DecodeError):
            decoded(whole[:length], InputSpec(shape=(1, 64, 64)))


def test_other_formats_are_not_even_tried():
    for kind in ("GIF", "BMP", "TIFF", "WEBP"):
        with pytest.raises(DecodeError, match="not a readable PNG or JPEG"):
            open_image(file(grey, kind), ("PNG", "JPEG"))


def test_the_size_is_known_before_any_pixel_is_decoded():
    assert open_image(file(rgb)).size == (6, 4)


def test_channels_that_no_image_has_are_told():
    with pytest.raises(DecodeError, match="takes 5 channels"):
        decoded(file(grey), InputSpec(shape=(5, 4, 6)))


def test_small_files_that_ask_for_much_work_are_refused():
    crop = InputSpec(shape=(3, 224, 224), resize="crop")
    with pytest.raises(DecodeError, match="a strip"):
        decoded(file(Image.new("L", (1, 3000))), crop)
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64), np.uint8)).save(stream, "JPEG", progressive=True)
    whole = stream.getvalue()
    assert decoded(whole, InputSpec(shape=(1, 64, 64))).shape == (1, 64, 64)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    with pytest.raises(DecodeError, match="more scans"):
        decoded(whole[:-2] + scan * 100 + whole[-2:], InputSpec(shape=(1, 64, 64)))
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a" * 2**20, zip=True)
    with pytest.raises(DecodeError):
        decoded(file(grey, pnginfo=text), GREY)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a" * 2**10, zip=True)
    assert decoded(file(grey, pnginfo=text), GREY).shape == (1, 4, 6)
