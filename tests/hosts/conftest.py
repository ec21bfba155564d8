"""The two hosts, their cluster and the proxy before its storage, for all tests of this folder."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.cluster import Cluster
from tests.hosts.faults import Hosts
from tests.hosts.network import Network, why_not
from tests.hosts.proxy import Proxy
from tests.nodes import copy_repository
from tests.servers import variables


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="r-", ignore_cleanup_errors=True) as folder:
        code = Path(folder, "repository")
        copy_repository(code)
        made = Network(Path(folder), code)
        try:
            made.up()
            yield made
        finally:
            made.down()


@pytest.fixture(scope="session")
def proxy(network: Network, s3_server: str) -> Iterator[Proxy]:
    """S3 as the hosts see it, on a third address."""
    made = Proxy(s3_server, network.address)
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="session")
def started(network: Network, proxy: Proxy) -> Cluster:
    made = Cluster(network, variables(proxy.endpoint))
    made.start()
    return made


@pytest.fixture
def cluster(started: Cluster) -> Iterator[Cluster]:
    """The cluster with both hosts, whatever became of them in earlier tests."""
    started.make_whole()
    yield started
    started.leave()


@pytest.fixture
def hosts(cluster: Cluster, proxy: Proxy) -> Iterator[Hosts]:
    """What faults take hold of; storage is well again afterwards."""
    proxy.disturb(0)
    yield Hosts(cluster, proxy)
    proxy.disturb(0)
