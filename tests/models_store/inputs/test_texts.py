import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers")
from models_store.errors import MemberError, TextError  # noqa: E402
from models_store.inputs.texts import Tokenizer  # noqa: E402
from models_store.manifest import InputSpec  # noqa: E402

WORDS = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "film": 4}
SPEC = InputSpec(kind="tokens", shape=(4,), vocabulary=5, tokenizer=True)


def of_words(vocabulary=WORDS, unknown="[UNK]", **settings):
    from tokenizers import models, pre_tokenizers

    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if settings.get("padding"):
        made.enable_padding(length=8, pad_id=settings["padding"] - 1)
    if settings.get("truncation"):
        made.enable_truncation(settings["truncation"])
    return made.to_str().encode()


def test_texts_become_the_ids_of_the_tokenizer_without_its_padding():
    made = Tokenizer(of_words(padding=1))
    assert made.ids(["good film", "bad", "strange film"]) == [[2, 4], [3], [1, 4]]
    assert made.vocabulary == 5


@given(st.lists(st.sampled_from(["good", "bad", "film", "strange"]), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_a_text_either_fits_or_is_refused_with_its_number(words):
    made = Tokenizer(of_words())
    if len(words) > 4:
        with pytest.raises(TextError, match=f"text 1 has {len(words)} tokens; at most 4"):
            made.fitting(["good", " ".join(words)], SPEC)
    else:
        assert made.fitting([" ".join(words)], SPEC) == [[WORDS.get(word, 1) for word in words]]


def test_a_tokenizer_that_cuts_does_so():
    made = Tokenizer(of_words(truncation=3))
    assert made.fitting(["good film " * 500_000], SPEC) == [[2, 4, 2]]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""], "text 0 has no token"),
        (["good", "  "], "text 1 has no token"),
        (["good" * 10_000], "text 0 has 40000 characters"),
        (["[PAD]"], "a token that the ensemble does not know"),
    ],
)
def test_a_text_that_cannot_be_asked_is_refused(texts, message):
    made = Tokenizer(of_words({**WORDS, "[PAD]": 0}))
    if texts == ["[PAD]"]:
        raw = json.loads(of_words())
        raw["added_tokens"] = [
            {"id": 0, "content": "[PAD]", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        ]  # fmt: skip
        made = Tokenizer(json.dumps(raw).encode())
    with pytest.raises(TextError, match=message):
        made.fitting(texts, SPEC)


def test_a_larger_vocabulary_than_the_ensembles_is_refused():
    made = Tokenizer(of_words({**WORDS, "new": 5}))
    with pytest.raises(TextError, match="does not know"):
        made.fitting(["new"], SPEC)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"version": "1.0", "model": {"type": "X"}}'])
def test_another_file_is_refused(content):
    with pytest.raises(MemberError, match="is not a tokenizer"):
        Tokenizer(content)


def test_a_tokenizer_whose_id_0_is_a_word_is_refused():
    with pytest.raises(MemberError, match="The id 0 of the tokenizer is 'good'"):
        Tokenizer(of_words({"good": 0, "[UNK]": 1}))
    with pytest.raises(MemberError, match="The id 0 of the tokenizer is 'good'"):
        Tokenizer(of_words({"good": 0, "[UNK]": 1, "[PAD]": 2}, padding=3))
    assert Tokenizer(of_words({"good": 1, "[UNK]": 2})).vocabulary == 3  # 0 is no token


def test_a_tokenizer_that_cuts_the_beginning_sees_the_end_of_a_long_text():
    raw = json.loads(of_words(truncation=3))
    raw["truncation"]["direction"] = "Left"
    made = Tokenizer(json.dumps(raw).encode())
    assert made.fitting(["good " * 5000 + "bad film"], SPEC) == [[2, 3, 4]]
