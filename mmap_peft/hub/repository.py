"""Names of repositories on the Hub, and its errors as one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id


def hub_id(name_or_path: str | os.PathLike | None) -> str | None:
    """The name, if a repository on the Hub can have it, else `None`: a path says nothing on another machine."""
    if not name_or_path or os.path.isdir(name_or_path):
        return None
    try:
        validate_repo_id(str(name_or_path))
    except HFValidationError:
        return None
    return str(name_or_path)


def check_subfolder(subfolder: str | None) -> str:
    """Return the subfolder, `""` for none.

    Raises:
        ValueError: it is not a path that stays inside the repository.
    """
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
    branch = revision or "main"
    try:
        yield
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is neither a folder nor the name of a repository; write one such as 'me/clip-mmap'."
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"{repo_id} has no revision {branch!r}; write a branch, tag or commit that it has.") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"The Hub has no repository {repo_id!r} that you may see; correct the name, or give the token of an "
            "account that may see it."
        ) from error
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"The Hub cannot be reached, and the cache does not hold {branch!r} of {repo_id}; connect to the network, "
            "or give a folder."
        ) from error
    except EntryNotFoundError as error:
        raise OSError(f"{repo_id} lacks a file at {branch!r}: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            answer = "knows no account by the token, or got none; log in with `hf auth login`, or give a valid token."
        elif status == 403:
            answer = "does not let this token write there; give the token of an account that may write."
        elif status in (409, 412) and parent_commit is not None:
            answer = (
                f"has a newer commit of {branch!r} than parent_commit={parent_commit!r}, so somebody pushed meanwhile "
                "and nothing was changed; load the newer one and push again, or leave parent_commit out."
            )
        else:
            answer = f"answered {status} ({error.server_message or _first_line(error)}); try again."
        raise OSError(f"{repo_id}: the Hub {answer}") from error
    except (HTTPError, RuntimeError) as error:  # threads that upload wrap what stopped them in a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise OSError(
            f"The connection to the Hub broke ({type(cause).__name__}: {_first_line(cause)}); {repo_id} shows all of "
            "a push or nothing, so try again."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
