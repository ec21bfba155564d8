"""What a row costs a GPU, on a twin of one: no step waits, and no operator mixes devices."""

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.diffusion.modules.side import beside_steps
from rayjobs.diffusion.request import Request
from rayjobs.diffusion.sampler_names import EDM, SAMPLERS
from tests import cuda_table
from tests.cuda_device import MixedDevices, ReadTooEarly, TwinGpu
from tests.cuda_twin import twin_gpu

pytestmark = pytest.mark.model

NAMES = [name for name, (kind, _) in SAMPLERS.items() if kind not in EDM]
OF_IMAGES = [name for name in NAMES if name not in cuda_table.NO_IMAGES]
KINDS = ["ddim", "dpmpp_sde", "euler", "euler_a", "unipc"]
"""One of each way to make noise and to keep a schedule."""
MOST_LAUNCHES = 40
"""Of a step without the UNet."""


@pytest.fixture(scope="module")
def gpu(folders: dict[str, Path]) -> Iterator[TwinGpu]:
    with twin_gpu() as gpu:
        yield gpu


@pytest.fixture(scope="module")
def model(gpu: TwinGpu, folders: dict[str, Path]) -> Model:
    return cuda_table.load(folders["sdxl"])


@pytest.fixture(scope="module")
def modes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return cuda_table.modes(64, cuda_table.save_lora(tmp_path_factory.mktemp("lora"), 32))


def test_the_twin_tells_what_waits(gpu: TwinGpu) -> None:
    host = torch.ones(2)
    with gpu.counting() as counts:
        for non_blocking in (False, True):
            host.to("cuda:0", non_blocking=non_blocking)
        assert len(counts.waits) == 2, "memory that is not pinned"
        there = host.pin_memory().to("cuda:0", non_blocking=True)
        (there * 2 + torch.tensor(1.0))[0]
        assert (len(counts.waits), counts.uploads, counts.num_launches) == (2, 1, 2)
        there.sum().item()
        there[[0]]
        there[there > 0]
        torch.tensor([1.0], device="cuda:0")
        torch.linalg.solve(torch.eye(2, device="cuda:0"), there)
        assert len(counts.waits) == 7
        back = there.to("cpu", non_blocking=True)
        assert len(counts.waits) == 7
        with pytest.raises(ReadTooEarly):
            back + 1
        torch.cuda.current_stream().synchronize()
        assert torch.equal(back, host)
    assert all(wait.thread == "MainThread" for wait in counts.waits)
    for mixed in (lambda: there + host, lambda: torch.stack([there.sum(), host.sum()])):
        with pytest.raises(MixedDevices):
            mixed()


@pytest.mark.parametrize(
    ("mode", "samplers"),
    [
        ("text to image", NAMES),
        ("inpainting", KINDS),
        ("image to image", ["euler"]),
        ("LoRA, learned and weighted words", ["euler"]),
        pytest.param("image to image", OF_IMAGES, marks=pytest.mark.slow),
        pytest.param("inpainting", OF_IMAGES, marks=pytest.mark.slow),
    ],
)
def test_no_step_waits(
    gpu: TwinGpu,
    model: Model,
    modes: dict[str, dict[str, Any]],
    mode: str,
    samplers: list[str],
) -> None:
    """Nor does an arrival or a preview, and a sampler is few operators."""
    with cuda_table.networks_unobserved(gpu, model) if samplers[1:] else nullcontext():
        measured = cuda_table.Measured(gpu, model, samplers, modes[mode])
    assert measured.waits == []
    lines = {line.who: line for line in measured.lines(mode)}
    assert set(lines) == {*samplers, "the engine"}
    assert all((line.step, line.arrival, line.preview or 0) == (0, 0, 0) for line in lines.values())
    launches = {name: lines[name].launches for name in samplers}
    assert {name: many for name, many in launches.items() if not 0 < many <= MOST_LAUNCHES} == {}


def test_no_step_of_an_edm_model_waits(gpu: TwinGpu, folders: dict[str, Path]) -> None:
    model = cuda_table.load(folders["playground"])
    names = [name for name in SAMPLERS if name not in NAMES]
    with cuda_table.networks_unobserved(gpu, model):
        assert cuda_table.Measured(gpu, model, names, {}).waits == []


def test_a_picture_travels_in_bytes(
    gpu: TwinGpu, model: Model, modes: dict[str, dict[str, Any]]
) -> None:
    """Rounded on the device, laid over its init image there too; as floats only where asked for."""
    kept = {**modes["inpainting"], "keep_unmasked": True}
    for extra, keep_pixels in (({}, False), (kept, False), ({}, True)):
        request = Request(prompt="a red star", seed=1, steps=2, sampler="euler", **extra)
        engine = Engine(model, max_rows=1, fixed_shape=False)
        with gpu.counting() as counts, cuda_table.networks_unobserved(gpu, model):
            (result,) = engine.generate([request], keep_pixels)
        assert result.image is not None, result.error
        most = 3 * 64 * 64 * (1 + 4 * keep_pixels)
        assert most <= counts.downloaded < most + 64


def test_other_work_is_done_beside_the_steps(gpu: TwinGpu) -> None:
    side = beside_steps("cuda:0", "scoring")
    with gpu.counting() as counts:
        assert side.submit(lambda: (torch.ones(2).to("cuda:0") * 2).sum().item()).result() == 4
    assert counts.in_thread() == []
    assert len(counts.in_thread("scoring")) == 3
    here = beside_steps("cpu", "scoring").submit(threading.current_thread)
    assert here.result() is threading.current_thread()


def test_a_seed_is_the_same_picture_as_on_a_cpu(
    gpu: TwinGpu, model: Model, folders: dict[str, Path], modes: dict[str, dict[str, Any]]
) -> None:
    """Of samplers that draw noise too; and only the autoencoder's thread waits for it."""
    requests = [
        Request(prompt="a red star", seed=5, steps=3, sampler=name, **modes[mode])
        for name, mode in (
            ("euler_a", "image to image"),
            ("dpmpp_sde", "text to image"),
            ("sa_solver", "text to image"),
            ("unipc", "inpainting"),
        )
    ]
    made: list[dict[int, Any]] = []
    for each in (model, load_model(str(folders["sdxl"]), ModelOptions(device="cpu"))):
        engine = Engine(each, max_rows=8, fixed_shape=False)
        with gpu.counting() as counts, cuda_table.networks_unobserved(gpu, model):
            results = list(engine.generate(requests, keep_pixels=True))
        assert [result.error for result in results] == [None] * len(requests)
        made.append({id(result.request): result.pixels for result in results})
        assert counts.in_thread() == []
    for request in requests:
        theirs, ours = (pixels[id(request)] for pixels in made)
        assert (theirs - ours).abs().max() < 1e-4, request.sampler
