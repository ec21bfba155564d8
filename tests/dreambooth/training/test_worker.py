"""Which of a worker's errors end a run: those that would occur again."""

from typing import Any

import pytest
import ray

from rayjobs.config import BadInput
from rayjobs.dreambooth.training import worker
from rayjobs.progress import FATAL, Counter

pytestmark = pytest.mark.ray


@pytest.fixture
def counter(ray_cluster: None) -> Any:
    return ray.remote(Counter).options(num_cpus=0).remote()


def notes(counter: Any) -> dict[str, Any]:
    found: dict[str, Any] = ray.get(counter.read.remote())[1]
    return found


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (BadInput("train.precision fp16 needs a GPU"), "train.precision fp16 needs a GPU"),
        (FloatingPointError("the loss is not a number"), "the loss is not a number"),
        (KeyError("unet"), "KeyError: 'unet'"),
    ],
)
def test_an_error_that_would_occur_again_ends_the_run(
    counter: Any, error: Exception, told: str
) -> None:
    worker._report_error(error, counter)
    assert notes(counter)[FATAL] == told


def test_another_ends_it_when_it_occurs_twice_at_one_step(counter: Any) -> None:
    for step in (3, 5):
        ray.get(counter.set.remote(step))
        worker._report_error(RuntimeError("the network is down\nmore"), counter)
        assert FATAL not in notes(counter)
    worker._report_error(RuntimeError("the network is down\nmore"), counter)
    assert notes(counter)[FATAL] == "RuntimeError: the network is down"
