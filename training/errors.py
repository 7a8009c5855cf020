"""What can go wrong in training. Every command prints the message on one line and exits with code 2.

TrainingError
├── ConfigError      options that cannot be carried out
├── ImportStringError    `package.module:attribute` that does not lead anywhere
├── DataError        a data set that is unknown, missing or malformed
├── NetworkError     a network that is unknown, cannot be built, or gives no logits
├── CheckpointError  a checkpoint that cannot be read, or belongs to another network
├── DivergenceError  the loss is NaN or infinite
├── RunError         the run folder is in use, or was made by other code or data
└── ExportError      ONNX export failed, or the exported member answers differently
"""

from models_store.errors import ModepathError


class TrainingError(ModepathError):
    """Anything that stops a training for a reason the user can mend."""


class ConfigError(TrainingError):
    """Options that cannot be carried out."""


class ImportStringError(TrainingError):
    """An import string that does not lead anywhere."""


class DataError(TrainingError):
    """A data set that is unknown, missing or malformed."""


class NetworkError(TrainingError):
    """A network that is unknown, cannot be built, or gives no logits."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be read, or belongs to another network."""


class DivergenceError(TrainingError):
    """The loss is NaN or infinite."""


class RunError(TrainingError):
    """The run folder is in use, or was made by other code or data."""


class ExportError(TrainingError):
    """ONNX export failed, or the exported member answers differently from torch."""
