"""An export on the Hugging Face Hub: a local folder, uploaded so that a killed upload goes on.

Owns `hf://datasets/OWNER/NAME`, the repository, and the order of what is uploaded: shards first,
and what says that they are there last. `huggingface_hub` does the work. Knows nothing of exporting.
"""

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from rayjobs.config import BadInput
from rayjobs.storage import StorageError

PLACE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)/?")
SHARDS = "data/**"
"""What is uploaded first."""
NOT_OURS = ("tmp/**", "replacing/**", ".cache/**")


def is_hub(uri: str) -> bool:
    return uri.startswith("hf://")


def repository(uri: str) -> str:
    """OWNER/NAME. Raises ValueError."""
    match = PLACE.fullmatch(uri)
    if match is None:
        raise ValueError(f"{uri!r} is no data set on the Hub; write hf://datasets/OWNER/NAME")
    return match[1]


def ensure(uri: str, private: bool) -> None:
    """Find the repository, or make it. Raises BadInput or StorageError."""
    from huggingface_hub import HfApi

    with _told(uri):
        HfApi().create_repo(repository(uri), repo_type="dataset", private=private, exist_ok=True)


def upload(uri: str, folder: str) -> None:
    """Make the repository what the folder is; what is there already is not sent again.

    Nobody who reads the card finds shards missing: it comes last, and shards that are gone from the
    folder go with it.
    """
    from huggingface_hub import HfApi

    parts: tuple[tuple[str, dict[str, Any]], ...] = (
        ("Shards", {"allow_patterns": SHARDS, "delete_patterns": SHARDS}),
        ("Card", {"ignore_patterns": [*NOT_OURS, SHARDS], "delete_patterns": "manifest/**"}),
    )
    with _told(uri):
        for what, patterns in parts:
            HfApi().upload_folder(
                repo_id=repository(uri),
                folder_path=folder,
                repo_type="dataset",
                commit_message=f"{what} of an export by rayjobs",
                **patterns,
            )


@contextmanager
def _told(uri: str) -> Generator[None]:
    """What the Hub says as one line that names the place."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        said = error.server_message or str(error).splitlines()[0]
        raise BadInput(
            f"{uri}: the Hub refuses: {said}; see that HF_TOKEN may write there"
        ) from None
    except (HTTPError, OSError) as error:
        raise StorageError(f"{uri}: the Hub cannot be reached: {error}; try again later") from None
