"""What a URI says of a place: local or not, and how it is written.

Looks at nothing but the text, and whether a local path exists.
"""

import os


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """The same place from any working directory: local paths made absolute, others as they are.

    `~` is the home folder, which a shell does not write out in `output.uri=~/images`.
    """
    if is_remote(uri):
        return uri
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def absolute_if_path(uri: str) -> str:
    """As `absolute`, but what is no existing path, such as a hub id or `starter`, stays."""
    return absolute(uri) if not is_remote(uri) and os.path.exists(absolute(uri)) else uri
