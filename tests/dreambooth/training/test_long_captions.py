"""Captions of several chunks: conditioned as the engine's prompts are, alone and beside others."""

import shutil
from pathlib import Path

import pytest
import torch

from rayjobs.diffusion.adapters.bank import LoraBank
from rayjobs.diffusion.model import load_model
from rayjobs.diffusion.text.chunks import tokenize
from rayjobs.diffusion.text.encoder import Embedding, PromptEncoder, Text
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data.schedule import Row
from rayjobs.dreambooth.training import worker
from tests.dreambooth.fitting import resolved, settings

pytestmark = pytest.mark.model
CAPTIONS = {
    "0": "a sks star, " + ", ".join(f"shade {n} of (red:1.2)" for n in range(10)),
    "1": "a sks star, " + "on a beach, " * 8 + "at night BREAK small",
}
"""Of several chunks, and not as many of them."""


def written(folder: Path, photos: Path, tmp_path: Path, *, trains_text: bool) -> DreamBoothConfig:
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)
    for name, text in CAPTIONS.items():
        (tmp_path / "subject" / f"{name}.txt").write_text(text)
    train = {"caption_syntax": "a1111", "caption_dropout": 0.2, "text_encoders": trains_text}
    config = settings(folder, tmp_path, global_batch_size=8, **train)
    output = config.output.model_copy(update={"uri": str(tmp_path / "run"), "cache": True})
    return config.model_copy(
        update={"output": output, "lora": config.lora.model_copy(update={"dropout": 0.3})}
    )


def of_engine(folder: Path, rows: list[Row]) -> list[Embedding]:
    """What the untrained model's prompts are conditioned on; no text is as a negative prompt."""
    model = load_model(str(folder))
    texts = [
        Text(
            tokenize(model, row.caption or "", "a1111").chunks,
            is_zero=row.caption is None and model.force_zeros,
        )
        for row in rows
    ]
    return PromptEncoder(model, LoraBank(model), 4).encode(texts)


@pytest.mark.parametrize(
    ("family", "trains_text"),
    [
        ("sdxl", True),
        ("sd", False),
        pytest.param("sdxl", False, marks=pytest.mark.slow),
        pytest.param("sd", True, marks=pytest.mark.slow),
        pytest.param("playground", True, marks=pytest.mark.slow),
    ],
)
def test_long_captions(
    folders: dict[str, Path], photos: Path, family: str, trains_text: bool, tmp_path: Path
) -> None:
    config = written(folders[family], photos, tmp_path, trains_text=trains_text)
    model = worker.load(config, "cpu", torch.float32)
    batches, module = worker.build(resolved(config), model, torch.float32)
    batches.fill_cache(0, 1)
    rows = batches.schedule.rows(1)
    batch = batches.batch(rows)
    text = batch.text or module.tuned.encode(batch.captions)
    assert text.own_BL is not None
    wanted = of_engine(folders[family], rows)
    lengths = [each.text_1LD.shape[1] // 77 for each in wanted]
    assert min(lengths) == 1
    assert len(set(lengths)) == 3, lengths
    assert text.own_BL.sum(1).tolist() == [77 * length for length in lengths]
    for number, (row, each) in enumerate(zip(rows, wanted, strict=True)):
        mine_LD = text.states_BLD[number, : each.text_1LD.shape[1]]
        assert (mine_LD - each.text_1LD[0]).abs().max() <= 1e-5, row.caption
        if each.pooled_1D is not None:
            assert text.pooled_BP is not None
            assert (text.pooled_BP[number] - each.pooled_1D[0]).abs().max() <= 1e-5
    module.tuned.train()
    for parameter in module.tuned.trainable().values():
        torch.nn.init.normal_(parameter, std=0.1)
    together = module.row_losses(batch)
    apart = torch.cat([module.row_losses(batches.batch([row])) for row in rows])
    assert (together - apart).abs().max() <= 1e-5 * together.max()
