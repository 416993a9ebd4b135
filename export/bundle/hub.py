"""Push a proven bundle to a model hub through huggingface_hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mirror_runtime.bundle import Manifest
from mirror_runtime.errors import InputError


def check_hub(name: str) -> None:
    """Check that a push is possible, before an export takes minutes.

    Raises:
        InputError: the name is not a valid repository name, there is no token, or the hub is switched off.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {name!r} is not a repository name ({error}): it must be OWNER/NAME") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push-to-hub needs the network, and HF_HUB_OFFLINE switches it off: unset it")
    if get_token() is None:
        raise InputError(
            "--push-to-hub finds no token: run `hf auth login`, or set HF_TOKEN to a token with write access"
        )


def push(bundle: Path, name: str, manifest: Manifest, *, private: bool = False) -> str:
    """Upload a bundle to a model repository, which is created if needed, with the token of `hf auth login` or HF_TOKEN.

    With `private`, a new repository is private; an existing one keeps its setting. Returns the commit's address.

    Raises:
        InputError: the hub refused the upload or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api: Any = HfApi()
    proven = ", ".join(dict.fromkeys(f"{a.engine.value} {a.precision.value}" for a in manifest.artifacts))
    # A network that is down raises an error of the HTTP library, which differs between releases of huggingface_hub: it
    # is a base of the hub's own error.
    failures: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=bundle,
            commit_message=f"Vector space {manifest.fingerprint}",
            commit_description=f"Made by {manifest.created_by}; proven: {proven}.",
        )
    except failures as error:
        raise InputError(
            f"the bundle is in {bundle}, but {name} did not accept it ({type(error).__name__}: {_first_line(error)}). "
            f"Check the name, the token's rights and the network, then: hf upload {name} {bundle}"
        ) from error
    return str(commit.commit_url)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
