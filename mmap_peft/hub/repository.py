"""Names of repositories on the Hub, and its errors as one sentence."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

from huggingface_hub import errors
from huggingface_hub.utils import validate_repo_id


# Error messages by class of the error or by HTTP status; the first entry that matches is used.
SENTENCES = {
    errors.RevisionNotFoundError: "{repo} has no revision {branch!r}; write a branch, tag or commit that it has.",
    errors.RepositoryNotFoundError: "The Hub has no repository {repo!r} that you may see; correct the name, or give "
    "the token of an account that may see it.",
    errors.LocalEntryNotFoundError: "The Hub cannot be reached, and the cache does not hold {branch!r} of {repo}; "
    "connect to the network, or give a folder.",
    errors.EntryNotFoundError: "{repo} lacks a file at {branch!r}: {reason}",
    401: "{repo}: the Hub knows no account by the token, or got none; run `hf auth login`, or give a valid token.",
    403: "{repo}: the Hub does not let this token write there; give the token of an account that may write.",
    "newer commit": "{repo}: the Hub has a newer commit of {branch!r} than parent_commit={parent!r}, so nothing was "
    "changed; load the newer one and push again, or leave parent_commit out.",
    errors.HfHubHTTPError: "{repo}: the Hub answered {status} ({reason}); try again.",
    Exception: "The connection to the Hub broke ({kind}: {reason}); {repo} shows all of a push or nothing, so try "
    "again.",
}


def hub_id(name_or_path: str | os.PathLike | None) -> str | None:
    """The name if a repository on the Hub can have it, else `None`: a path has no meaning on another machine."""
    if not name_or_path or os.path.isdir(name_or_path):
        return None
    try:
        validate_repo_id(str(name_or_path))
    except errors.HFValidationError:
        return None
    return str(name_or_path)


def shown_base(base_model: str | None) -> str:
    """The name of a base; of a path only the last folder, since no more means something on another machine."""
    return hub_id(base_model) or PurePath(base_model or "").name


def check_subfolder(subfolder: str | None) -> str:
    """Return the subfolder, `""` for none, or raise a `ValueError` if it does not stay inside the repository."""
    parts = subfolder.split("/") if subfolder else []
    if not all(re.fullmatch(r"[\w.-]+", part) and part.strip(".") for part in parts):
        raise ValueError(
            f"subfolder={subfolder!r} is no folder inside a repository; write names of letters, digits, '_', '-' and "
            "'.', with '/' between them."
        )
    return subfolder or ""


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None, parent_commit: str | None = None) -> Iterator[None]:
    """Inside the `with` block, errors of the Hub become an `OSError` of one sentence, a wrong name a `ValueError`."""
    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is neither a folder nor the name of a repository; write one such as 'me/clip-mmap'."
        ) from error
    # Threads that upload wrap what stopped them in a RuntimeError.
    except (errors.HTTPError, errors.EntryNotFoundError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        kind = "newer commit" if status in (409, 412) and parent_commit is not None else status
        fits = (key == kind or (isinstance(key, type) and isinstance(error, key)) for key in SENTENCES)
        fields = {
            "repo": repo_id,
            "branch": revision or "main",
            "parent": parent_commit,
            "status": status,
            "kind": type(cause).__name__,
            "reason": getattr(error, "server_message", None) or str(cause).split("\n")[0],
        }
        raise OSError(next(itertools.compress(SENTENCES.values(), fits)).format(**fields)) from error
