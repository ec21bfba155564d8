"""Train the starter model from nothing: `python -m rayjobs.starter.train --out FOLDER`.

Draws the world, trains the autoencoder, then the UNet and both text encoders together, and writes a
diffusers folder in fp16. Every batch is decided by (seed, step) and a checkpoint is kept, so that a
stopped run goes on where it was and ends at the same weights. Knows nothing of the engine.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline

from rayjobs.starter import components, world
from rayjobs.starter.optimize import Schedule, optimize


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run. Cycles and rates are those of `Schedule`."""

    seed: int = 0
    num_pictures: int = 30_000
    vae_cycles: tuple[int, ...] = (2_600, 3_400)
    vae_batch: int = 16
    vae_rate: float = 1.5e-3
    unet_cycles: tuple[int, ...] = (6_000,)
    unet_batch: int = 40
    unet_rate: float = 1.2e-3
    drop_to_zeros: float = 0.09
    drop_to_empty: float = 0.04
    min_snr: float = 5.0


def train(out: Path, work: Path, recipe: Recipe) -> None:
    """Run all stages whose results are not in `work` yet and write the model to `out`."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    pictures, captions = draw_world(recipe)
    vae = train_vae(pictures, work, recipe)
    latents = encode_pictures(vae, pictures)
    scale = 1.0 / float(latents.std())
    vae.register_to_config(scaling_factor=scale)
    denoiser = train_denoiser(latents * scale, captions, work, recipe)
    save_model(denoiser, vae, work, out)


def draw_world(recipe: Recipe) -> tuple[np.ndarray, list[str]]:
    """Pictures (N, side, side, 3) uint8 and their captions."""
    pictures, captions = [], []
    for number in range(recipe.num_pictures):
        rng = np.random.default_rng([recipe.seed, number])
        scene = world.random_scene(rng)
        pictures.append(world.draw(scene, rng, components.SIDE))
        captions.append(world.caption(scene, rng))
    return np.stack(pictures), captions


def train_vae(pictures: np.ndarray, work: Path, recipe: Recipe) -> Any:
    vae: Any = components.build_vae()

    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng([recipe.seed, 1, step])
        known = pictures[rng.integers(len(pictures), size=recipe.vae_batch * 2 // 3)]
        others = [
            world.random_collage(rng, components.SIDE) for _ in range(recipe.vae_batch - len(known))
        ]
        x_BCHW = to_tensor(np.concatenate([known, np.stack(others)]))
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x_BCHW).latent_dist
            y_BCHW = vae.decode(posterior.sample(generator)).sample.float()
        return _picture_loss(y_BCHW, x_BCHW) + 1e-6 * posterior.kl().mean()

    optimize(vae, loss, work / "vae.pt", Schedule(recipe.vae_cycles, recipe.vae_rate))
    return vae.eval()


def _picture_loss(y_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> torch.Tensor:
    """L1 + MSE + the L1 of neighbouring differences, which is what edges are made of."""
    loss = F.l1_loss(y_BCHW, x_BCHW) + F.mse_loss(y_BCHW, x_BCHW)
    for dim in (2, 3):
        loss = loss + F.l1_loss(y_BCHW.diff(dim=dim), x_BCHW.diff(dim=dim))
    return loss


@torch.no_grad()
def encode_pictures(vae: Any, pictures: np.ndarray) -> torch.Tensor:
    """Posterior means (N, 4, h, w), unscaled."""
    chunks = np.array_split(pictures, max(1, len(pictures) // 64))
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([vae.encode(to_tensor(c)).latent_dist.mean.float() for c in chunks])


class Denoiser(torch.nn.Module):
    """The UNet with both text encoders: noise from noisy latents and caption tokens."""

    def __init__(self, tokenizer: components.CLIPTokenizer):
        super().__init__()
        self.text_encoder, self.text_encoder_2 = components.build_text_encoders(tokenizer)
        self.unet: Any = components.build_unet()

    def forward(
        self,
        x_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        tokens_2BL: torch.Tensor,
        keep_B: torch.Tensor,
    ) -> torch.Tensor:
        """Predicted noise (B, C, H, W); rows with keep 0 are trained without any text."""
        first = self.text_encoder(tokens_2BL[0], output_hidden_states=True)
        second = self.text_encoder_2(tokens_2BL[1], output_hidden_states=True)
        text_BLD = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        conditions = {
            "text_embeds": second.text_embeds * keep_B[:, None],
            "time_ids": components.time_ids(len(x_BCHW)),
        }
        text_BLD = text_BLD * keep_B[:, None, None]
        return self.unet(x_BCHW, t_B, text_BLD, added_cond_kwargs=conditions).sample


def train_denoiser(
    latents: torch.Tensor, captions: list[str], work: Path, recipe: Recipe
) -> Denoiser:
    tokenizers = [
        components.save_tokenizer(work / "tokenizer", components.END),
        components.save_tokenizer(work / "tokenizer_2", "!"),
    ]
    tokens_2NL = torch.stack([tokenize(tokenizer, [*captions, ""]) for tokenizer in tokenizers])
    denoiser = Denoiser(tokenizers[0])
    alphas = components.build_scheduler().alphas_cumprod

    def loss(step: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        rows = torch.randint(len(latents), (recipe.unet_batch,), generator=g)
        t_B = torch.randint(len(alphas), (recipe.unet_batch,), generator=g)
        noise = torch.randn((recipe.unet_batch, *latents.shape[1:]), generator=g)
        chance_B = torch.rand(recipe.unet_batch, generator=g)
        alpha_B = alphas[t_B][:, None, None, None]
        x_BCHW = alpha_B.sqrt() * latents[rows] + (1 - alpha_B).sqrt() * noise
        empty = chance_B > 1 - recipe.drop_to_empty
        texts = torch.where(empty, torch.tensor(len(captions)), rows)
        keep_B = (chance_B > recipe.drop_to_zeros).float()
        with torch.autocast("cpu", torch.bfloat16):
            eps = denoiser(x_BCHW, t_B, tokens_2NL[:, texts], keep_B).float()
        snr_B = alphas[t_B] / (1 - alphas[t_B])
        weight_B = snr_B.clamp(max=recipe.min_snr) / snr_B
        return (weight_B * (eps - noise).pow(2).mean(dim=(1, 2, 3))).mean()

    schedule = Schedule(recipe.unet_cycles, recipe.unet_rate)
    optimize(denoiser, loss, work / "unet.pt", schedule)
    return denoiser.eval()


def save_model(denoiser: Denoiser, vae: Any, work: Path, out: Path) -> None:
    """Write the diffusers folder in fp16, loadable by plain diffusers."""
    pipeline: Any = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer=components.CLIPTokenizer.from_pretrained(work / "tokenizer"),
        tokenizer_2=components.CLIPTokenizer.from_pretrained(work / "tokenizer_2"),
        unet=denoiser.unet,
        scheduler=components.build_scheduler(),
        add_watermarker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out)
    for folder, pad_token in (("tokenizer", components.END), ("tokenizer_2", "!")):
        components.save_tokenizer(out / folder, pad_token)
        (out / folder / "tokenizer.json").unlink(missing_ok=True)
    for path in out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files as 0600


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def tokenize(tokenizer: components.CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--work", type=Path, default=Path("build/starter"), help="checkpoints")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; changes the last bits")
    parser.add_argument("--vae-cycles", type=int, nargs="+", default=Recipe.vae_cycles)
    parser.add_argument("--unet-cycles", type=int, nargs="+", default=Recipe.unet_cycles)
    parser.add_argument("--pictures", type=int, default=Recipe.num_pictures)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(
        num_pictures=args.pictures,
        vae_cycles=tuple(args.vae_cycles),
        unet_cycles=tuple(args.unet_cycles),
    )
    train(args.out, args.work, recipe)


if __name__ == "__main__":
    main()
