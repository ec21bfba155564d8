"""An optimizer step's parts, beside diffusers' own."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image

from rayjobs.config import BadInput
from rayjobs.dreambooth.data.photos import find_photos
from rayjobs.dreambooth.training import worker
from rayjobs.dreambooth.training.module import DreamBooth
from tests.dreambooth.fitting import resolved, settings

pytestmark = pytest.mark.model


def module(folder: Path, photos: Path, **train: Any) -> DreamBooth:
    """With its optimizer, before the first step."""
    run = resolved(settings(folder, photos, **train))
    made = worker.build(run, worker.load(run.config, "cpu", torch.float32), torch.float32)[1]
    made.configure_optimizers()
    return made


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_the_average_is_that_of_diffusers(
    folders: dict[str, Path], photos: Path, decay: float
) -> None:
    """Also of 30 steps with a decay that is meant for thousands."""
    made = module(folders["sd"], photos, ema_decay=decay, steps=30, text_encoders=False)
    trained = made.tuned.trainable()
    theirs = EMAModel(list(trained.values()), decay=decay)
    torch.manual_seed(0)
    for _ in range(30):
        for parameter in trained.values():
            parameter.grad = torch.randn_like(parameter)
        made._update()
        made.step += 1
        theirs.step(list(trained.values()))
    for ours, other in zip(made.average.values(), theirs.shadow_params, strict=True):
        assert (ours - other).abs().max() < 1e-6
    begun = module(folders["sd"], photos, ema_decay=decay, text_encoders=False).average
    moved = [(made.average[n] - begun[n]).norm() / (trained[n] - begun[n]).norm() for n in begun]
    assert min(moved) > 0.5, "what is exported is mostly what was trained"


@pytest.mark.parametrize("kind", ["files", "alpha"])
def test_the_loss_counts_inside_of_a_mask(
    folders: dict[str, Path], photos: Path, tmp_path: Path, kind: str
) -> None:
    """Each latent by the share of its pixels, after scaling and cropping; class images whole."""
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)
    picture = Image.open(tmp_path / "subject" / "0.png").convert("RGBA")  # 80 x 64
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (0, 0, 36, 64))  # of the square crop's 64 columns the first 28
    if kind == "alpha":
        picture.putalpha(mask)
        picture.save(tmp_path / "subject" / "0.png")
    else:
        mask.save(tmp_path / "subject" / "0-masklabel.png")
    config = settings(folders["sdxl"], tmp_path, masks=kind, mask_floor=0.2, global_batch_size=2)
    run = resolved(config)
    assert [photo.name for photo in run.photos] == ["0.png", "1.png"]
    batches, made = worker.build(run, worker.load(config, "cpu", torch.float32), torch.float32)
    rows = batches.schedule.rows(0)
    batch = batches.batch(rows)
    assert batch.mask_B1HW is not None
    for row, mask_1HW in zip(rows, batch.mask_B1HW, strict=True):
        wanted = torch.ones(8, 8)
        if row.view.photo.name == "0.png" and not row.view.is_prior:
            wanted[:, 4:] = 0.2
            wanted[:, 3] = 0.2 + 0.8 * 0.5
        assert (mask_1HW[0] - wanted).abs().max() < 0.05, row.view.photo.name
    bare = dataclasses.replace(batch, mask_B1HW=None)
    whole, masked = made.losses(bare), made.losses(batch)
    assert masked[1] == whole[1], "class images"
    assert 0.2 * whole[0] < masked[0] < whole[0]
    ones = dataclasses.replace(batch, mask_B1HW=torch.ones_like(batch.mask_B1HW))
    assert torch.equal(made.losses(ones), whole)


def test_a_mask_of_another_shape_is_refused(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)
    Image.new("L", (64, 64)).save(tmp_path / "subject" / "0-mask.png")
    with pytest.raises(BadInput, match=r"0-mask\.png: a mask of 64 x 64 pixels for a picture of"):
        find_photos(str(tmp_path / "subject"), "x")
