"""The errors that mmllm raises on purpose: each message says what was wrong, where, and what to do.

Anything a caller can cause is a subclass of `BadInput`; serving turns those into a 4xx and nothing else.
"""


class MmllmError(Exception):
    """Base of every error that mmllm raises on purpose; its message is one readable line."""


class ConfigError(MmllmError):
    """A YAML file, profile or recipe that cannot be used as written."""


class WeightsError(MmllmError):
    """Weights or data that could not be fetched, verified or opened."""


class DataError(MmllmError):
    """A file of training conversations that cannot be used as it stands."""


class FeatureStoreError(MmllmError):
    """A feature store that cannot be reached, or used as asked."""


class BundleError(MmllmError):
    """A bundle that is missing, incomplete or altered."""


class ExportError(MmllmError):
    """A bundle that cannot be written in the format that was asked for, or not be sent where it should go."""


class EnvironmentLack(MmllmError):
    """Something that this machine lacks: a compiler, disk, memory, a free port."""


class TrainingError(MmllmError):
    """A training run that cannot go on."""


class EngineError(MmllmError):
    """A generation engine that failed while it served a request."""


class DeadlineError(EngineError):
    """A request whose time was up before its answer was complete."""


class BadInput(MmllmError):
    """Input that a caller can mend.

    Args:
        message: what was wrong and what to do, for a person.
        param: the field it concerns, e.g. `messages.0.content.1.image_url`; None if it concerns the whole request.
    """

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None):
        # Both arguments go to Exception so that the error survives pickling between Ray actors.
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class ImageError(BadInput):
    """Bytes that are not a usable image."""

    code = "invalid_image"


class AudioError(BadInput):
    """Bytes that are not usable audio."""

    code = "invalid_audio"


class ConversationError(BadInput):
    """A conversation that cannot be rendered: bad turn order, too long, nothing to learn from."""

    code = "invalid_conversation"


def first_line(error: BaseException) -> str:
    """What an exception of another's making says, for a message of ours; its kind where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class SchemaError(BadInput):
    """A JSON schema that no answer can be bound to."""

    code = "invalid_schema"
