"""What all tests share: a Ray cluster, models loaded once, one thread each, who runs together.

Imports neither torch nor ray by itself: a test that needs neither starts at once.
"""

import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.servers import (
    bucket,
    ceph,
    ceph_bucket,
    ceph_server,
    environment,
    new_bucket,
    s3_server,
    variables,
)
from tests.warm import use_warm_workers, warm_workers

if TYPE_CHECKING:
    from PIL import Image

    from rayjobs.diffusion.model import Model
    from tests.serving.running import Running

__all__ = ["bucket", "ceph", "ceph_bucket", "ceph_server", "s3_server"]

# Before torch is loaded, here and in every process that a test starts. The models are so small
# that a second thread costs ten times the processor time, and threads that wait must not spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Ray's workers give way to whoever waits for nothing: here, to the tests that run beside theirs.
os.environ.setdefault("RAY_worker_niceness", "0")

SHARED = ("app", "ray_cluster", "ceph")
"""Fixtures that take long to start: under pytest-xdist, all their tests go to one process."""
_shared: dict[str, ExitStack] = {}
"""What ends them, by name."""


@pytest.hookimpl(tryfirst=True)  # before xdist, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests by the shared fixture that they use, else by file.

    The longest group begins first. It waits for Ray as often as it computes, and so do the tests of
    `app`, which come later: beside them, others make use of the time.
    """
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        group = next((name for name in SHARED if name in fixtures), item.path.stem)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: "ray_cluster" not in getattr(item, "fixturenames", ()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """End what a group shared after its last test: idle clusters take a third of a processor.

    Under pytest-xdist a group's tests follow each other, in one process.
    """
    yield
    if "PYTEST_XDIST_WORKER" in os.environ and nextitem is not None:
        group, following = (each.get_closest_marker("xdist_group") for each in (item, nextitem))
        if group and following and group.args != following.args and group.args[0] in _shared:
            _shared.pop(group.args[0]).close()


def pytest_runtest_setup() -> None:
    """A job sets torch's threads for its process; here the next test begins with one again."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers of the clusters that tests share start at once."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with warm_workers(folder / "warm"):
        yield


@pytest.fixture(scope="module")
def ray_cluster(s3_server: str, warm: None) -> None:
    """The Ray cluster in which jobs of this process run, started once. Do not kill its node.

    Its workers know the S3 server.
    """
    import ray

    from rayjobs.cluster import local

    if not ray.is_initialized():
        use_warm_workers()
        with environment(s3_server):
            ray.init(**local(num_cpus=5), log_to_driver=False)
        _shared["ray_cluster"] = ExitStack()
        _shared["ray_cluster"].callback(ray.shutdown)


@pytest.fixture
def joining(ray_cluster: None) -> dict[str, str]:
    """The variables of a process that joins the cluster, as `ray job submit` sets them."""
    import ray

    from rayjobs.cluster import REMEMBER_ADDRESS

    # Its own workers must know this cluster too: that of `app` runs beside it.
    job_config = json.dumps({"runtime_env": REMEMBER_ADDRESS})
    address = ray.get_runtime_context().gcs_address
    return {"RAY_ADDRESS": address, "RAY_JOB_CONFIG_JSON_ENV_VAR": job_config}


@pytest.fixture
def no_ray_cluster() -> Iterator[None]:
    """For a test that starts, and ends, another cluster in this process."""
    import ray

    ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture
def in_process() -> Iterator[None]:
    """Jobs whose one worker is this process: for tests of what goes on around the pool."""
    with jobs_in_process():
        yield


@contextmanager
def jobs_in_process() -> Iterator[None]:
    from rayjobs import cluster
    from rayjobs.generation.worker import pool
    from rayjobs.generation.worker.shards import ShardWorker

    def make(
        config: Any, lock: Any, segment: int, shards: Any, redo: Any, num_images: int
    ) -> Iterator[Any]:
        return ShardWorker(config, lock, segment, redo=redo).make(map(int, shards))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "is_own", lambda: True)
        patch.setattr(pool, "session", lambda workers: nullcontext())
        patch.setattr(pool, "make", make)
        yield


def pytest_sessionfinish() -> None:
    if ray := sys.modules.get("ray"):
        ray.shutdown()


@pytest.fixture(scope="session")
def served_runs(s3_server: str) -> str:
    """The folder on S3 whose exports the application serves; leave it empty."""
    with environment(s3_server):
        return f"{new_bucket()}/runs"


@pytest.fixture(scope="session")
def app(s3_server: str, served_runs: str, warm: None) -> "Iterator[Running]":
    """Serving the starter model, in processes of its own, for all tests that only request."""
    from tests.serving.running import running

    keys = {
        "models": [{"name": "starter", "uri": "starter"}],
        "registry": {"uri": served_runs, "refresh_s": 1},
        "scaling": {"num_cpus": 1},
    }
    with ExitStack() as _shared["app"]:
        yield _shared["app"].enter_context(running(keys, environment=variables(s3_server)))


@pytest.fixture(scope="session")
def app_url(app: "Running") -> str:
    return app.url


@pytest.fixture(scope="session")
def picture() -> "Callable[[int], Image.Image]":
    """A smooth random picture of 64x64 for each number."""
    import numpy as np
    from PIL import Image

    def make(number: int) -> Image.Image:
        coarse = np.random.default_rng(number).integers(0, 255, (6, 6, 3), np.uint8)
        return Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)

    return make


FRAIL = """
import os, time
from PIL import Image
opened = Image.open
def open(file, *args, **named):
    head = file.read(6)
    file.seek(0)
    if head == b"KILLED":
        os.kill(os.getpid(), 9)
    if head == b"HANGED":
        time.sleep(100)
    return opened(file, *args, **named)
Image.open = open
"""


@pytest.fixture
def frail_decoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes begun meanwhile die of a picture that begins with KILLED, and hang on HANGED."""
    folder = tmp_path_factory.mktemp("frail")
    (folder / "sitecustomize.py").write_text(FRAIL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield


@pytest.fixture(scope="session")
def starter() -> "Model":
    from rayjobs.diffusion.model import load_model

    return load_model("starter")


@pytest.fixture(scope="session")
def tiny(folders: dict[str, Path]) -> "Model":
    """A random SDXL many times smaller than the starter, where no picture is looked at."""
    from rayjobs.diffusion.model import load_model

    return load_model(str(folders["sdxl"]))


@pytest.fixture(scope="session", params=["sdxl", "sd", "playground"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A diffusers folder with random weights for each family, by name."""
    import torch

    from tests import families

    root = tmp_path_factory.mktemp("models")
    for name in families.FAMILIES:
        torch.manual_seed(0)
        families.build_pipeline(name, root).save_pretrained(root / name)
    return {name: root / name for name in families.FAMILIES}
