"""Files beside a model: adapters, learned words and settings, where they are named or in folders.

Knows nothing of what is in the first two.
"""

import re
from pathlib import Path

from rayjobs.diffusion.files.folder import PICKLES, pickle_message

V_SETTING = re.compile(r"""^\s*parameterization\s*:\s*["']?v["']?\s*(#.*)?$""", re.MULTILINE)
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def lora_file(path: Path) -> Path:
    """The adapter's file: `path`, or the one in it: diffusers', peft's, or the only one.

    Raises ValueError where there is none.
    """
    if path.is_dir():
        named = [path / name for name in LORA_FILES if (path / name).is_file()]
        found = named[:1] or sorted(path.glob("*.safetensors"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"LoRA {path} is a folder of {names}; name the file")
        inner = [folder.name for folder in sorted(path.glob("*")) if _has_adapter(folder)]
        if inner and not found:
            names = ", ".join(inner)
            raise ValueError(f"LoRA {path} is a folder of {names}; give each as an adapter")
        path = found[0] if found else path / LORA_FILES[0]
    if not path.is_file():
        raise ValueError(f"LoRA {path} does not exist")
    if path.suffix in PICKLES:
        raise ValueError(f"LoRA {pickle_message(path)}")
    if path.suffix != ".safetensors":
        raise ValueError(f"LoRA {path} is not a .safetensors file; name it so if it is one")
    return path


def _has_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in LORA_FILES)


def word_file(path: Path) -> Path:
    """The file of learned embeddings: `path` or the one in it. Raises ValueError for no such."""
    path = path / "learned_embeds.safetensors" if path.is_dir() else path
    if path.suffix in PICKLES and path.is_file():
        raise ValueError(
            f"learned words {path} are a pickle, which can run code when it is opened. Convert it "
            f"once where you trust it: held = torch.load({str(path)!r}, weights_only=True); "
            "safetensors.torch.save_file({'emb_params': held['string_to_param']['*'].detach()}, "
            f"{path.with_suffix('.safetensors').name!r})"
        )
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"learned words {path}: no such .safetensors file")
    return path


def prediction(model: Path) -> str | None:
    """What the settings of latent diffusion beside a single file say of it: v-prediction, if so.

    The web UI takes them from a file of the same name that ends in `.yaml`.
    """
    settings = model.with_suffix(".yaml")
    try:
        text = settings.read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return "v_prediction" if V_SETTING.search(text) else None
