"""How to use what a run exports: commands and snippets to copy.

Owns their text. They name the export as it lies there and run as they are.
"""

import json
import shlex

from rayjobs import storage
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.models.exports import EMBEDDINGS_FILE, FUSED, KOHYA_FILE, LORA_FILE, PEFT_FOLDER

SERVE = """\
http_options: {{host: 127.0.0.1, port: 8000}}
applications:
  - name: images
    route_prefix: /
    import_path: serve.app:build
    args:
      models: [{{name: {name}, uri: {uri}, hint: {prompt}}}]
      scaling: {{num_gpus: {num_gpus:g}, num_cpus: 1}}
"""
PYTHON = """\
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({model}, torch_dtype=torch.float16).to("cuda")
{more}pipe({prompt}).images[0].save("picture.png")
"""


def snippets(config: DreamBoothConfig, export_uri: str) -> list[tuple[str, str]]:
    """Titles and texts, the first to do first."""
    prompt = _prompt(config)
    found = [
        ("Generate pictures", generate(config, export_uri, prompt)),
        (
            "Serve it: save as serve.yaml, then run `python -m serve run serve.yaml`",
            serve(config, export_uri, prompt),
        ),
        ("Download", download(export_uri)),
    ]
    in_python = diffusers(config, "export" if storage.is_remote(export_uri) else export_uri, prompt)
    return [*found, ("In Python, with diffusers alone", in_python)] if in_python else found


def generate(config: DreamBoothConfig, export_uri: str, prompt: str) -> str:
    words = [
        "rayjobs generate pictures.yaml",
        shlex.quote(f"model.uri={export_uri}"),
        shlex.quote(f"prompts.inline={json.dumps([prompt], ensure_ascii=False)}"),
        "prompts.templates=null prompts.axes=null seeds.count=4",
        f"workers.num_gpus={1 if config.workers.num_gpus else 0}",
        "output.uri=pictures",
    ]
    return "rayjobs init generate pictures.yaml\n" + " \\\n    ".join(words) + "\n"


def serve(config: DreamBoothConfig, export_uri: str, prompt: str) -> str:
    quoted = {
        "uri": json.dumps(export_uri, ensure_ascii=False),
        "name": json.dumps(config.run.name),
    }
    num_gpus = 1 if config.workers.num_gpus else 0
    hint = json.dumps(prompt, ensure_ascii=False)
    return SERVE.format(prompt=hint, num_gpus=num_gpus, **quoted)


def download(export_uri: str) -> str:
    if not storage.is_remote(export_uri):
        return f"rsync -a HOST:{shlex.quote(export_uri)}/ export/\n"
    return f"aws s3 cp --recursive {shlex.quote(export_uri)} export\n"


def diffusers(config: DreamBoothConfig, folder: str, prompt: str) -> str:
    """Empty where it takes more than that: for a base that diffusers does not find by its uri."""
    base, kind = config.model.uri, config.export_kind
    if kind == "full":
        return PYTHON.format(model=json.dumps(folder), more="", prompt=json.dumps(prompt))
    is_foreign = storage.is_remote(base) or base == "starter" or base.endswith(".safetensors")
    if kind == "words" or config.inversion.num_vectors or is_foreign:
        return ""
    if config.lora.kind not in ("lora", "dora"):
        return ""
    more = f"pipe.load_lora_weights({json.dumps(folder)}, weight_name={json.dumps(LORA_FILE)})\n"
    return PYTHON.format(model=json.dumps(base), more=more, prompt=json.dumps(prompt))


def files(config: DreamBoothConfig) -> list[tuple[str, str]]:
    """What an export has, as paths below it, and whom each is for."""
    kind, output, found = config.export_kind, config.output, []
    if kind == "full":
        found.append(("model_index.json", "the whole model, a diffusers folder"))
    if kind == "lora":
        found.append((LORA_FILE, "the LoRA: rayjobs, diffusers, ComfyUI"))
        if output.kohya:
            found.append((KOHYA_FILE, "the same for A1111, Forge and kohya's tools"))
        if output.peft:
            found.append((f"{PEFT_FOLDER}/", "the same for peft"))
    if config.inversion.num_vectors:
        found.append((EMBEDDINGS_FILE, f"the learned word {config.identifier}"))
    if output.fused and kind != "full":
        found.append((f"{FUSED}/", "the whole model with it, a diffusers folder"))
    return found


def _prompt(config: DreamBoothConfig) -> str:
    return f"{config.instance.prompt} on a beach"
