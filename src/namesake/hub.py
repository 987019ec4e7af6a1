"""Pushing an exported version to ModelScope, by its own client."""

from __future__ import annotations

import logging
import re
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

from namesake.errors import HubError, InputError
from namesake.messages import tr

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def check_repository(repository: str) -> None:
    """Refuse what is no ``OWNER/NAME``.

    Raises:
        InputError: it is not.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise InputError("push", repository, "is no repository", mend="Write OWNER/NAME, as ModelScope shows it.")


def push(folder: Path, repository: str, *, token: str = "", message: str = "", license_: str = "") -> str:
    """Upload the folder to a model repository, which is made (private) where there is none; its address.

    Args:
        token: of ModelScope; empty for the one that ``modelscope login`` or ``MODELSCOPE_API_TOKEN`` gave.
        message: of the commit.
        license_: of a repository that is made; ``other`` where it is not known.

    Raises:
        HubError: the hub cannot be reached, refuses the token, or did not take the files.
    """
    import modelscope_hub.errors
    from modelscope_hub import HubApi
    from modelscope_hub.config import HubConfig
    from modelscope_hub.errors import AlreadyExistsError

    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
    endpoint = HubConfig().endpoint
    try:
        api = HubApi(endpoint=endpoint, token=token or None)
        with suppress(AlreadyExistsError):
            api.create_repo(repository, "model", visibility="private", license=license_ or "other")
        with redirect_stdout(sys.stderr):  # its report
            api.upload_folder(
                repository, "model", folder, commit_message=message or "Upload", use_cache=False, disable_tqdm=True
            )
        return f"{endpoint}/models/{repository}"
    except (modelscope_hub.errors.HubError, OSError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise HubError(
            tr("ModelScope did not take {repository}: {said}.", repository=repository, said=said),
            mend=tr(
                "Check the connection and the token (--token, or MODELSCOPE_API_TOKEN); the exported folder is kept, "
                "so that `modelscope upload {repository} {folder}` can try again.",
                repository=repository,
                folder=folder,
            ),
        ) from error
