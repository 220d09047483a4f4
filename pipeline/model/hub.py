"""To and from a hub of models, by huggingface_hub: what `SlimViT.from_pretrained` downloads, `lowpass push` uploads."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from lowpass.pipeline.base.errors import InputError, RunError, first_line

HUB_PREFIX = "hf-hub:"


def download(name: str, files: list[str], **options: Any) -> Path:
    """The folder that some files of a repository were downloaded to; those that it lacks are left out.

    Args:
        name: such as `someone/some-model`, with or without `hf-hub:` before it.
        files: by name.
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        InputError: that cannot be a name, there is no such repository, or no way to it.
    """
    repo = checked_repo(name)
    try:
        return Path(snapshot_download(repo, allow_patterns=files, **options))
    except Exception as error:  # whatever the hub's client raises: no network, no such name
        raise InputError(f"cannot get {repo}: {first_line(error)}; a folder works without a network") from None


def upload(folder: Path, repo: str, private: bool) -> str:
    """Put a folder's files on the hub in one commit; the repository is made if missing.

    Returns:
        The commit's address.

    Raises:
        RunError: the hub or the network refused.
    """
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Add a slim model of lowpass")
    except Exception as error:  # the client's own, those of its HTTP library, and the network's
        raise RunError(f"the hub did not take {repo}: {first_line(error)}") from None
    return str(done.commit_url)


def checked_repo(name: str) -> str:
    """A name on the hub, without `hf-hub:`.

    Raises:
        InputError: it cannot be one.
    """
    repo = name.removeprefix(HUB_PREFIX)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{name!r} cannot be a name on the hub: {first_line(error)}") from None
    return repo


def check_token() -> None:
    """Refuse to upload without a token.

    Raises:
        InputError: nobody has logged in.
    """
    if get_token() is None:
        raise InputError("there is no token to upload with: run `hf auth login`, or set HF_TOKEN")
