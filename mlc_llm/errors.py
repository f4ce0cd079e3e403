"""Every exception mlc_llm raises for a user mistake or an outside failure.

Knows no other module. Messages say what was wrong, the value, and what to do. `cli/main.py` turns
classes into exit codes; nothing else may.

    MlcError
    ├── OptionError              a flag, override or /set value that is not valid
    ├── ModelError               something is wrong with a model on disk
    │   ├── ModelNotFound        no such directory, file or repository; or nothing in it
    │   ├── UnsupportedModel     an architecture, feature or format we do not implement
    │   ├── CorruptFile          truncated, damaged or half-written file
    │   ├── ParameterMismatch    missing, surplus or wrongly shaped tensor
    │   └── TemplateError        a chat template that is broken, hostile or refuses the messages
    ├── LibraryError             a compiled library that cannot be used here
    │   └── LibraryMismatch      built for another model, quantization, CPU or compiler
    ├── CompileError             the compiler failed
    │   └── LinkerNotFound       `-o lib.so` needs a linker and there is none
    ├── DeviceError              no such device, or it cannot be used
    ├── DownloadError            network, authentication or missing revision
    ├── StorageError             disk full, not writable, cache policy forbids writing
    └── RequestError             one request cannot be served; others go on
        ├── ContextTooLong       the prompt does not fit the context window
        ├── UnknownModel         the request names a model that is not served here
        ├── AuthenticationError  the API key is missing or wrong
        ├── QueueFull            too many requests wait; try again later
        ├── RequestTimeout       the request took longer than it may
        ├── StepFailed           the step that computed the request failed; not the caller's fault
        └── EngineStopped        the engine is shutting down or has died
"""


class MlcError(Exception):
    """Base of all errors with a message meant for the user."""


class OptionError(MlcError):
    """A flag, override or setting has a value we cannot accept."""


class ModelError(MlcError):
    """Something is wrong with a model on disk."""


class ModelNotFound(ModelError):
    """There is no model where the user pointed."""


class UnsupportedModel(ModelError):
    """The model is real but uses something we do not implement."""


class CorruptFile(ModelError):
    """A file is truncated, damaged or was only half written."""


class ParameterMismatch(ModelError):
    """A tensor is missing, surplus, or has the wrong shape or dtype."""


class TemplateError(ModelError):
    """A chat template is broken, hostile, or refuses the given messages."""


class LibraryError(MlcError):
    """A compiled library cannot be loaded."""


class LibraryMismatch(LibraryError):
    """A compiled library was built for another model, quantization, CPU or compiler."""


class CompileError(MlcError):
    """The compiler failed; the message names the stage."""


class LinkerNotFound(CompileError):
    """A shared library was asked for and no linker is installed."""


class DeviceError(MlcError):
    """The device does not exist here or cannot be used."""


class DownloadError(MlcError):
    """A download failed: network, authentication, or no such revision."""


class StorageError(MlcError):
    """Writing failed: disk full, no permission, or the cache policy forbids it."""


class RequestError(MlcError):
    """One request cannot be served; the engine and other requests go on.

    param names the field of the request that is at fault, as in OpenAI's error bodies.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLong(RequestError):
    """The prompt has more tokens than the context window."""


class UnknownModel(RequestError):
    """The request names a model that is not served here."""


class AuthenticationError(RequestError):
    """The API key is missing or wrong."""


class QueueFull(RequestError):
    """Too many requests wait; `retry_after_s` is when to try again, in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestTimeout(RequestError):
    """The request took longer than it may."""


class StepFailed(RequestError):
    """The step that computed the request failed; other requests go on."""


class EngineStopped(RequestError):
    """The engine is shutting down or has died and takes no requests."""
