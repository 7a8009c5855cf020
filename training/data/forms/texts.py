"""The tokenizer of a data set of texts: a file, or one of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models_store.errors import MemberError
from models_store.inputs.texts import PACKAGE, Tokenizer
from training.data.forms import TokenForm
from training.errors import DataError


def form(file: str | Path | bytes, longest: int | None) -> TokenForm:
    """The form of texts that this tokenizer reads.

    Args:
        file: tokenizer.json of the package tokenizers, or its content.
        longest: tokens to which longer texts are cut, in training and in serving; None: as the file says, or never.

    Raises:
        DataError: the file cannot be read, or is not such a tokenizer.
    """
    try:
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
        read = Tokenizer(content)
        if longest is not None:
            content = _cutting(content, longest)
    except OSError as error:
        raise DataError(
            f"--tokenizer {file} cannot be read: {error.strerror}. It is the file tokenizer.json."
        ) from None
    except MemberError as error:
        raise DataError(f"--tokenizer: {error}") from None
    return TokenForm(read.vocabulary, longest, content)


def _cutting(content: bytes, longest: int) -> bytes:
    import tokenizers

    found: Any = tokenizers.Tokenizer.from_buffer(content)
    found.enable_truncation(longest)
    return found.to_str().encode()


def of_bytes() -> bytes:
    """A tokenizer whose ids are the UTF-8 bytes of a text + 1.

    Raises:
        DataError: the package tokenizers is not installed.
    """
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers
    except ImportError:
        raise DataError(f"Texts need the package tokenizers: {PACKAGE}.") from None
    names: dict[str, int] = {"[PAD]": 0}
    for name, byte in _names_of_bytes().items():
        names[name] = byte + 1
    found: Any = tokenizers.Tokenizer(models.BPE(vocab=names, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    return found.to_str().encode()


def _names_of_bytes() -> dict[str, int]:
    """The characters that the package writes for each byte: printable ones for themselves, the others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
