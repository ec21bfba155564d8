"""Storage and jobs on a Ceph gateway, whose signatures, policies and races are real."""

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rayjobs import storage
from rayjobs.storage import StorageError, join
from tests.servers import Ceph

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def new_name() -> str:
    return f"bucket-{uuid.uuid4().hex[:12]}"


def all_at_once(call: Callable[[int], bool]) -> list[bool]:
    barrier = threading.Barrier(8)

    def wait_and_call(number: int) -> bool:
        barrier.wait()
        return call(number)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(wait_and_call, range(8)))


def generate(uri: str) -> tuple[int, str, float]:
    """Exit code, what was said and seconds of a job that is to be refused."""
    started = time.monotonic()
    command = [sys.executable, "-m", "rayjobs", "generate", "configs/demo/generate.yaml"]
    done = subprocess.run(
        [*command, f"output.uri={uri}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


def test_created_once_only(ceph_bucket: str) -> None:
    uri = join(ceph_bucket, "data", "x")
    assert storage.create_bytes(uri, b"first")
    assert not storage.create_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_one_of_many_creates(ceph_bucket: str) -> None:
    for turn in range(5):
        uri = join(ceph_bucket, f"turn-{turn}")
        made = all_at_once(lambda number, uri=uri: storage.create_bytes(uri, b"%d" % number))
        assert made.count(True) == 1
        assert storage.read_bytes(uri) == b"%d" % made.index(True)


def test_a_large_object_is_created_once_only(ceph_bucket: str) -> None:
    # From 100 MiB on s3fs would write in parts, and Ceph 16 takes no condition on the last of them.
    uri, size = join(ceph_bucket, "large"), 101 * 2**20
    assert storage.create_bytes(uri, b"1" * size)
    assert not storage.create_bytes(uri, b"2" * size)
    with storage.open_input(uri) as file:
        assert file.read(1) == b"1"


def test_replaced_only_as_long_as_unchanged(ceph_bucket: str) -> None:
    uri = join(ceph_bucket, "entry")
    assert storage.etag(uri) is None
    storage.write_bytes(uri, b"one")
    mark = storage.etag(uri)
    assert mark is not None
    assert storage.replace_bytes(uri, b"two", mark)
    assert not storage.replace_bytes(uri, b"three", mark)
    assert storage.read_bytes(uri) == b"two"
    assert not storage.replace_bytes(join(ceph_bucket, "absent"), b"x", mark)


def test_one_of_many_replaces(ceph_bucket: str) -> None:
    uri = join(ceph_bucket, "entry")
    storage.write_bytes(uri, b"start")
    for _ in range(3):
        mark = storage.etag(uri)
        assert mark is not None
        text = uuid.uuid4().hex
        done = all_at_once(
            lambda number, text=text, mark=mark: storage.replace_bytes(
                uri, f"{text}-{number}".encode(), mark
            )
        )
        assert done.count(True) == 1
        assert storage.read_bytes(uri) == f"{text}-{done.index(True)}".encode()


def test_a_gateway_that_comes_back(ceph_server: Ceph, ceph_bucket: str) -> None:
    uri = join(ceph_bucket, "x")
    storage.write_bytes(uri, b"kept")
    ceph_server.stop()
    try:
        with pytest.raises(StorageError, match=f"cannot reach {ceph_server.endpoint}"):
            storage.check(ceph_bucket)
    finally:
        ceph_server.start()
    assert storage.read_bytes(uri) == b"kept"


def test_bad_storage_is_told_before_anything_starts(
    ceph_server: Ceph, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent, read_only = new_name(), ceph_server.read_only_bucket(new_name())
    usable = ceph_server.make_bucket(new_name())
    refused = {
        f"s3://{absent}/out": f"bucket '{absent}' does not exist",
        f"{read_only}/out": "AccessDenied",
    }
    for uri, reason in refused.items():
        expect_refusal(uri, reason)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    expect_refusal(f"{usable}/out", "SignatureDoesNotMatch")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    expect_refusal(f"{usable}/out", "InvalidAccessKeyId")


def expect_refusal(uri: str, reason: str) -> None:
    code, said, seconds = generate(uri)
    assert code == 2, said
    assert said.startswith(f"error: {uri}: "), said
    assert reason in said
    assert len(said.splitlines()) == 1
    assert seconds < 15


@pytest.mark.ray
def test_a_job_waits_for_a_server_that_is_away(
    ceph_server: Ceph, ceph_bucket: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "rayjobs", "generate", "configs/demo/generate.yaml"]
    command += ["output.images_per_shard=4"]
    uri, calm = f"{ceph_bucket}/out", str(tmp_path / "calm")
    job = subprocess.Popen([*command, f"output.uri={uri}"], cwd=ROOT)
    while len(storage.list_files(join(uri, "manifest"))) < 3:
        time.sleep(0.2)
        assert job.poll() is None
    ceph_server.stop()
    time.sleep(10)
    ceph_server.start()
    assert job.wait(240) == 0
    assert subprocess.run([*command, f"output.uri={calm}"], cwd=ROOT).returncode == 0
    names = storage.list_files(join(uri, "data"))
    assert names == storage.list_files(join(calm, "data"))
    assert len(names) == 24
    for name in names:
        assert (
            storage.read_bytes(join(uri, "data", name))
            == (tmp_path / "calm/data" / name).read_bytes()
        )
