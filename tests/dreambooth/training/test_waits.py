"""What a micro-batch costs a GPU, on a twin of one, as far as that goes: its forward passes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rayjobs.dreambooth.training import worker
from tests.cuda_twin import twin_gpu
from tests.dreambooth.fitting import resolved, settings

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.mark.parametrize(
    ("mode", "train"),
    [
        ("images", {"text_encoders": False, "min_snr_gamma": 5.0, "loss": "huber"}),
        ("teacher", {"text_encoders": True, "caption_syntax": "a1111"}),
    ],
)
def test_no_micro_batch_waits(
    folders: dict[str, Path], photos: Path, mode: str, train: dict[str, Any]
) -> None:
    """But the first, for tables that stay on the device."""
    config = settings(folders["sdxl"], photos, mode, **train)
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"dropout": 0.1})})
    run = resolved(config)
    with twin_gpu() as gpu, torch.no_grad():
        model = worker.load(run.config, "cuda:0", torch.float32)
        batches, module = worker.build(run, model, torch.float32)
        for _, network in module.tuned.parts():
            network.train()
        made = [batches.batch(batches.schedule.rows(step)) for step in range(2)]
        module.losses(made[0].to("cuda:0"))
        with gpu.counting() as counts:
            losses_2 = module.losses(made[1].to("cuda:0"))
        assert losses_2.is_cuda
        assert counts.waits == []
        assert counts.uploads >= 4, "the batch itself"
