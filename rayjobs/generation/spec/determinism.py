"""The determinism class: everything outside a request that may change a bit of a picture.

Owns what is pinned in a process, what is recorded of it, and how two classes are compared. Knows
nothing of Ray.
"""

import hashlib
import importlib.metadata
import os
from typing import Any

from rayjobs.config import BadInput, Workers, differences
from rayjobs.dataset.records import canonical_json
from rayjobs.generation.config import GenerateConfig

LIBRARIES = ("torch", "diffusers", "transformers", "pillow", "pyarrow", "numpy")
CODECS = ("zlib", "libjpeg_turbo", "webp")


def pin(workers: Workers) -> None:
    """Set what torch would otherwise choose by the machine or by measuring."""
    import torch

    from rayjobs.diffusion.modules.compiled import make_deterministic

    torch.set_num_threads(_num_threads(workers))
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    make_deterministic()


def _num_threads(workers: Workers) -> int:
    """As many as a worker has CPUs: their number changes the last bits of a picture."""
    return max(1, int(workers.num_cpus))


def current(config: GenerateConfig) -> dict[str, Any]:
    """The class of a worker of this job on this machine."""
    from PIL import features

    versions: dict[str, Any] = {name: importlib.metadata.version(name) for name in LIBRARIES}
    versions |= {name: features.version(name) for name in CODECS}
    device, model = _device(config.model.device), config.model
    # What locks of before it do not have was otherwise then.
    how = {} if model.compile == "no" else {"compiler": "deterministic"}
    if "CUDA" in device and model.channels_last == "auto" and not how:
        how |= {"layout": "contiguous"}
    if "CUDA" in device and (model.dtype, model.vae_dtype) == ("float16", "auto"):
        how |= {"vae": "bfloat16 where float16 overflows"}
    return (
        versions
        | how
        | {
            "device": device,
            "threads": _num_threads(config.workers),
            "tf32": False,
            "cudnn_benchmark": False,
            "attention": model.attention,
            "compile": model.compile,
            "watermark": False,
        }
    )


def identify(determinism: dict[str, Any]) -> str:
    """A short name of a class."""
    return hashlib.sha256(canonical_json(determinism)).hexdigest()[:12]


def check_same(locked: dict[str, Any], mine: dict[str, Any], allowed: bool) -> bool:
    """Whether a data set's class is this worker's; raises BadInput when it is not and must be."""
    changed = differences(locked, mine, now="here")
    if changed and not allowed:
        raise BadInput(
            "this machine cannot make the same bits as those that the data set was begun with; go "
            "on with the same versions and hardware, or set engine.allow_class_change=true to mark "
            "the shards made from now on:\n" + "\n".join(changed)
        )
    return not changed


def _device(wanted: str) -> str:
    """The kind of processor, as far as it may change bits."""
    import torch

    from rayjobs.diffusion.modules import onednn

    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        linear = "oneDNN" if onednn.is_faster() else "MKL"
        return f"{onednn.cpu_vendor()} {torch.backends.cpu.get_cpu_capability()}, {linear}"
    if not torch.cuda.is_available():
        raise BadInput(f"model.device is {wanted!r}, but there is no such device here; use cpu")
    major, minor = torch.cuda.get_device_capability()
    name, cudnn = torch.cuda.get_device_name(), torch.backends.cudnn.version()
    return f"{name} ({major}.{minor}), CUDA {torch.version.cuda}, cuDNN {cudnn}"
