"""S3 servers of our own: moto for the quick suite, Ceph where real signatures and races matter."""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import botocore.session
import pytest

from rayjobs import storage

PORTS = range(20000, 32768)
"""Above those of Ray's workers, below those that the kernel gives to whoever asks for any: what is
free now stays free until its server starts."""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, each another one."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            port, probe = random.choice(PORTS), stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    return found


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server (moto) in a process of its own, on a free port."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def bucket(s3_server: str) -> Iterator[str]:
    """A fresh bucket's URI; the standard AWS variables name its server."""
    with environment(s3_server):
        storage.forget_connections()
        yield new_bucket()
    storage.forget_connections()


@contextlib.contextmanager
def environment(s3_server: str) -> Iterator[None]:
    """The server's variables, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables(s3_server).items():
            patch.setenv(name, value)
        yield


def variables(s3_server: str) -> dict[str, str]:
    """What tells a process of the server."""
    return {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def new_bucket() -> str:
    """The URI of an empty bucket on the server that the environment names."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    with contextlib.closing(botocore.session.get_session().create_client("s3")) as client:
        client.create_bucket(Bucket=name)
    return f"s3://{name}"


CEPH_CONF = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon},v1:127.0.0.1:{old}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {folder}/keyring
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
mon allow pool size one = true
mon data avail crit = 1
osd pool default size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block create = true
bluestore block size = 4294967296
bluestore cache size = 67108864
osd memory target = 402653184
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
"""
CEPH_CAPS = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
    "client.rgw.a": {"mon": "allow rw", "osd": "allow rwx"},
}


class Ceph:
    """A Ceph cluster of one monitor, one disk and one S3 gateway, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.access_key, self.secret_key = "writer", "writer-secret"
        self._mon, self._old, self._gateway = free_ports(3)
        self.endpoint = f"http://127.0.0.1:{self._gateway}"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._parent = ThreadPoolExecutor(1)

    def boot(self) -> None:
        fsid, disk = str(uuid.uuid4()), str(uuid.uuid4())
        ports = {"mon": self._mon, "old": self._old, "gateway": self._gateway}
        conf = CEPH_CONF.format(fsid=fsid, folder=self.folder, **ports)
        (self.folder / "ceph.conf").write_text(conf)
        for name in ("mon", "osd", "rgw"):
            (self.folder / name).mkdir()
        keyring, monmap = str(self.folder / "keyring"), str(self.folder / "monmap")
        for name, caps in CEPH_CAPS.items():
            allowed = [word for pair in caps.items() for word in ("--cap", *pair)]
            new = [] if Path(keyring).exists() else ["--create-keyring"]
            self._tool("ceph-authtool", keyring, *new, "--gen-key", "-n", name, *allowed)
        addresses = f"[v2:127.0.0.1:{self._mon},v1:127.0.0.1:{self._old}]"
        self._tool("monmaptool", "--create", "--fsid", fsid, "--addv", "a", addresses, monmap)
        self._tool("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self._daemon("ceph-mon", "-i", "a")
        key = self._tool("ceph-authtool", keyring, "-n", "osd.0", "-p").strip()
        secrets = self.folder / "secrets.json"
        secrets.write_text(json.dumps({"cephx_secret": key}))
        self._tool("ceph", "osd", "new", disk, "-i", str(secrets))
        self._tool("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._daemon("ceph-osd", "-i", "0")
        self._tool("ceph", "auth", "import", "-i", keyring)
        self.start()
        for user in (self.access_key, "owner"):
            keys = (f"--access-key={user}", f"--secret={user}-secret")
            self._tool(
                "radosgw-admin", "user", "create", f"--uid={user}", f"--display-name={user}", *keys
            )

    def start(self) -> None:
        """Bring the gateway up, also again after `stop`."""
        gateway = self._daemon("radosgw", "-n", "client.rgw.a")
        for _ in range(600):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._gateway), 1).close()
                return
            assert gateway.poll() is None, "radosgw ended; its log is in the folder"
            time.sleep(0.1)
        raise TimeoutError("radosgw does not listen")

    def stop(self) -> None:
        """Take the gateway away at once; what is stored stays."""
        self._end(self._daemons.pop())

    def close(self) -> None:
        while self._daemons:
            self._end(self._daemons.pop())

    def make_bucket(self, name: str) -> str:
        """The URI of a new bucket that the writer may do everything with."""
        self._client(self.access_key).create_bucket(Bucket=name)
        return f"s3://{name}"

    def read_only_bucket(self, name: str) -> str:
        """The URI of another user's new bucket, which the writer may list and read."""
        owner = self._client("owner")
        owner.create_bucket(Bucket=name)
        statement = {
            "Effect": "Allow",
            "Principal": {"AWS": [f"arn:aws:iam:::user/{self.access_key}"]},
            "Action": ["s3:ListBucket", "s3:GetObject"],
            "Resource": [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"],
        }
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        owner.put_bucket_policy(Bucket=name, Policy=json.dumps(policy))
        return f"s3://{name}"

    def _client(self, user: str) -> Any:
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=user,
            aws_secret_access_key=f"{user}-secret",
        )

    def _tool(self, *command: str) -> str:
        named = {**os.environ, "CEPH_CONF": str(self.folder / "ceph.conf")}
        return subprocess.run(
            command, env=named, check=True, timeout=120, capture_output=True, text=True
        ).stdout

    def _daemon(self, *command: str) -> subprocess.Popen[bytes]:
        # A daemon ends with us even when we are killed: to Linux, with the thread that started it.
        ends = ("setpriv", "--pdeathsig", "KILL")
        words = [*ends, *command, "-f", "-c", str(self.folder / "ceph.conf")]
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            start = partial(subprocess.Popen, words, stdout=log, stderr=log)
            daemon = self._parent.submit(start).result()
        self._daemons.append(daemon)
        return daemon

    @staticmethod
    def _end(daemon: subprocess.Popen[bytes]) -> None:
        daemon.kill()
        daemon.wait()


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """A Ceph S3 server of our own: real signatures, policies and races. Up in about 20 s."""
    tools = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "setpriv")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not on PATH: {', '.join(missing)} (radosgw ceph-mon ceph-osd ceph-common)")
    with tempfile.TemporaryDirectory(prefix="ceph-", ignore_cleanup_errors=True) as folder:
        server = Ceph(Path(folder))
        try:
            server.boot()
            yield server
        finally:
            server.close()


@pytest.fixture
def ceph_server(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ceph]:
    """The Ceph gateway, named by the standard AWS variables."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", ceph.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ceph.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ceph.secret_key)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage.forget_connections()
    yield ceph
    storage.forget_connections()


@pytest.fixture
def ceph_bucket(ceph_server: Ceph) -> str:
    return ceph_server.make_bucket(f"bucket-{uuid.uuid4().hex[:12]}")
