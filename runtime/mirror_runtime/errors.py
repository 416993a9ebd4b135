"""The exceptions of Mirror Runtime. A leaf: imports nothing of ours.

    MirrorError
    ├── BundleError        a bundle or run folder is missing, malformed or corrupted
    ├── ParityError        an artefact's vectors differ from the reference by more than its floor
    ├── EngineError        an engine cannot be loaded or failed while running
    │   └── MissingExtra   a package that the request needs is not installed
    ├── OverloadedError    too many texts wait already; nothing is wrong with this one
    ├── InputError         the caller's texts or files cannot be encoded
    │   └── TextError      one text of a batch; carries its position
    ├── ServerError        a model server did not start, or answered with a failure
    │   ├── UnavailableError        it cannot be reached, or refuses for now: another try may succeed
    │   └── DeadlineExceededError   no answer within the time that was given
    └── PeerError          another library could not be installed, or failed

Every message names what was wrong and what to do about it. Library users catch `MirrorError`; the command line prints
the message without a traceback and exits with status 2.
"""


class MirrorError(Exception):
    """Base of everything this package raises on purpose."""


class BundleError(MirrorError):
    """A bundle or run folder is missing, malformed or corrupted."""


class ParityError(MirrorError):
    """Vectors differ from the reference by more than the stated floor, or are not finite."""


class EngineError(MirrorError):
    """An engine cannot be loaded, cannot do what was asked, or failed while running."""


class MissingExtra(EngineError):
    """A package that the request needs is not installed; the message holds the install command.

    Args:
        package: the import name that is missing.
        extra: the extra of `mirror-runtime` that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'mirror-runtime[{extra}]'")
        self.package = package
        self.extra = extra


class OverloadedError(MirrorError):
    """Too many texts wait for an encoder already. Nothing was queued: the same call may succeed later.

    Args:
        message: what was refused.
        retry_after_s: after how many seconds another try makes sense; None where nobody said.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class InputError(MirrorError):
    """The caller's texts, files or options cannot be used as given."""


class TextError(InputError):
    """One text of a batch cannot be encoded.

    Args:
        index: the text's 0-based position in what the caller passed.
        reason: what is wrong with it and the cure.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"text {index}: {reason}")
        self.index = index
        self.reason = reason


class ServerError(MirrorError):
    """A model server did not start, is not ready, or answered a request with a failure."""


class UnavailableError(ServerError):
    """A model server cannot be reached, or takes no requests for now: it starts, stops, or is being replaced."""


class DeadlineExceededError(ServerError):
    """No answer came within the time that the caller gave. The server may still have computed it."""


class PeerError(MirrorError):
    """Another library could not be installed into its environment, refused a request, or ended without an answer."""
