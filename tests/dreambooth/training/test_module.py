"""An optimizer step's parts, beside diffusers' own."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from transformers.optimization import Adafactor

from rayjobs.config import BadInput
from rayjobs.dreambooth import results
from rayjobs.dreambooth.data.photos import find_photos
from rayjobs.dreambooth.training import worker
from rayjobs.dreambooth.training.held_out import measure
from rayjobs.dreambooth.training.module import DreamBooth
from rayjobs.dreambooth.training.optimizers import FusedBackward, parameter_groups
from rayjobs.dreambooth.training.tuned_model import TunedModel
from tests.dreambooth.fitting import fit, resolved, settings

# Lightning reads deprecated parts of torch.
pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


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
        made._set_rates()
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
        painted = Image.new("LA", picture.size, 255)  # white, on what is transparent
        painted.putalpha(mask)
        painted.save(tmp_path / "subject" / "0-masklabel.png")
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


def run_steps(folder: Path, photos: Path, **train: Any) -> dict[str, torch.Tensor]:
    """The trained weights after three steps."""
    usual: dict[str, Any] = {"steps": 3, "text_encoders": False, "max_grad_norm": 1e9}
    tuned, _ = fit(resolved(settings(folder, photos, **usual | train)))
    return {name: p.detach() for name, p in tuned.trainable().items()}


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_updates_within_the_backward_pass(
    folders: dict[str, Path], photos: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight for weight those of updates after it, with no gradient left beside another."""
    settings: dict[str, Any] = {"optimizer": optimizer, "method": "full", "ema_decay": 0.5}
    wanted = run_steps(folders["sd"], photos, **settings)
    held: list[int] = []
    update = FusedBackward._update

    def watch(self: FusedBackward, parameter: torch.Tensor, group: int) -> None:
        alive = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        held.append(len(alive))
        update(self, parameter, group)

    monkeypatch.setattr(FusedBackward, "_update", watch)
    mine = run_steps(folders["sd"], photos, fused_backward=True, **settings)
    assert len(held) == 3 * len(mine)
    assert max(held) <= 2, "gradients at once"
    for name, weight in wanted.items():
        assert (mine[name] - weight).abs().max() <= 1e-6, name


def test_adafactor_is_that_of_transformers(folders: dict[str, Path], photos: Path) -> None:
    """Beside its own steps on the same gradients; it keeps a row and a column of each matrix."""
    made = module(folders["sd"], photos, optimizer="adafactor", learning_rate=1e-3)
    trained = made.tuned.trainable()
    copies = {name: p.detach().clone().requires_grad_() for name, p in trained.items()}
    absolute = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    unet = [p for name, p in copies.items() if name.startswith("unet")]
    text = [p for name, p in copies.items() if name.startswith("text")]
    rates = [{"params": unet, "lr": 1e-3}, {"params": text, "lr": 1e-4}]
    theirs = Adafactor(rates, weight_decay=0, **absolute)
    torch.manual_seed(0)
    for _ in range(3):
        for name, parameter in trained.items():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
            copies[name].grad = parameter.grad.clone()
        made._set_rates()
        made._update()
        theirs.step()
        made.step += 1
    assert all(torch.equal(trained[name], copy) for name, copy in copies.items())
    matrix = next(p for p in trained.values() if p.ndim == 2)
    numbers = sum(x.numel() for x in made.optimizer.state[matrix].values() if torch.is_tensor(x))
    assert numbers < sum(matrix.shape) + 3


def test_rates_by_block_and_matrix(folders: dict[str, Path], photos: Path) -> None:
    """The longest name counts; B of LoRA+ is faster; without either the groups are as ever."""
    config = settings(folders["sdxl"], photos, learning_rate=1e-3)
    rates = {"up_blocks": 0.0, "up_blocks.0.attentions.0": 3.0}
    train = config.train.model_copy(update={"block_rates": rates})
    lora = config.lora.model_copy(update={"plus_ratio": 16.0})
    varied = config.model_copy(update={"train": train, "lora": lora})
    tuned = TunedModel(worker.load(config, "cpu", torch.float32), config, torch.float32)
    names = {id(p): name for name, p in tuned.trainable().items()}
    seen: dict[str, float] = {}
    for group in parameter_groups(varied, tuned):
        seen |= {names[id(p)]: group["lr"] for p in group["params"]}
    assert seen.keys() == tuned.trainable().keys()
    for name, rate in seen.items():
        wanted = 1e-4 if name.startswith("text") else 1e-3
        wanted *= 16 if ".lora_B." in name else 1
        if name.startswith("unet.up_blocks"):
            wanted *= 3 if name.startswith("unet.up_blocks.0.attentions.0.") else 0
        assert rate == pytest.approx(wanted), name
    plain = list(parameter_groups(config, tuned))
    parts = [{names[id(p)].split(".")[0] for p in group["params"]} for group in plain]
    assert parts == [{"unet"}, {"text_encoders"}]
    other = config.train.model_copy(update={"block_rates": {"conv_out": 2.0}})
    with pytest.raises(BadInput, match=r"no trained weight is in conv_out"):
        list(parameter_groups(config.model_copy(update={"train": other}), tuned))


def test_a_block_without_a_rate_stays(folders: dict[str, Path], photos: Path) -> None:
    begun = module(folders["sd"], photos, method="full", text_encoders=False).tuned.trainable()
    rates = {"down_blocks": 0.0}
    moved = run_steps(folders["sd"], photos, method="full", block_rates=rates, weight_decay=0.1)
    for name, weight in moved.items():
        assert torch.equal(weight, begun[name]) == name.startswith("unet.down_blocks."), name


def test_shuffled_captions_are_encoded_beside_the_cache(
    folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)
    for name in ("0.txt", "1.txt"):
        (tmp_path / "subject" / name).write_text("a sks star, red, blue, small")
    train = {"shuffle_tags": True, "keep_tags": 1, "text_encoders": False, "global_batch_size": 8}
    config = settings(folders["sd"], tmp_path, **train)
    output = config.output.model_copy(update={"uri": str(tmp_path / "out"), "cache": True})
    run = resolved(config.model_copy(update={"output": output}))
    batches, made = worker.build(run, worker.load(config, "cpu", torch.float32), torch.float32)
    batches.fill_cache(0, 1)
    batch = batches.batch(batches.schedule.rows(0))
    assert len(set(batch.captions)) > 3
    assert batch.text is not None
    wanted = made.tuned.encode(batch.captions).states_BLD
    assert (batch.text.states_BLD - wanted).abs().max() <= 1e-5


def test_the_loss_at_fixed_noise(folders: dict[str, Path], photos: Path, family: str) -> None:
    """A function of the weights alone: not of calls, shares, dropout or the time of asking."""
    config = settings(folders[family], photos, caption_dropout=0.5)
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"dropout": 0.5})})
    run = resolved(config)
    run = dataclasses.replace(run, held_out=run.photos)
    batches, made = worker.build(run, worker.load(config, "cpu", torch.float32), torch.float32)
    rows = batches.fixed_rows
    assert len(rows) == 2 * config.validation.loss_levels
    assert len({row.quantile for row in rows}) == config.validation.loss_levels
    made.tuned.unet.train()
    whole = measure(made, batches, rows, 64)
    assert made.tuned.unet.training, "as it was before"
    parts = measure(made, batches, rows[::2], 3) + measure(made, batches, rows[1::2], 1)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)
    made.tuned.eval()
    by_row = [made.row_losses(batches.batch([row])).item() for row in rows]
    assert whole.item() == pytest.approx(sum(by_row), rel=1e-5)
    with torch.no_grad():
        for parameter in made.tuned.trainable().values():
            parameter.add_(0.1)
    assert measure(made, batches, rows, 64).item() != pytest.approx(whole.item(), rel=1e-3)


def test_when_a_run_has_stalled() -> None:
    def stalled(losses: list[float], patience: int) -> bool:
        return results.has_stalled(list(enumerate(losses)), patience)

    assert not stalled([3.0, 2.0, 1.0], 1)
    assert not stalled([1.0], 1)
    assert stalled([1.0, 1.0], 1)
    assert stalled([1.0, 1 - 1e-8], 1), "rounding"
    assert not stalled([1.0, 2.0], 2)
    assert stalled([3.0, 1.0, 2.0, 1.5], 2)
    assert not stalled([3.0, 2.0, 2.5, 1.5], 2)
    assert results.step_of_least([(10, 3.0), (20, 1.0), (30, 1.0)]) == 20
    assert results.step_of_least([]) is None


def test_sharded_workers_make_equally_many_calls(folders: dict[str, Path], photos: Path) -> None:
    """Pictures of several sizes make several calls; those made again leave the loss as it is."""
    run = resolved(settings(folders["sd"], photos, "none", buckets=True, global_batch_size=6))
    batches, made = worker.build(run, worker.load(run.config, "cpu", torch.float32), torch.float32)
    uneven = False
    for step in range(4):
        plain, equal = (
            [next(batches.steps(step, step + 1, rank, 3, None, equal=same)) for rank in range(3)]
            for same in (False, True)
        )
        uneven |= len({len(share) for share in plain}) > 1
        assert len({len(share) for share in equal}) == 1
        for one, other in zip(plain, equal, strict=True):
            wanted = sum(made.losses(batch) for batch in one)
            losses = sum(made.losses(batch) * batch.counts for batch in other)
            assert torch.equal(torch.as_tensor(wanted), torch.as_tensor(losses))
    assert uneven
