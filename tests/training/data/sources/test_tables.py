import numpy as np
import pytest
import torch

from models_store.manifest import TableField
from training import data
from training.data import DataOptions
from training.errors import DataError

CSV = "age,colour,open,label\n" + "".join(
    f"{20 + i},{['red', 'blue', ''][i % 3]},{['true', 'false'][i % 2]},{['no', 'yes'][i % 2]}\n" for i in range(60)
)


def table(tmp_path, text=CSV, name="t.csv", **options):
    (tmp_path / name).write_text(text)
    return data.load(DataOptions(f"csv:{tmp_path / name}", **options))


def test_columns_become_features_and_the_encoding_is_kept(tmp_path):
    found = table(tmp_path)
    assert found.classes == ["no", "yes"]
    assert found.input.fields == [
        TableField(name="age"), TableField(name="colour", categories=["", "blue", "red"]),
        TableField(name="open", categories=["false", "true"]),
    ]  # fmt: skip
    assert (found.input.kind, found.shape, found.input.missing) == ("features", (6,), "refuse")
    sizes = [len(split) for split in (found.train, found.validation, found.test)]
    assert sum(sizes) == 60
    assert sizes[2] == 12
    assert found.test.labels.bincount().tolist() == [6, 6]  # in the shares of the classes
    x = torch.cat([split.images for split in (found.train, found.validation, found.test)])
    y = torch.cat([split.labels for split in (found.train, found.validation, found.test)])
    assert sorted(x[:, 0].tolist()) == list(range(20, 80))
    assert (x[:, 1:4].sum(dim=1) == 1).all()
    assert ((x[:, 0] - 20) % 2 == y).all()
    assert (x[:, 5] == 1 - y).all()


def test_missing_numbers_are_replaced_by_the_mean_in_the_graph(tmp_path):
    found = table(tmp_path, CSV.replace("25,", ",").replace("31,", ","))
    assert found.input.missing == "mean"
    assert any("missing numbers in age" in note for note in found.notes)
    x = torch.cat([split.images for split in (found.train, found.validation, found.test)])
    assert x.isnan().sum() == 2
    known = found.train.images[:, 0]
    assert found.mean[0] == pytest.approx(float(known[~known.isnan()].mean()), abs=1e-3)


def test_a_folder_may_bring_its_splits(tmp_path):
    for split, rows in (("train", 40), ("test", 10), ("validation", 5)):
        lines = CSV.splitlines()[: rows + 1]
        (tmp_path / f"{split}.csv").write_text("\n".join(lines))
    found = data.load(DataOptions(f"csv:{tmp_path}"))
    assert [len(split) for split in (found.train, found.validation, found.test)] == [40, 5, 10]
    assert not found.validation_cut


def test_parquet_is_read_like_csv(tmp_path):
    polars = pytest.importorskip("polars")
    polars.read_csv(CSV.encode()).write_parquet(tmp_path / "t.parquet")
    one, other = table(tmp_path), data.load(DataOptions(f"parquet:{tmp_path / 't.parquet'}"))
    assert one.fingerprint == other.fingerprint
    assert one.input == other.input


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        (CSV, {"label": "kind"}, "no column 'kind'.*--label.*age, colour, open, label"),
        (CSV, {"drop": ("size",)}, "--drop: .* no column 'size'"),
        (CSV, {"drop": ("age", "colour", "open")}, "no column beside 'label'"),
        ("a,label\n" + "".join(f"name{i},{i % 2}\n" for i in range(300)), {}, "300 different texts.*--drop"),
        ("", {}, "cannot be read as csv"),
    ],
)
def test_a_table_that_cannot_be_used_is_told_why(tmp_path, text, options, told):
    with pytest.raises(DataError, match=told):
        table(tmp_path, text, **options)


def test_arrays_are_features_images_or_tokens_by_their_type(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(50) % 2
    for name, x, extra, kind in (
        ("rows", rng.normal(size=(50, 4)), {}, "features"),
        ("images", rng.random((50, 1, 4, 4)), {}, "image"),
        ("texts", rng.integers(1, 9, (50, 7)), {"vocabulary": 9}, "tokens"),
        ("signals", rng.normal(size=(50, 3, 8)), {"kind": "features"}, "features"),
    ):
        np.savez(tmp_path / f"{name}.npz", x=x, y=y, **extra)
        found = data.load(DataOptions(f"npz:{tmp_path / name}.npz"))
        assert (found.input.kind, found.shape) == (kind, x.shape[1:])
        assert len(found.test) == 10
    np.savez(tmp_path / "three.npz", x=rng.normal(size=(50, 3, 8)), y=y)
    with pytest.raises(DataError, match="kind='features'"):  # grey images, or signals?
        data.load(DataOptions(f"npz:{tmp_path / 'three.npz'}"))
    np.savez(tmp_path / "given.npz", x=rng.normal(size=(9, 4)), y=y[:9], x_test=rng.normal(size=(5, 4)), y_test=y[:5])
    assert len(data.load(DataOptions(f"npz:{tmp_path / 'given.npz'}")).test) == 5
    np.savez(tmp_path / "none.npz", a=y)
    with pytest.raises(DataError, match="it needs x"):
        data.load(DataOptions(f"npz:{tmp_path / 'none.npz'}"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,label\n1,x\n2,\n3,y\n", "1 of the train rows .* have no class"),
        (",a,label\n0,1,x\n1,2,y\n", "column without a name"),
        ("a,label\n", "no rows"),
        ("a,label\n" + "".join(f"{i if i else 'NA'},{'xy'[i % 2]}\n" for i in range(40)), "seems to hold numbers, but also the text 'NA'"),
    ],
)  # fmt: skip
def test_tables_as_tools_write_them_are_told_what_is_wrong(tmp_path, text, told):
    with pytest.raises(DataError, match=told):
        table(tmp_path, text)


def test_nan_is_missing_and_whole_numbers_are_one_class_however_they_are_written(tmp_path):
    rows = [f"{'NaN' if i % 7 == 0 else i},{i % 2}" for i in range(60)]
    (tmp_path / "train.csv").write_text(
        "a,label\n" + "\n".join(row.replace(",0", ",0.0").replace(",1", ",1.0") for row in rows)
    )
    (tmp_path / "test.csv").write_text("a,label\n" + "\n".join(rows))
    found = data.load(DataOptions(f"csv:{tmp_path}"))
    assert found.classes == ["0", "1"]
    assert found.input.missing == "mean"


def test_features_of_any_scale_keep_their_spread(tmp_path):
    rng = np.random.default_rng(0)
    x = np.stack([3e-6 + 1e-7 * rng.normal(size=500), 1e6 + rng.normal(size=500), np.full(500, 5.0)], axis=1)
    np.savez(tmp_path / "x.npz", x=x.astype(np.float64), y=np.arange(500) % 2)
    found = data.load(DataOptions(f"npz:{tmp_path / 'x.npz'}"))
    assert found.std[0] == pytest.approx(1e-7, rel=0.1)
    assert found.mean[0] == pytest.approx(3e-6, rel=0.01)
    assert found.std[2] == 1.0  # a constant feature is left as it is


@pytest.mark.parametrize(
    "change",
    [{"y": np.arange(21) % 2}, {"groups": np.arange(19)}, {"groups": np.array(1)}, {"weights": np.ones(3)}, {"x/b": np.ones((25, 1))},
     {"x_test": np.ones((4, 2)), "y_test": np.arange(4) % 2}],
)  # fmt: skip
def test_arrays_of_different_lengths_are_refused(tmp_path, change):
    arrays = {"x/a": np.ones((20, 2)), "x/b": np.ones((20, 1)), "y": np.arange(20) % 2, **change}
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=r"one row each|named inputs"):
        data.load(DataOptions(f"npz:{tmp_path / 'd.npz'}"))


def test_a_tokenizer_is_not_for_arrays_of_ids(tmp_path):
    from training.data.forms import texts

    (tmp_path / "t.json").write_bytes(texts.of_bytes())
    np.savez(tmp_path / "d.npz", x=np.ones((20, 2)), y=np.arange(20) % 2)
    with pytest.raises(DataError, match="--tokenizer is for tables"):
        data.load(DataOptions(f"npz:{tmp_path / 'd.npz'}", tokenizer=str(tmp_path / "t.json")))


def test_the_longest_text_may_be_in_any_split(tmp_path):
    from training.data.forms import texts

    (tmp_path / "t.json").write_bytes(texts.of_bytes())
    lines = [f"{'a' * (1 + i)},{i % 2}" for i in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *lines]))
    for seed in range(6):
        found = data.load(DataOptions(f"csv:{tmp_path / 't.csv'}", tokenizer=str(tmp_path / "t.json"), split_seed=seed))
        assert found.shape == (40,)
        assert len(found.train) + len(found.validation) + len(found.test) == 40
