"""Errors of the store.

ModepathError              base class of all errors here, in training and in the service
StoreError
├── InvalidNameError       a name or version that cannot be a folder of the store
├── EnsembleNotFoundError  nothing of that name (or version) is published
├── ManifestError          a manifest that does not follow FORMAT.md
├── MemberError            an ONNX file that does not follow FORMAT.md, or that gives wrong answers
├── CorruptionError        a file that is missing, or whose hash is not the manifest's
├── LineageError           a network without weights that can be compared with others
├── SignatureError         a version that no trusted key signed
├── StoreReadError         the store exists, but cannot be listed or read
└── StoreWriteError        the disk is full, or the store cannot be written
ProviderError              a requested execution provider that is not available
DecodeError                an image file that cannot be decoded to an array
FieldError                 a row of a table that does not have the fields of an ensemble
"""


class ModepathError(Exception):
    """Base class of all errors. The message states what was wrong, the likely cause, and what to do."""


class StoreError(ModepathError):
    """Base class of errors in the store or its contents. The message states what was wrong, why, and what to do."""


class InvalidNameError(StoreError):
    """A name or version that cannot be a folder of the store."""


class EnsembleNotFoundError(StoreError):
    """Nothing of that name, or no such version, is published."""


class LineageError(StoreError):
    """A network without weights that can be compared with others."""


class ManifestError(StoreError):
    """A manifest that does not follow FORMAT.md."""


class MemberError(StoreError):
    """An ONNX file that does not follow FORMAT.md, or whose answers are wrong."""


class CorruptionError(StoreError):
    """A file that is missing, or whose hash is not the one in the manifest."""


class SignatureError(StoreError):
    """A version without a signature that is trusted, or a key that cannot be used."""


class StoreReadError(StoreError):
    """The store or one of its files exists but cannot be read: permissions, or a disk that does not respond."""


class StoreWriteError(StoreError):
    """The store cannot be written: permissions, a full or failing disk. The message states what was published."""


class ProviderError(ModepathError):
    """A requested execution provider that is not available."""


class DecodeError(ModepathError):
    """An image file that cannot be decoded. The message begins in lower case, so that callers can prefix the file."""


class TextError(ModepathError):
    """A text that cannot become token ids. The message begins with its number."""


class FieldError(ModepathError):
    """A row of a table that does not have the fields that an ensemble takes. The message begins with the row's number."""
