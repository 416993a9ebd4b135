"""The exceptions of Mirror Runtime. A leaf: imports nothing of this package.

    MirrorError
    ├── BundleError        a bundle or run folder is missing, malformed or corrupted
    ├── ParityError        an artifact's vectors differ from the reference by more than its floor
    ├── EngineError        an engine cannot be loaded or failed while running
    │   └── MissingExtra   a package that the request needs is not installed
    ├── OverloadedError    too many texts are waiting; this one may be sent again later
    ├── InputError         the caller's texts, files or options cannot be used
    │   └── TextError      one text of a batch; carries its position
    │       └── NotFiniteError  the engine's fault, not the text's: its vector has NaN or infinity
    ├── ServerError        a model server did not start, or answered with a failure
    │   ├── UnavailableError        it cannot be reached, or rejects requests for now: another try may succeed
    │   └── DeadlineExceededError   no answer before the caller's deadline
    └── PeerError          another library could not be installed, or failed

Every message names the problem and what to do about it. Library users catch `MirrorError`; the command line prints the
message without a traceback and exits with status 2.
"""

MOST_CHARACTERS = 1500
"""Of a message."""


def one_line(error: object) -> str:
    """Return a library's message without its line breaks, and no more of it than a person reads."""
    return " ".join(str(error).split())[:300]


class MirrorError(Exception):
    """The base class of all errors that this package raises on purpose."""

    def __str__(self) -> str:
        message = super().__str__()  # a broken file may have put a megabyte into it
        return message if len(message) <= MOST_CHARACTERS else f"{message[:MOST_CHARACTERS]}…"


class BundleError(MirrorError):
    """A bundle or run folder is missing, malformed or corrupted."""


class ParityError(MirrorError):
    """Vectors differ from the reference by more than their floor allows, or are not finite."""


class EngineError(MirrorError):
    """An engine cannot be loaded, does not support the request, or failed while running."""


class MissingExtra(EngineError):
    """A package that the request needs is not installed; the message holds the install command.

    Args:
        package: the import name that is missing.
        extra: the extra of `mirror-runtime` that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: {install_command(extra)}")
        self.package = package
        self.extra = extra


class OverloadedError(MirrorError):
    """Too many texts are waiting for an encoder. Nothing was queued: the same call may succeed later.

    Args:
        message: the reason.
        retry_after_s: seconds after which to try again; None if unknown.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class InputError(MirrorError):
    """The caller's texts, files or options cannot be used."""


class TextError(InputError):
    """One text of a batch cannot be encoded.

    Args:
        index: the text's position in the caller's list, from 0.
        reason: the problem and its cure.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"text {index}: {reason}")
        self.index = index
        self.reason = reason


class NotFiniteError(TextError):
    """The engine computed NaN or infinity for one text of a batch, whose vector is therefore not returned."""

    def __init__(self, index: int, reason: str = "has a vector with NaN or infinity: run mirror verify") -> None:
        super().__init__(index, reason)


class ServerError(MirrorError):
    """A model server did not start, is not ready, or answered a request with a failure."""


class UnavailableError(ServerError):
    """A model server cannot be reached, or rejects requests while it starts, stops, or is being replaced."""


class DeadlineExceededError(ServerError):
    """No answer came before the caller's deadline. The server may still have computed it."""


class PeerError(MirrorError):
    """Another library could not be installed into its environment, rejected a request, or ended without an answer."""


def install_command(extra: str) -> str:
    """Return the `pip install` command that adds an extra to this installation, from where it came from.

    The package is not on an index, so a bare name would not install it, or somebody else's package of that name.
    """
    import json  # both are imported for a message alone
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        origin = json.loads(distribution("mirror-runtime").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # sources on PYTHONPATH
        origin = {}
    url = str(origin.get("url", ""))
    if "vcs_info" in origin:
        return f"pip install 'mirror-runtime[{extra}] @ {origin['vcs_info']['vcs']}+{url}'"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f"pip install {editable}'{url.removeprefix('file://') or 'mirror-runtime'}[{extra}]'"
