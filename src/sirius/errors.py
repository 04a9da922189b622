"""What can go wrong, as exceptions whose message names the numbers and a way out.

SiriusError
├── ConfigError            an option is out of range, or two options exclude each other
├── RequestError           a prompt cannot be decoded: empty, too long, not tokens of this model
│   └── OutOfMemoryError       there is no memory for it
├── FileError              a file cannot be read or written, or a line of it is broken
├── SandboxError           generated code cannot be contained on this machine
└── ModelError             a model cannot be loaded
    └── UnsupportedModelError  a model was understood, and does not fit the method
"""


class SiriusError(Exception):
    """The base of every error that a user's input can cause."""


class ConfigError(SiriusError, ValueError):
    """An option is out of range, or two options exclude each other."""


class RequestError(SiriusError, ValueError):
    """A prompt cannot be decoded: it is empty, too long, or not made of this model's tokens."""


class OutOfMemoryError(RequestError):
    """There is no memory for a text, or none for it to go on."""


class FileError(SiriusError, OSError):
    """A file cannot be read or written, or a line of it is broken."""


class SandboxError(SiriusError):
    """Generated code cannot be contained on this machine, so none is run."""


class ModelError(SiriusError):
    """A model cannot be loaded."""


class UnsupportedModelError(ModelError):
    """A model was understood, and its structure does not fit the method."""
