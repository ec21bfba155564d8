"""What a newcomer starts with, in a clone or from an installed wheel.

Owns the commented starting configurations that `init` writes, and where the demo's configuration
lies. Every key and description comes from the models; only the values set at first are here.
"""

from pathlib import Path
from typing import Any

from rayjobs import keys
from rayjobs.config import BadInput

CONFIGS = Path(__file__).parent / "configs"
"""The shipped configurations; in the repository a link to configs/."""

SDXL = "For SDXL on GPUs: model.uri stabilityai/stable-diffusion-xl-base-1.0, workers.num_gpus 1"

STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": (
        f"A data set of pictures: rayjobs generate FILE\n{SDXL}.",
        {
            "model": {"uri": "starter"},
            "prompts": {
                "templates": ["a photo of a {colour} {shape} on a {ground} background"],
                "axes": {
                    "colour": ["red", "blue"],
                    "shape": ["star", "ring"],
                    "ground": ["white", "black"],
                },
            },
            "seeds": {"start": 0, "count": 2},
            "sampler": {"name": "euler", "steps": 20},
            "output": {"uri": "images"},
            "workers": {"min": 1, "num_gpus": 0, "num_cpus": 1},
        },
    ),
    "prior": (
        f"Class images for DreamBooth: rayjobs prior FILE\n{SDXL}.",
        {
            "model": {"uri": "starter"},
            "prompts": {"inline": ["a photo of a star"]},
            "num_images": 12,
            "sampler": {"name": "euler", "steps": 20},
            "output": {"uri": "class-images"},
            "workers": {"min": 1, "num_gpus": 0, "num_cpus": 1},
        },
    ),
    "dreambooth": (
        "Teach a model a subject from a few photographs: rayjobs dreambooth FILE\n"
        f"{SDXL},\ntrain.steps 500, train.learning_rate 1e-4, train.resolution 1024, "
        "train.gradient_checkpointing true.",
        {
            "model": {"uri": "starter"},
            "instance": {"uri": "photos", "prompt": "a photo of a sks star"},
            "prior": {"prompt": "a photo of a star", "num_images": 48},
            "train": {"method": "lora", "steps": 150, "learning_rate": 1e-3},
            "lora": {"rank": 16, "targets": "convolution"},
            "workers": {"min": 1, "num_gpus": 0, "num_cpus": 1},
            "checkpoint": {"every_n_steps": 50},
            "run": {"name": "first"},
            "output": {"uri": "runs/first"},
        },
    ),
    "evaluate": (
        "Measure what `rayjobs dreambooth` has made: rayjobs evaluate FILE\n"
        "For SDXL: encoders.subject facebook/dino-vits16, encoders.prompt "
        "openai/clip-vit-large-patch14.",
        {
            "model": {"uri": "runs/first/export"},
            "before": {"uri": "starter"},
            "subject": {"uri": "photos", "identifier": "sks", "class_word": "star"},
            "prompts": {"inline": ["a photo of a {0} {1} on a green background"]},
            "encoders": {"subject": "starter", "prompt": "starter"},
            "workers": {"min": 1, "num_gpus": 0, "num_cpus": 1},
            "output": {"uri": "runs/first/evaluation"},
        },
    ),
    "serve": (
        "An image API and a page: python -m serve run FILE, then http://127.0.0.1:8000\n"
        "For SDXL on a GPU: uri stabilityai/stable-diffusion-xl-base-1.0, scaling.num_gpus 1.\n"
        "A host that others can reach needs auth.keys.",
        {
            "models": [
                {
                    "name": "starter",
                    "uri": "starter",
                    "hint": "a photo of a red star on a blue background",
                }
            ],
            "engine": {"max_pending_s": 600},
            "scaling": {"num_gpus": 0, "num_cpus": 1},
        },
    ),
}
HEADER = """\
# {about}
#
# Every key is below. A key that is commented out (#key, with no space) shows its default.
"""
SERVE = """\
http_options: {host: 127.0.0.1, port: 8000}
applications:
  - name: images
    route_prefix: /
    import_path: serve.app:build
    args:
"""


def starting_text(kind: str, name: str) -> str:
    """The starting configuration of a kind, as it is written to the file `name`."""
    about, values = STARTS[kind]
    head = HEADER.format(about=about.replace("FILE", name).replace("\n", "\n# "))
    model = keys.model_of(kind)
    if kind == "serve":
        return head + SERVE + "\n".join(keys.template(model, values, 6)) + "\n"
    return head + "\n".join(keys.template(model, values)) + "\n"


def write_starting(kind: str, path: str) -> None:
    """Write the starting configuration to `path`, a local file that must not exist yet."""
    try:
        with Path(path).open("x", encoding="utf-8") as file:
            file.write(starting_text(kind, path))
    except FileExistsError:
        raise BadInput(f"{path} exists; give another name, or remove it") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None


def demo_config() -> str:
    """The path of the configuration that `make demo` runs; its output goes under ./demo."""
    return str(CONFIGS / "demo" / "generate.yaml")
