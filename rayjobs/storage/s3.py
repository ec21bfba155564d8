"""Can this bucket be used: asked before anything else, and answered in words.

Owns the questions to an S3 server, how its answers are told, and the removal of many objects. A
plain client gives up sooner and says more than the one that carries the data.
"""

import logging
import os
import uuid
from collections.abc import Iterable
from itertools import islice
from typing import Any

TIMEOUT_S = 6
NEVER = '"00000000000000000000000000000000"'
MAX_REMOVED_AT_ONCE = 1000
UNMET = ("PreconditionFailed", "412", "NoSuchKey", "404")
HOW_TO_ALLOW = (
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and what they are allowed to do there"
)


class StorageError(OSError):
    """A location cannot be used; the message names it, the reason and the way out."""


class NotThere(StorageError):
    """Nothing is at a location that is to be read."""


class Unavailable(StorageError):
    """The storage does not answer now; it may later."""


def check(uri: str, write: bool = False, timeout_s: float = TIMEOUT_S) -> None:
    """Raise StorageError unless objects below `uri` can be listed and, if asked, made.

    Nothing is written for it. Each of the two questions may take `timeout_s`.
    """
    import botocore.session
    from botocore.config import Config

    timeouts = Config(
        connect_timeout=timeout_s, read_timeout=timeout_s, retries={"total_max_attempts": 1}
    )
    session = botocore.session.get_session()
    region = session.get_config_variable("region") or "us-east-1"
    client = _asked(uri, lambda: session.create_client("s3", region_name=region, config=timeouts))
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    _asked(uri, lambda: client.list_objects_v2(Bucket=bucket, MaxKeys=1))
    if write:
        key = f"{prefix.strip('/')}/.writable-{uuid.uuid4().hex}".lstrip("/")
        _check_writing(uri, client, bucket, key)


def remove(fs: Any, paths: Iterable[str]) -> None:
    """Remove these objects and no others: s3fs takes paths for patterns, as in `exp[12]`."""
    names = iter(paths)
    while some := list(islice(names, MAX_REMOVED_AT_ONCE)):
        bucket = some[0].partition("/")[0]
        keys = [{"Key": name.partition("/")[2]} for name in some]
        answer = fs.call_s3(
            "delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True}
        )
        for kept in answer.get("Errors", ()):
            name = f"s3://{bucket}/{kept.get('Key')}"
            raise StorageError(f"{name}: cannot be removed ({kept.get('Code')}); {HOW_TO_ALLOW}")


def _check_writing(uri: str, client: Any, bucket: str, key: str) -> None:
    """Put an object on a condition that cannot hold: nothing is written but a refusal."""
    import botocore.exceptions as s3_errors

    def put() -> bool:
        try:
            client.put_object(Bucket=bucket, Key=key, Body=b"", IfMatch=NEVER)
        except s3_errors.ClientError as error:
            if error.response.get("Error", {}).get("Code", "") in UNMET:
                return False
            raise
        return True

    try:
        ignored = _asked(uri, put)
    except Unavailable:
        raise
    except StorageError as error:
        raise StorageError(f"{error}; it can be read, but not written") from None
    if ignored:
        logging.getLogger("rayjobs").warning(
            "%s: this server ignores conditions; run one job at a time there", uri
        )
        client.delete_object(Bucket=bucket, Key=key)


def _asked(uri: str, question: Any) -> Any:
    import botocore.exceptions as s3_errors

    try:
        return question()
    except s3_errors.NoCredentialsError:
        raise StorageError(
            f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    except s3_errors.ClientError as error:
        raise _refusal(uri, error.response) from None
    except (s3_errors.BotoCoreError, s3_errors.HTTPClientError, ValueError) as error:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        raise Unavailable(
            f"{uri}: cannot reach {endpoint or 'S3'} ({type(error).__name__}); "
            "check the network and AWS_ENDPOINT_URL"
        ) from None


def _refusal(uri: str, response: dict[str, Any]) -> StorageError:
    code = response.get("Error", {}).get("Code", "")
    reason = response.get("Error", {}).get("Message", "") or "no reason given"
    if code in ("NoSuchBucket", "404"):
        bucket = uri.removeprefix("s3://").split("/")[0]
        return StorageError(f"{uri}: bucket {bucket!r} does not exist; create it first")
    if response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400) >= 500:
        return Unavailable(f"{uri}: the server answers {code}: {reason}")
    return StorageError(f"{uri}: access refused ({code}: {reason}); {HOW_TO_ALLOW}")
