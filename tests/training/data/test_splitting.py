import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import data
from training.data import DataOptions, splitting
from training.errors import DataError


@given(st.integers(0, 2**16), st.floats(0.05, 0.5))
@settings(max_examples=30, deadline=None)
def test_groups_are_never_divided_and_every_row_is_in_one_part(seed, share):
    rng = np.random.default_rng(seed)
    labels, groups = rng.integers(0, 3, 300), rng.integers(0, 60, 300)
    stay, aside = splitting.by_group(labels, groups.tolist(), share, seed)
    assert sorted([*stay, *aside]) == list(range(300))
    assert not set(groups[stay]) & set(groups[aside])
    assert 0 < len(aside) < 300


def test_groups_keep_the_share_and_the_shares_of_the_classes():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), 10)
    labels = np.repeat(rng.integers(0, 4, 200), 10)
    _, aside = splitting.by_group(labels, groups.tolist(), 0.2, 0)
    assert len(aside) / 2000 == pytest.approx(0.2, abs=0.03)
    np.testing.assert_allclose(np.bincount(labels[aside]) / len(aside), np.bincount(labels) / 2000, atol=0.05)


def test_one_group_cannot_be_divided():
    with pytest.raises(DataError, match="All rows belong to one group"):
        splitting.by_group(np.array([0, 1, 0]), ["a", "a", "a"], 0.2, 0)


def test_more_folds_than_rows_of_a_class_still_divide():
    stay, aside = splitting.by_group(np.array([0, 1, 2, 3]), [0, 1, 2, 3], 0.1, 0)
    assert len(stay) + len(aside) == 4
    assert len(aside)


def test_validation_is_stratified_on_request():
    labels = torch.tensor([0] * 950 + [1] * 50)
    made = {"train": (torch.rand(1000, 4), labels), "test": (torch.rand(10, 4), torch.tensor([0, 1] * 5))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.data.sources.find.import_string", lambda _: lambda: made)
        found = data.load(DataOptions("a:b", validation=0.2, stratify=True))
    assert found.validation.labels.bincount().tolist() == [190, 10]
    assert found.train.labels.bincount().tolist() == [760, 40]


def test_groups_and_weights_of_a_data_set_follow_their_rows(monkeypatch):
    x = torch.arange(400.0)[:, None].repeat(1, 3)
    groups = [f"patient {row // 4}" for row in range(400)]
    made = {"train": (x, torch.arange(400) % 2), "test": (torch.rand(10, 3), torch.tensor([0, 1] * 5))}
    made |= {"groups": groups, "weights": np.arange(400) + 1.0, "classes": ["no", "yes"]}
    monkeypatch.setattr("training.data.sources.find.import_string", lambda _: lambda: made)
    found = data.load(DataOptions("a:b", validation=0.25, limit=100))
    rows = {name: getattr(found, name).images[:, 0].long() for name in ("train", "validation")}
    assert not {groups[i] for i in rows["train"]} & {groups[i] for i in rows["validation"]}
    assert len(rows["train"]) == 100
    assert found.weights.tolist() == (rows["train"] + 1.0).tolist()


def test_groups_of_another_number_than_the_rows_are_refused(monkeypatch):
    made = {"train": (torch.rand(8, 3), torch.arange(8) % 2), "test": (torch.rand(4, 3), torch.tensor([0, 1, 0, 1]))}
    monkeypatch.setattr("training.data.sources.find.import_string", lambda _: lambda: {**made, "groups": [1, 2, 3]})
    with pytest.raises(DataError, match="gives 3 groups for 8 training rows"):
        data.load(DataOptions("a:b"))


def test_a_table_keeps_the_rows_of_a_group_in_one_split(tmp_path):
    lines = [f"{i},{i // 5},{['no', 'yes'][i // 5 % 2]}" for i in range(300)]
    (tmp_path / "t.csv").write_text("\n".join(["number,patient,label", *lines]))
    found = data.load(DataOptions(f"csv:{tmp_path / 't.csv'}", group="patient"))
    assert found.shape == (1,)  # the group is not a feature
    patients = [set((split.images[:, 0].long() // 5).tolist()) for split in (found.train, found.validation, found.test)]
    assert not patients[0] & patients[1]
    assert not patients[0] & patients[2]
    assert not patients[1] & patients[2]
    assert set().union(*patients) == set(range(60))


def test_an_image_folder_keeps_the_images_that_a_pattern_groups_in_one_split(tmp_path):
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for patient in range(15):
            for shot in range(2):
                Image.new("RGB", (4, 4), (patient, 0, 0)).save(tmp_path / label / f"p{patient}_{shot}.png")
    found = data.load(DataOptions(f"imagefolder:{tmp_path}", group=r"p(\d+)_", image_size=4))
    red = [
        set((split.images[:, 0, 0, 0] * 255).round().int().tolist())
        for split in (found.train, found.validation, found.test)
    ]
    assert not red[0] & red[1]
    assert not red[0] & red[2]
    assert set().union(*red) == set(range(15))
    with pytest.raises(DataError, match="finds nothing in"):
        data.load(DataOptions(f"imagefolder:{tmp_path}", group=r"q(\d+)_", image_size=4))


def test_a_group_of_another_data_set_is_refused():
    with pytest.raises(DataError, match="--group is a column of a csv"):
        data.load(DataOptions("digits", group="patient"))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
def test_groups_of_very_different_sizes_come_as_close_to_the_share_as_whole_groups_can(share):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        sizes = np.maximum(1, rng.lognormal(2, 1, 40).astype(int))
        groups = np.repeat(np.arange(40), sizes)
        _, aside = splitting.by_group(rng.integers(0, 3, len(groups)), groups.tolist(), share, seed)
        assert abs(len(aside) / len(groups) - share) < 0.06
    for seed in range(5):  # one group has most rows: it is never set aside
        groups = np.repeat([0, 1, 2], [800, 100, 100])
        _, aside = splitting.by_group(np.arange(1000) % 2, groups.tolist(), 0.2, seed)
        assert len(aside) in (100, 200)


def test_a_share_that_groups_cannot_reach_is_told():
    assert splitting.note(10, 100, 0.1, "test") == []
    (told,) = splitting.note(80, 100, 0.1, "test")
    assert "80% of the rows instead of 10%" in told


def test_rows_without_a_group_are_refused(tmp_path):
    lines = [f"{i},{'' if i < 5 else i // 5},{['no', 'yes'][i % 2]}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["number,patient,label", *lines]))
    with pytest.raises(DataError, match=r"5 rows of .* have no group in 'patient'"):
        data.load(DataOptions(f"csv:{tmp_path / 't.csv'}", group="patient"))


def test_the_fingerprint_changes_with_weights_and_not_without_them(monkeypatch):
    x = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    made = {"train": (x, torch.arange(20) % 2), "test": (x, torch.arange(20) % 2)}

    def fingerprint(**more):
        monkeypatch.setattr("training.data.sources.find.import_string", lambda _: lambda: {**made, **more})
        return data.load(DataOptions("a:b")).fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(weights=np.ones(20)), fingerprint(weights=np.arange(20) + 1)}) == 3


def test_options_of_one_data_set_are_not_applied_to_another():
    options = DataOptions(
        "csv:a.csv", label="y", group="g", tokenizer="t.json", text="x", transforms=("RandAugment",), hold_out=("a",)
    )
    assert options.of_other("digits") == DataOptions("digits", hold_out=("a",))
    assert options.of_other("csv:b.csv") == DataOptions(
        "csv:b.csv", label="y", tokenizer="t.json", text="x", hold_out=("a",)
    )


@pytest.mark.parametrize("options", [{"longest": 0, "tokenizer": "t.json"}, {"text": "x"}, {"longest": 3}])
def test_options_that_do_not_apply_are_refused(options):
    with pytest.raises(DataError):
        data.load(DataOptions("digits", **options))
