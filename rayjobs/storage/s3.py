"""Can this bucket be used: asked before anything else, and answered in words.

Owns the questions to an S3 server, how its answers are told, puts on a condition and the removal of
many objects. A plain client gives up sooner and says more than the one that carries the data.
"""

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterable
from itertools import islice
from typing import Any

TIMEOUT_S = 6
CHECK_TRIES, CHECK_PAUSE_S = 3, 0.5
NEVER = '"00000000000000000000000000000000"'
MAX_REMOVED_AT_ONCE = 1000
UNMET = ("PreconditionFailed", "412", "NoSuchKey", "404")
ROLE = "AWS_ROLE_ARN"
HOW_TO_ALLOW = (
    "check what these credentials may do there: AWS_ACCESS_KEY_ID's where that is set, else the "
    "profile's or the IAM role's of this machine or pod"
)
HOW_TO_IDENTIFY = (
    "give this machine or pod an IAM role (an instance profile, or a web identity such as IRSA: "
    "AWS_ROLE_ARN and AWS_WEB_IDENTITY_TOKEN_FILE), or set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
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
    region = asked(uri, lambda: session.get_config_variable("region")) or "us-east-1"
    client = asked(uri, lambda: session.create_client("s3", region_name=region, config=timeouts))
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    with contextlib.closing(client):
        _insist(uri, lambda: client.list_objects_v2(Bucket=bucket, MaxKeys=1), timeout_s)
        if write:
            key = f"{prefix.strip('/')}/.writable-{uuid.uuid4().hex}".lstrip("/")
            _check_writing(uri, client, bucket, key, timeout_s)


def _insist(uri: str, question: Any, timeout_s: float) -> Any:
    """The answer, asked for again where the server said soon that it cannot: it may be busy."""
    for _ in range(CHECK_TRIES - 1):
        began = time.monotonic()
        try:
            return asked(uri, question)
        except Unavailable:
            if time.monotonic() - began > timeout_s / 2:
                raise
        time.sleep(CHECK_PAUSE_S)
    return asked(uri, question)


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


def _check_writing(uri: str, client: Any, bucket: str, key: str, timeout_s: float) -> None:
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
        ignored = _insist(uri, put, timeout_s)
    except Unavailable:
        raise
    except StorageError as error:
        raise StorageError(f"{error}; it can be read, but not written") from None
    if ignored:
        logging.getLogger("rayjobs").warning(
            "%s: this server ignores conditions; run one job at a time there", uri
        )
        client.delete_object(Bucket=bucket, Key=key)


def asked(uri: str, question: Any) -> Any:
    """The answer of botocore's client; what it raises is told as a StorageError."""
    import botocore.exceptions as s3_errors

    nobody = (
        s3_errors.NoCredentialsError,
        s3_errors.PartialCredentialsError,
        s3_errors.CredentialRetrievalError,
        s3_errors.MetadataRetrievalError,
        s3_errors.TokenRetrievalError,
        s3_errors.SSOError,
        s3_errors.ProfileNotFound,
        FileNotFoundError,  # of a web identity's token
    )
    try:
        return question()
    except nobody as error:
        why = "" if isinstance(error, s3_errors.NoCredentialsError) else f" ({error})"
        raise StorageError(f"{uri}: no credentials{why}; {HOW_TO_IDENTIFY}") from None
    except s3_errors.ClientError as error:
        if error.operation_name.startswith("AssumeRole"):
            code, role = error.response.get("Error", {}).get("Code", ""), os.environ.get(ROLE, "")
            raise StorageError(
                f"{uri}: the IAM role {role} may not be taken here ({code}); check its trust "
                "policy, and AWS_WEB_IDENTITY_TOKEN_FILE"
            ) from None
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


def put_if(fs: Any, path: str, data: bytes, **condition: str) -> bool:
    """Put an object on a condition, in one part: not all servers take one for the last of many.

    What is there already and equal counts as put: the answer to an earlier try may have been lost.
    """
    place, _, key = path.partition("/")
    for pause_s in (0.2, 1.0, 5.0, None):
        try:
            fs.call_s3("put_object", Bucket=place, Key=key, Body=data, **condition)
            return True
        except OSError as error:
            # s3fs tells a failed condition by a plain OSError, or by FileExistsError.
            told = repr(error) + repr(error.__cause__)
            if "ConditionalRequestConflict" in told and pause_s is not None:
                time.sleep(pause_s)  # two at the same moment: nobody may have won
                continue
            absent = "IfMatch" in condition and "NoSuchKey" in told
            unmet = isinstance(error, FileExistsError) or "PreconditionFailed" in told
            if not (absent or unmet or "At least one of the pre-conditions" in told):
                raise
            return "IfMatch" in condition and _holds(fs, path, data)
    return False


def _holds(fs: Any, path: str, data: bytes) -> bool:
    try:
        return bool(fs.cat_file(path) == data)
    except FileNotFoundError:
        return False
