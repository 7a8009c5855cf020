"""Texts as token ids, by the tokenizer that a version brings: the file tokenizer.json of Hugging Face's `tokenizers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models_store.errors import MemberError, TextError
from models_store.manifest import PADDING, TOKENIZER_FILE, InputSpec

# Longer texts are refused unread: megabytes would keep a thread for minutes. No tokenizer needs so many characters for a token.
CHARACTERS, CHARACTERS_OF_A_TOKEN = 1000, 100
PACKAGE = "pip install 'modepath[texts]'"


class Tokenizer:
    """Turns texts into ids. Padding is left out: the ensemble fills texts up itself."""

    def __init__(self, content: bytes):
        """Read a tokenizer.

        Args:
            content: of the file.

        Raises:
            MemberError: the package `tokenizers` is not installed, the content is not a tokenizer, or its id 0 is a token of texts.
        """
        try:
            import tokenizers
        except ImportError:
            raise MemberError(f"Texts need the package tokenizers: {PACKAGE}.") from None
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises Exception itself
            raise MemberError(
                f"{TOKENIZER_FILE} is not a tokenizer of the package tokenizers: {str(error)[:200]}"
            ) from None
        padding: Any = self._tokenizer.padding
        first: Any = self._tokenizer.id_to_token(PADDING)
        named = isinstance(first, str) and "pad" in first.lower()
        if first is not None and not named and (padding is None or padding["pad_id"] != PADDING):
            raise MemberError(
                f"The id {PADDING} of the tokenizer is {first!r}. It must be the padding, or no token: ensembles fill texts up with {PADDING}. Add 1 to "
                "all ids of the tokenizer and of the network's embedding."
            )
        self._tokenizer.no_padding()

    @property
    def vocabulary(self) -> int:
        """Number of ids: one more than the largest."""
        found: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return 1 + max(found.values(), default=PADDING)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text. A text that is too long is cut if the tokenizer's own `truncation` says so."""
        # Not its batch function, which starts a thread for each core.
        return [self._tokenizer.encode(text).ids for text in texts]

    def fitting(self, texts: Sequence[str], spec: InputSpec) -> list[list[int]]:
        """The ids of each text, as this input takes them.

        Raises:
            TextError: a text has no token, or too many of them, or one that the vocabulary lacks.
        """
        assert spec.vocabulary is not None, "tokens have a vocabulary"
        longest = CHARACTERS + CHARACTERS_OF_A_TOKEN * spec.shape[0]
        if self._tokenizer.truncation is not None:
            left: bool = self._tokenizer.truncation["direction"] == "left"  # the beginning of a text is cut off
            found = self.ids([text[-longest:] if left else text[:longest] for text in texts])
        elif (row := next((row for row, text in enumerate(texts) if len(text) > longest), None)) is not None:
            raise TextError(
                f"text {row} has {len(texts[row])} characters, more than {spec.shape[0]} tokens. Shorten it"
            )
        else:
            found = self.ids(texts)
        for row, ids in enumerate(found):
            if not ids:
                raise TextError(f"text {row} has no token; a text has at least one")
            if len(ids) > spec.shape[0]:
                raise TextError(f"text {row} has {len(ids)} tokens; at most {spec.shape[0]} are allowed. Shorten it")
            if max(ids) >= spec.vocabulary or min(ids) == PADDING:
                raise TextError(f"text {row} has a token that the ensemble does not know")
        return found
