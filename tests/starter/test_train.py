"""The training: decided by (seed, step), and the same after a stop."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import load_model
from rayjobs.diffusion.request import Request
from rayjobs.starter import optimize, train
from rayjobs.starter.train import Recipe

RECIPE = Recipe(num_pictures=8, vae_cycles=(2, 2), vae_batch=1, unet_cycles=(4,), unet_batch=1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.parent.name}.{name}"] = tensor
    return found


@pytest.mark.slow
def test_a_stopped_training_ends_at_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize, "CHECKPOINT_EVERY", 1)
    train.train(tmp_path / "whole", tmp_path / "a", RECIPE)

    save, saved = optimize._save_checkpoint, []

    def save_and_stop(path: Path, *rest: object) -> None:
        save(path, *rest)
        saved.append(path)
        if len(saved) in (3, 6):  # once in the autoencoder, once in the UNet
            raise KeyboardInterrupt

    monkeypatch.setattr(optimize, "_save_checkpoint", save_and_stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train.train(tmp_path / "parts", tmp_path / "b", RECIPE)
    train.train(tmp_path / "parts", tmp_path / "b", RECIPE)

    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    (result,) = Engine(load_model(str(tmp_path / "whole"))).generate([Request(prompt="x", steps=1)])
    assert result.error is None
