import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from training import data
from training.data import DataOptions, load
from training.data.sources import image_folder
from training.errors import DataError

COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


def fill(folder, count=10, **colours):
    """Fill a folder with one folder of PNG files per class."""
    for name, colour in (colours or COLOURS).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (20, 30), colour).save(folder / name / f"{index}.png")


def read(folder, **options):
    return load(DataOptions(dataset=f"imagefolder:{folder}", image_size=16, **options))


def sizes(found):
    return len(found.train), len(found.validation), len(found.test)


def test_files_and_order_are_those_of_torchvision(tmp_path):
    fill(tmp_path, green=(0, 9, 0), **COLOURS)
    for folder in ("red/b", "red/a/c", "red/B"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "x.JPG")
    theirs = ImageFolder(str(tmp_path))
    ours = image_folder.source(str(tmp_path), 16)
    train, _, test = ours.parts
    pairs = {train.dataset.files[i]: train.dataset.targets[i] for i in (*train.indices, *test.indices)}
    assert [*zip(train.dataset.files, train.dataset.targets, strict=True)] == theirs.samples
    assert len(pairs) == len(theirs)
    assert ours.classes == theirs.classes


def test_what_only_looks_like_data_is_left_out_and_said(tmp_path):
    fill(tmp_path)
    for folder in (".ipynb_checkpoints", "__MACOSX", "empty", "red/.ipynb_checkpoints", "red/__MACOSX"):
        (tmp_path / folder).mkdir()
    for file in ("red/._0.png", "red/.ipynb_checkpoints/0-checkpoint.png", "__MACOSX/0.png", "loose.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / file)
    for file in ("red/notes.txt", "empty/a.heic", ".DS_Store", "red/Thumbs.db"):
        (tmp_path / file).write_bytes(b"x")
    found = read(tmp_path)
    said = found.notes
    assert found.classes == ["blue", "red"]
    assert sum(sizes(found)) == 20
    for part in (
        "1 class folders without images (as empty)", "1 files outside any class folder (as loose.png)",
        "3 files of other kinds (as empty/a.heic)", "6 hidden files or folders (as .DS_Store)",
    ):  # fmt: skip
        assert part in said[0]


def test_a_clean_folder_is_read_in_silence(tmp_path):
    fill(tmp_path)
    said = read(tmp_path, mean=(0.5,) * 3, std=(0.5,) * 3).notes
    assert said == ()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("Train", "Test"), (18, 2, 20)), (("train", "valid"), (18, 2, 20)), (("TRAIN", "validation"), (18, 2, 20)),
        (("train", "Valid", "test"), (20, 20, 20)), (("Training", "Testing"), (18, 2, 20)),
    ],
)  # fmt: skip
def test_splits_are_recognised_however_they_are_spelled(tmp_path, names, expected):
    for name in names:
        fill(tmp_path / name)
    (tmp_path / "unlabelled").mkdir()
    found = read(tmp_path)
    said = found.notes
    assert found.classes == ["blue", "red"]
    assert sizes(found) == expected
    assert "1 folders that are not a split (as unlabelled)" in said[0]


def test_a_class_may_be_called_training(tmp_path):
    fill(tmp_path, training=(1, 1, 1), resting=(2, 2, 2))
    assert read(tmp_path).classes == ["resting", "training"]


def test_a_split_may_lack_a_class_which_is_said(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", red=(255, 0, 0))
    (tmp_path / "test" / "blue").mkdir()
    found = read(tmp_path)
    said = found.notes
    images, labels = next(found.test.batches(torch.arange(10), 10))
    assert labels.tolist() == [1] * 10
    assert (images[:, 0] == 1).all()
    assert "test/ has no image of blue" in said[0]


def folder_with(fault, root):
    if fault == "two spellings":
        fill(root / "train"), fill(root / "Train"), fill(root / "test")
    elif fault == "no train":
        fill(root / "val"), fill(root / "test")
    elif fault == "only train":
        fill(root / "Train")
    elif fault == "other names":
        fill(root / "train"), fill(root / "test", Red=(255, 0, 0))
    elif fault == "no classes":
        Image.new("RGB", (4, 4)).save(root / "0.png")
    elif fault == "a file":
        fill(root), (root / "red" / "7.png").unlink(), (root / "red" / "7.png").symlink_to(root / "gone.png")
    elif fault == "a class":
        fill(root), (root / "green").symlink_to(root / "gone")
    elif fault == "a circle":
        fill(root), (root / "red" / "again").symlink_to(root / "red")


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("two spellings", "several folders for one split: Train, train"),
        ("no train", "no train/"),
        ("only train", r"Train/ but neither test/ nor val/.*If Train is a class"),
        ("other names", "different class folders: Red in test/ only"),
        ("no classes", "no class folders with images in them.*1 files outside"),
        ("a file", "red/7.png is a link to .*gone.png, which does not exist"),
        ("a class", "green is a link to .*gone, which does not exist"),
        ("a circle", "again is a link to a folder that contains it"),
    ],
)
def test_folders_that_cannot_be_meant_are_refused_with_the_cause(tmp_path, fault, cause):
    folder_with(fault, tmp_path)
    with pytest.raises(DataError, match=cause):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_a_damaged_image_is_named(tmp_path, content, in_memory):
    fill(tmp_path / "train", 40)
    fill(tmp_path / "test")
    file = tmp_path / "train/red/33.png"
    file.write_bytes(file.read_bytes()[:60] if content is None else content)
    with pytest.raises(DataError, match=r"train/red/33.png: .*Repair or remove it"):
        found = read(tmp_path, in_memory=in_memory, mean=(0.5,) * 3, std=(0.5,) * 3)
        list(found.train.batches(data.in_order(found.train), 16))


def test_foreign_images_need_no_classes_and_those_that_cannot_be_read_are_counted(tmp_path):
    fill(tmp_path, 4)
    Image.new("RGB", (9, 9), (0, 255, 0)).save(tmp_path / "loose.png")
    (tmp_path / "red/3.png").write_bytes(b"")
    options = DataOptions(dataset=f"imagefolder:{tmp_path}", image_size=16)
    images, notes = data.foreign(options)
    assert images.shape == (8, 3, 16, 16)
    assert sorted(image.mean(axis=(1, 2)).argmax() for image in images) == [0] * 3 + [1] + [2] * 4
    assert "1 files cannot be read and are left out, as" in notes[-1]
    assert "red/3.png" in notes[-1]
    assert len(data.foreign(options, 3)[0]) == 3


def test_of_a_foreign_folder_with_splits_the_test_split_is_used_and_said(tmp_path):
    fill(tmp_path / "train"), fill(tmp_path / "test", 3)
    images, notes = data.foreign(DataOptions(dataset=f"imagefolder:{tmp_path}", image_size=16))
    assert len(images) == 6
    assert "only test/ is read" in notes[0]


def test_a_foreign_folder_without_a_readable_image_is_refused(tmp_path):
    options = DataOptions(dataset=f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match="holds no images"):
        data.foreign(options)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="none of 1 images can be read"):
        data.foreign(options)
