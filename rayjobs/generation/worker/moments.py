"""What training reads instead of class images: latents' moments and prompts' embeddings.

Owns the files under `latents/`. Knows nothing of training; the pictures are those of the shards.
"""

import io

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

from rayjobs import storage
from rayjobs.dataset.manifest import Entry, Manifest
from rayjobs.dataset.records import moments_name, prompt_key
from rayjobs.diffusion.lora import LoraBank
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.text.encoder import PromptEncoder, Text
from rayjobs.diffusion.vae.latents import encode_moments, fitted
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec import determinism
from rayjobs.models.loading import load

COLUMNS = ("record", "prompt", "status", "image")


def write(config: GenerateConfig) -> int:
    """Bring `latents/` of a data set up to date; return how many shards were encoded.

    For each shard a safetensors file with `mean.RECORD` and `logvar.RECORD`, (C, h, w) float32, not
    yet scaled; in `prompts.safetensors` `states.KEY` (77, D) and, for SDXL, `pooled.KEY` (D,),
    where KEY is `records.prompt_key` of the prompt.
    """
    determinism.pin(config)
    model, manifest = load(config.model), Manifest(config.output.uri, config.output.format)
    prompts: set[str] = set()
    made = 0
    for entry in manifest.entries():
        made += _encode_shard(manifest, entry, model, prompts)
    encoder = PromptEncoder(model, LoraBank(model), config.engine.batch_size)
    tensors: dict[str, torch.Tensor] = {}
    for prompt in sorted(prompts):
        (found,) = encoder.encode([Text(prompt, None, ())])
        tensors[f"states.{prompt_key(prompt)}"] = _stored(found.text_1LD[0])
        if found.pooled_1D is not None:
            tensors[f"pooled.{prompt_key(prompt)}"] = _stored(found.pooled_1D[0])
    facts = {"model_sha256": model.sha256}
    _store(manifest, "prompts.safetensors", save(tensors, facts))
    return made


def _encode_shard(manifest: Manifest, entry: Entry, model: Model, prompts: set[str]) -> int:
    """Encode a shard's pictures unless that was done with these very ones; 1 when it was needed."""
    name = moments_name(entry["shard"])
    facts = {"shard_sha256": entry["sha256"], "model_sha256": model.sha256}
    done = _facts(manifest, name) == facts
    columns = COLUMNS[:-1] if done else COLUMNS
    tensors: dict[str, torch.Tensor] = {}
    for row in manifest.format.read(manifest.data, entry["shard"], columns):
        prompts.add(row["prompt"])
        if done or row["status"] != "ok":
            continue
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        mean, logvar = encode_moments(fitted(image, *image.size, model), model)
        tensors[f"mean.{row['record']}"] = _stored(mean[0])
        tensors[f"logvar.{row['record']}"] = _stored(logvar[0])
    if not done:
        _store(manifest, name, save(tensors, facts))
    return int(not done)


def _facts(manifest: Manifest, name: str) -> dict[str, str] | None:
    """What an earlier file was made of."""
    uri = storage.join(manifest.uri, "latents", name)
    if not storage.exists(uri):
        return None
    with safe_open(storage.fetch(uri), "pt") as file:
        facts: dict[str, str] = file.metadata()
    return facts


def _store(manifest: Manifest, name: str, data: bytes) -> None:
    storage.write_bytes(storage.join(manifest.uri, "latents", name), data, manifest.staging)


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().cpu().contiguous()
