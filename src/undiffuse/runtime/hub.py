"""Models on the Hugging Face hub, by names ``hf:OWNER/NAME`` or ``hf:OWNER/NAME@REVISION``.

Nothing else reaches the network: a path is never looked up there. ``huggingface_hub`` is imported on first use.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

from undiffuse.errors import CheckpointError, ConfigError, ResourceError

PREFIX = "hf:"
MODEL_FILE = "model.safetensors"
NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
SNAPSHOT = re.compile(r"models--(\w[\w.-]*?--\w[\w.-]*)", re.ASCII)
"""The folder of a repository in the cache of huggingface_hub, whose files are in snapshots/COMMIT/."""
CONNECTION = "Check the connection; what is downloaded already can be used offline"


class HubName(NamedTuple):
    """The repository ``OWNER/NAME`` and a branch, tag or commit; None for the newest commit."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}{f'@{self.revision}' if self.revision else ''}"


def is_hub_name(text: object) -> bool:
    """Whether ``text`` is a string that begins with ``hf:``. A `Path` never names a model on the hub."""
    return isinstance(text, str) and text.startswith(PREFIX)


def parse_name(text: str) -> HubName:
    """The parts of ``hf:OWNER/NAME@REVISION``; the prefix and the revision may be missing. Raises `ConfigError`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    match = NAME.fullmatch(text.removeprefix(PREFIX))
    try:
        if match is None or ".." in text:
            raise HFValidationError("it is not OWNER/NAME")
        validate_repo_id(match["repo"])
    except HFValidationError:
        fix = f"Write {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION"
        raise ConfigError("HUB_NAME", text, "this is not the name of a model on the hub", fix) from None
    return HubName(match["repo"], match["revision"])


def download(name: HubName, file: str = MODEL_FILE) -> Path:
    """The path of a ``file`` of a repository, in the cache of huggingface_hub; it is downloaded if it is not there.

    Raises `CheckpointError` if the hub has no such repository, revision or file, `ResourceError` if it is not reached.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(name, file):
        return Path(hf_hub_download(name.repo, file, revision=name.revision))


@contextmanager
def hub_errors(name: HubName, file: str = MODEL_FILE) -> Iterator[None]:
    """Turn the errors of huggingface_hub in the block into a `CheckpointError` or a `ResourceError` of ``name``.

    ``file`` is the one that the block asks for.
    """
    from huggingface_hub import constants, errors

    # the errors of whichever HTTP library huggingface_hub uses are a base of its own
    failures = cast("tuple[type[Exception], ...]", (*errors.HfHubHTTPError.__bases__, OSError))
    logger = logging.getLogger("huggingface_hub")  # which prints two lines for each of five attempts
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        yield
    except errors.GatedRepoError:
        fix = "Accept its terms on the hub, then run: hf auth login"
        raise CheckpointError("HUB", str(name), "access to this repository is restricted", fix) from None
    except errors.RepositoryNotFoundError:
        fix = "Check the name; for a private repository run: hf auth login"
        raise CheckpointError("HUB", str(name), "the hub has no such repository, or it is private", fix) from None
    except errors.RevisionNotFoundError:
        cause = f"its repository has no revision {name.revision or 'main'!r}"
        raise CheckpointError("HUB", str(name), cause, "Name a branch, a tag or a commit after @") from None
    except errors.LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            cause, fix = "it is not downloaded, and HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE, or name a folder"
        else:
            cause, fix = "the hub is not reached, and the file is not downloaded", CONNECTION
        raise ResourceError("HUB", str(name), cause, fix) from None
    except errors.EntryNotFoundError:
        fix = "Name the repository of a model that undiffuse wrote"
        raise CheckpointError("HUB", str(name), f"its repository has no {file}", fix) from None
    except errors.OfflineModeIsEnabled:
        cause = "it needs the hub, and HF_HUB_OFFLINE is set"
        raise ResourceError("HUB", str(name), cause, "Unset HF_HUB_OFFLINE") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        denied = status in (401, 403)
        cause = "the hub refuses it without permission" if denied else f"the hub answers with an error ({status})"
        fix = "Run: hf auth login, with a token that may do this" if denied else "Try again later"
        raise ResourceError("HUB", str(name), cause, fix) from None
    except errors.LocalTokenNotFoundError:
        raise ResourceError("HUB", str(name), "it needs a token of the hub", "Run: hf auth login") from None
    except failures as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ResourceError("HUB", str(name), f"the transfer failed ({reason})", CONNECTION) from None
    finally:
        logger.setLevel(level)


def snapshot_name(folder: Path) -> str | None:
    """``OWNER--NAME`` if ``folder`` is in the cache of huggingface_hub, which only downloads are written into."""
    for snapshots, repository in zip(folder.parts[1:], folder.parts, strict=False):
        if snapshots == "snapshots" and (match := SNAPSHOT.fullmatch(repository)):
            return match[1]
    return None
