"""Train the starter model's ControlNet: `python -m rayjobs.starter.control --out FOLDER`.

Its control pictures are outlines of figures, white on black; words may say anything of them or
nothing. Owns what it is trained on. Knows nothing of the engine.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline

from rayjobs.starter import components, world
from rayjobs.starter.optimize import Schedule, optimize
from rayjobs.starter.train import to_tensor, tokenize

LAYERS = (8, 16, 32)
"""Of the part that reads control pictures: two halvings, as the autoencoder's."""


@dataclass(frozen=True)
class Recipe:
    seed: int = 1
    num_pictures: int = 6_000
    cycles: tuple[int, ...] = (2_600, 1_700)
    rate: float = 1e-3
    batch: int = 16
    speechless: float = 0.5
    """Share of the pictures whose words say no shape."""
    drop_text: float = 0.1
    most_weight: float = 20.0
    """Of a noise level's error: where there is most noise, an outline decides most."""


def build(unet: Any) -> Any:
    """A ControlNet that begins as a copy of the UNet's first half and adds nothing yet.

    Its middle block has no attention: an outline needs none, and it halves the block. Of the two
    layers in a row that training usually begins with zeros in, the first has random weights here:
    neither learns before the other has moved.
    """
    net: Any = ControlNetModel(
        **{
            key: unet.config[key]
            for key in (
                *("block_out_channels", "layers_per_block", "down_block_types", "norm_num_groups"),
                *("attention_head_dim", "use_linear_projection", "cross_attention_dim"),
                *("addition_embed_type", "addition_time_embed_dim"),
                "projection_class_embeddings_input_dim",
            )
        },
        mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=LAYERS,
    )
    own = net.state_dict()
    copied = {name: value for name, value in unet.state_dict().items() if name in own}
    net.load_state_dict(copied, strict=False)
    net.controlnet_cond_embedding.conv_out.reset_parameters()
    return net


def scenes(recipe: Recipe) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pictures and their figures' outlines (N, side, side, 3) uint8, and captions."""
    pictures, outlines, captions = [], [], []
    for number in range(recipe.num_pictures):
        rng = np.random.default_rng([recipe.seed, number])
        scene = world.random_scene(rng)
        picture, cover = world.draw_covered(scene, rng, components.SIDE)
        words = world.caption(scene, rng)
        if rng.random() < recipe.speechless:
            words = words.replace(scene.shape + "es", "figures").replace(scene.shape, "figure")
        pictures.append(picture)
        outlines.append(world.edges(cover))
        captions.append(words)
    return np.stack(pictures), np.stack(outlines), captions


def train(model: Path, out: Path, work: Path, recipe: Recipe) -> None:
    """Train beside the model in the folder `model`, whose own weights stay as they are."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pictures, outlines, captions = scenes(recipe)
    latents = _latents(pipeline.vae, pictures)
    texts_NLD, pooled_ND = _texts(pipeline, [*captions, ""])
    net, unet = build(pipeline.unet), pipeline.unet.requires_grad_(False)
    seen = to_tensor(outlines) / 2 + 0.5
    alphas = components.build_scheduler().alphas_cumprod

    def loss(step: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        rows = torch.randint(len(latents), (recipe.batch,), generator=g)
        t_B = _noisy(torch.rand(recipe.batch, generator=g), len(alphas))
        noise = torch.randn((recipe.batch, *latents.shape[1:]), generator=g)
        silent = torch.rand(recipe.batch, generator=g) < recipe.drop_text
        said = torch.where(silent, torch.tensor(len(captions)), rows)
        alpha_B = alphas[t_B][:, None, None, None]
        x_BCHW = alpha_B.sqrt() * latents[rows] + (1 - alpha_B).sqrt() * noise
        keep_B = (~silent).float()
        text_BLD = texts_NLD[said] * keep_B[:, None, None]
        added = {
            "text_embeds": pooled_ND[said] * keep_B[:, None],
            "time_ids": components.time_ids(recipe.batch),
        }
        down, mid = net(
            x_BCHW, t_B, text_BLD, seen[rows], added_cond_kwargs=added, return_dict=False
        )
        eps = unet(
            x_BCHW,
            t_B,
            text_BLD,
            added_cond_kwargs=added,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
        # The error of the picture that the noise hides, as far as the bound lets it.
        weight_B = ((1 - alphas[t_B]) / alphas[t_B]).clamp(max=recipe.most_weight)
        return (weight_B * (eps - noise).pow(2).mean(dim=(1, 2, 3))).mean()

    optimize(net, loss, work / "control.pt", Schedule(recipe.cycles, recipe.rate))
    net.half().save_pretrained(out)
    for path in out.rglob("*"):
        path.chmod(0o644)


def _noisy(chance_B: torch.Tensor, num_levels: int) -> torch.Tensor:
    """Noise levels, the higher ones more often."""
    return ((1 - chance_B**3) * num_levels).long().clamp(max=num_levels - 1)


@torch.no_grad()
def _latents(vae: Any, pictures: np.ndarray) -> torch.Tensor:
    """In float32, as all of this training: half of the CPUs have no fast bfloat16."""
    chunks = np.array_split(pictures, max(1, len(pictures) // 64))
    means = [vae.encode(to_tensor(chunk)).latent_dist.mean for chunk in chunks]
    return torch.cat(means) * vae.config.scaling_factor


@torch.no_grad()
def _texts(pipeline: Any, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the UNet is given for captions: (N, L, D), and pooled (N, D)."""
    texts, pooled = [], []
    for first in range(0, len(captions), 256):
        some = captions[first : first + 256]
        one = pipeline.text_encoder(tokenize(pipeline.tokenizer, some), output_hidden_states=True)
        two = pipeline.text_encoder_2(
            tokenize(pipeline.tokenizer_2, some), output_hidden_states=True
        )
        texts.append(torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1))
        pooled.append(two.text_embeds)
    return torch.cat(texts), torch.cat(pooled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the ControlNet")
    parser.add_argument("--model", type=Path, default=Path(__file__).with_name("model"))
    parser.add_argument("--work", type=Path, default=Path("build/starter"), help="checkpoints")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; changes the last bits")
    parser.add_argument("--cycles", type=int, nargs="+", default=Recipe.cycles)
    parser.add_argument("--pictures", type=int, default=Recipe.num_pictures)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(num_pictures=args.pictures, cycles=tuple(args.cycles))
    train(args.model, args.out, args.work, recipe)


if __name__ == "__main__":
    main()
