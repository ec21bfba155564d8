"""Jobs of a cluster, by Ray's Jobs SDK: begun once, followed, ended.

Owns the names of jobs on the cluster and what their endings mean here. A job's name tells what it
makes, so that whoever submits the same again finds it; a run after one that has ended gets the next
number. Knows nothing of what jobs do.
"""

import asyncio
import contextlib
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from rayjobs.config import BadInput, JobFailed

DONE, FAILED, INTERRUPTED = 0, 1, 130
LOST_S = 120.0
"""How long a dashboard may be away while a job is followed."""
POLL_S = 2.0
STOP_S = 60.0


@dataclass(frozen=True)
class Submission:
    """A job on the cluster."""

    id: str
    is_new: bool
    """Whether it was begun by this call."""
    command: str
    """What it was begun with."""


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`, else at RAY_ADDRESS' or here."""

    def __init__(self, address: str | None = None):
        if address is not None:  # Ray lets these overrule what it is given
            for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
                os.environ.pop(name, None)
        from ray.job_submission import JobSubmissionClient

        for module in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        with _told(address or "this machine"):
            self._client: Any = JobSubmissionClient(address)
        self.address = self._client.get_address()

    def submit(self, base: str, entrypoint: list[str], package: Callable[[], str]) -> Submission:
        """Begin the job of that base name, unless it runs. `package` is called when it does not."""
        command = shlex.join(entrypoint)
        attempt, running = self._attempts(base)
        if running is not None:
            return running
        name = f"{base}-{attempt + 1}"
        with _told(self.address):
            try:
                self._client.submit_job(
                    entrypoint=command,
                    submission_id=name,
                    runtime_env={"working_dir": package()},
                    metadata={"rayjobs": command},
                )
            except RuntimeError as error:
                # Somebody else submitted the same at this moment.
                if "already" not in str(error) or (running := self._attempts(base)[1]) is None:
                    raise
                return running
        return Submission(name, True, command)

    def _attempts(self, base: str) -> tuple[int, Submission | None]:
        """The last attempt's number, 0 where there is none, and the job if it has not ended."""
        found = {}
        with _told(self.address):
            for job in self._client.list_jobs():
                if number := re.fullmatch(rf"{re.escape(base)}-(\d+)", job.submission_id or ""):
                    found[int(number[1])] = job
        if not found:
            return 0, None
        last = found[max(found)]
        if last.status.is_terminal():
            return max(found), None
        return max(found), Submission(str(last.submission_id), False, last.entrypoint)

    def follow(self, name: str) -> int:
        """Print what the job says until it ends; return its exit code.

        Raises JobFailed when the cluster is away for long: the job may go on.
        """
        told, seen = 0, time.monotonic()
        while True:
            try:
                for text in self._new_text(name, told):
                    told, seen = told + len(text), time.monotonic()
                    print(text, end="", flush=True)
                with _told(self.address):
                    job = self._client.get_job_info(name)
                if job.status.is_terminal():
                    return _exit_code(job)
                seen = time.monotonic()
            except Exception as error:
                if time.monotonic() - seen > LOST_S:
                    raise JobFailed(
                        f"{self.address} does not answer any more ({error}); the job may go on"
                    ) from None
            time.sleep(POLL_S)

    def _new_text(self, name: str, told: int) -> Iterator[str]:
        """What the job's log has after so many letters, as it comes, until it ends."""
        chunks, skip = self._client.tail_job_logs(name), told

        async def following() -> str | None:
            return await anext(chunks, None)

        with asyncio.Runner() as runner:  # which ends what waits, also after Ctrl-C
            while (text := runner.run(following())) is not None:
                if text[skip:]:
                    yield text[skip:]
                skip = max(0, skip - len(text))

    def stop(self, name: str) -> float | None:
        """End a job; the seconds until it had ended, None if it had already."""
        started = time.monotonic()
        with _told(self.address):
            if not self._client.stop_job(name):
                return None
            while not self._client.get_job_status(name).is_terminal():
                if time.monotonic() - started > STOP_S:
                    raise JobFailed(f"{name} has not ended within {STOP_S:.0f} s")
                time.sleep(0.1)
        return time.monotonic() - started

    def command(self, name: str) -> str:
        """What a job was begun with."""
        with _told(self.address):
            return str(self._client.get_job_info(name).entrypoint)


def _exit_code(job: Any) -> int:
    if job.status == "SUCCEEDED":
        return DONE
    if job.status == "STOPPED":
        print(f"{job.submission_id} was stopped; the same command continues", file=sys.stderr)
        return INTERRUPTED
    if job.driver_exit_code is None or job.driver_exit_code < 0:
        lines = (job.message or "no reason was given").strip().splitlines()
        print(f"error: {job.submission_id} failed: {lines[0]}", file=sys.stderr)
        return FAILED
    return int(job.driver_exit_code)


@contextlib.contextmanager
def _told(address: str) -> Generator[None]:
    """Turn what Ray's client raises into one line that says what to do."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise BadInput(
            f"the cluster at {address} asks for a token, or for another one; set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN unless it is in ~/.ray/auth_token"
        ) from None
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise BadInput(
            f"no Ray dashboard answers at {address} ({type(error).__name__}); give --address "
            "http://HEAD:8265, where HEAD may be 127.0.0.1 behind a port-forward"
        ) from None
    except RuntimeError as error:
        if isinstance(error, JobFailed):
            raise
        first = str(error).strip().splitlines()[0]
        found = re.search(r"status code (\d+): (.*)", first)
        raise BadInput(f"{address}: {found[2] if found else first}") from None
