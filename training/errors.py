"""Errors of training. Every command prints the message on one line and exits with code 2.

TrainingError
├── ConfigError      options that are invalid or contradict each other
├── ImportStringError    a `package.module:attribute` that cannot be imported
├── DataError        a data set that is unknown, missing or malformed
├── NetworkError     a network that is unknown, cannot be built, or does not return logits
├── CheckpointError  a checkpoint that cannot be read, or belongs to another network
├── DivergenceError  the loss is NaN or infinite
├── DeviceMemoryError  a batch needs more memory than the GPU has
├── RunError         the run folder is in use, or was begun with other code or data
└── ExportError      ONNX export failed, or the exported member gives different outputs
"""

from models_store.errors import ModepathError


class TrainingError(ModepathError):
    """Base class of errors that stop a training and that the user can correct."""


class ConfigError(TrainingError):
    """Options that are invalid or contradict each other."""


class ImportStringError(TrainingError):
    """An import string that cannot be imported."""


class DataError(TrainingError):
    """A data set that is unknown, missing or malformed."""


class NetworkError(TrainingError):
    """A network that is unknown, cannot be built, or does not return logits."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be read, or belongs to another network."""


class DeviceMemoryError(TrainingError):
    """A batch needs more memory than the GPU has."""


class DivergenceError(TrainingError):
    """The loss is NaN or infinite."""


class RunError(TrainingError):
    """The run folder is in use, or was begun with other code or data."""


class ExportError(TrainingError):
    """ONNX export failed, or the exported member gives other outputs than torch."""
