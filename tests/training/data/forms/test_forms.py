import numpy as np
import pytest
import torch

from training.data.contract import Contract
from training.data.forms import FeatureForm, TokenForm
from training.errors import DataError

ROWS, TEXTS = Contract("The train split of 'mine'", form=FeatureForm()), TokenForm(9)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.uint8, bool])
def test_features_of_any_type_become_float32(dtype):
    x = np.arange(12).reshape(4, 3).astype(dtype)
    found, labels = ROWS.arrays(x, np.arange(4) % 2)
    assert found.dtype == torch.float32
    assert found.numpy() == pytest.approx(x.astype(np.float32))
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (np.array([[1.0, np.nan], [0, 0]]), r"row 0, has a value that is NaN .*--missing mean"),
        (np.array([[1.0, 0], [np.inf, 0]]), "row 1, has a value that is infinite"),
        (np.zeros((2, 0)), "with a number at least"),
        (np.zeros(2), r"must be \(N, …\)"),
        (np.array([["a"], ["b"]]), "cannot become a tensor"),
    ],
)
def test_features_that_are_no_numbers_are_refused_with_their_row(x, told):
    with pytest.raises(DataError, match=told):
        ROWS.arrays(x, np.arange(len(x)))


def test_rows_of_a_data_set_are_read_one_by_one():
    found, labels = ROWS.read([(np.ones(3), 0), ([0.5, 1, 2], 1)], [0, 1])
    assert found.tolist() == [[1, 1, 1], [0.5, 1, 2]]
    assert labels.tolist() == [0, 1]


def test_texts_of_several_lengths_are_filled_up():
    found = TEXTS.whole([[1, 2], [3, 4, 5], [6]], "Texts")
    assert found.tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]
    known = TEXTS.of_length(3)
    assert known.one([7], "Row").tolist() == [7, 0, 0]
    assert known.whole(torch.tensor([[1, 2, 3, 0]]), "Texts").tolist() == [[1, 2, 3]]
    with pytest.raises(DataError, match="more than 3 tokens"):
        known.whole(torch.tensor([[1, 2, 3, 4]]), "Texts")


@pytest.mark.parametrize(
    ("x", "told"),
    [
        ([[1.5, 2.0]], "a text is integers"),
        (torch.zeros(3, 2), r"integers \(N, length\)"),
        (torch.tensor([[1, 9]]), "they go from 1 to 8"),
        (torch.tensor([[0, 1]]), "before a token"),
        (torch.tensor([[1], [0]]), "without tokens"),
    ],
)
def test_what_are_no_token_ids_is_refused(x, told):
    contract = Contract("Texts", form=TEXTS)
    with pytest.raises(DataError, match=told):
        contract.arrays(x, np.zeros(len(x), int))


def test_the_tokenizer_of_bytes_gives_the_bytes_of_any_text():
    from models_store.inputs.texts import Tokenizer
    from training.data.forms import texts

    made = Tokenizer(texts.of_bytes())
    every = "".join(map(chr, [*range(0x20, 0x250), 0x20AC, 0x1F600])) + "\n\t"
    assert made.ids([every, "Köln  a"]) == [[b + 1 for b in text.encode()] for text in (every, "Köln  a")]
    assert made.vocabulary == 257


def test_texts_of_a_table_become_ids_and_longer_ones_are_cut_in_training_and_serving(tmp_path):
    from models_store.inputs.texts import Tokenizer
    from training import data
    from training.data.forms import texts

    (tmp_path / "tokenizer.json").write_bytes(texts.of_bytes())
    lines = [f"{'ja' if i % 2 else 'yes'} {i},{['de', 'en'][(i + 1) % 2]},{i // 3}" for i in range(120)]
    (tmp_path / "t.csv").write_text("\n".join(["said,language,speaker", *lines]))
    options = {"tokenizer": str(tmp_path / "tokenizer.json"), "text": "said", "label": "language", "group": "speaker"}
    found = data.load(data.DataOptions(f"csv:{tmp_path / 't.csv'}", longest=4, **options))
    assert found.classes == ["de", "en"]
    assert (found.input.kind, found.shape, found.input.vocabulary, found.input.tokenizer) == ("tokens", (4,), 257, True)
    first = bytes((found.train.images[0] - 1).tolist())[: int((found.train.images[0] > 0).sum())]
    assert first.startswith(b"ja ") or first == b"yes "
    assert (found.train.labels == (found.train.images[:, 0] - 1 == ord("y"))).all()
    assert Tokenizer(found.tokenizer).fitting(["a long text"], found.input) == [[b + 1 for b in b"a lo"]]
    with pytest.raises(DataError, match="has no column 'text'"):
        data.load(data.DataOptions(f"csv:{tmp_path / 't.csv'}", tokenizer=options["tokenizer"], label="language"))
    with pytest.raises(DataError, match="give --tokenizer FILE"):
        data.load(data.DataOptions(f"csv:{tmp_path / 't.csv'}", text="said", label="language"))
    with pytest.raises(DataError, match="cannot be read"):
        data.load(data.DataOptions(f"csv:{tmp_path / 't.csv'}", tokenizer=str(tmp_path / "none.json")))
