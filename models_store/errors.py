"""What can go wrong in the store.

ModepathError              the root of all errors, here, in training and in the service
StoreError
├── InvalidNameError       a name or version that cannot be a folder of the store
├── EnsembleNotFoundError  nothing of that name (or version) is published
├── ManifestError          a manifest that does not follow FORMAT.md
├── MemberError            an ONNX file that does not follow FORMAT.md, or that gives wrong answers
├── CorruptionError        a file that is missing, or whose hash is not the manifest's
├── LineageError           a network of which nothing can be compared with others
├── StoreReadError         the store is there, but cannot be listed or read
└── StoreWriteError        the disk is full, or the store cannot be written
ProviderError              an execution provider that was asked for and is not there
DecodeError                an image file that cannot become an array
"""


class ModepathError(Exception):
    """Anything that went wrong for a reason that the message gives, with its likely cause and what to do."""


class StoreError(ModepathError):
    """Anything wrong with the store or what lies in it. The message says what, why, and what to do."""


class InvalidNameError(StoreError):
    """A name or version that cannot be a folder of the store."""


class EnsembleNotFoundError(StoreError):
    """Nothing of that name, or no such version, is published."""


class LineageError(StoreError):
    """A network of which nothing can be compared with others."""


class ManifestError(StoreError):
    """A manifest that does not follow FORMAT.md."""


class MemberError(StoreError):
    """An ONNX file that does not follow FORMAT.md, or whose answers are wrong."""


class CorruptionError(StoreError):
    """A file that is missing, or whose hash is not the one in the manifest."""


class StoreReadError(StoreError):
    """The store, or a file of it, is there but cannot be listed or read: permissions, or a disk that does not answer."""


class StoreWriteError(StoreError):
    """The store cannot be written: permissions, a full disk, or one that fails. The message says what was published."""


class ProviderError(ModepathError):
    """An execution provider that was asked for and is not available."""


class DecodeError(ModepathError):
    """An image file that cannot become an array. The message begins in lower case: who catches it says which image."""
