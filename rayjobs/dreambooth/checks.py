"""What can be known to be wrong before a run begins, beyond its file: packages, devices, encoders.

Owns the checks that look at this machine and at the model's small files. `resolved` calls them
before anything is written. Knows no torch; a tracker's arguments are looked at only where it is on.
"""

import difflib
import importlib.util
import inspect
import json
import os
from pathlib import Path
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.weights import Weights
from rayjobs.dreambooth.config import DreamBoothConfig, EncodersConfig

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
OFFLINE = ("offline", "disabled", "dryrun")


def check_packages(config: DreamBoothConfig) -> None:
    package = PACKAGES.get(config.train.optimizer)
    if package and importlib.util.find_spec(package) is None:
        raise BadInput(
            f"train.optimizer {config.train.optimizer} needs the package {package}; install it on "
            "every node, or use adamw"
        )


def check_precision(config: DreamBoothConfig) -> None:
    if config.train.precision == "fp16" and not config.workers.num_gpus:
        raise BadInput(
            "train.precision fp16 needs a GPU, and workers.num_gpus is 0; use fp32 or bf16, or "
            "give workers.num_gpus=1"
        )


def check_objective(weights: Weights) -> None:
    """Refuse a model with other inputs than training gives, or whose noise schedule cannot be
    trained on."""
    if weights.needs_mask:
        raise BadInput(
            "model.uri: the model only makes masked parts of pictures anew, which is not trained "
            "here; give the model that it was made from"
        )
    values = weights.scheduler
    kind = values.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise BadInput(
            f"model.uri: the model predicts {kind!r}; training knows epsilon and v_prediction"
        )
    if kind == "epsilon" and values.get("rescale_betas_zero_snr"):
        raise BadInput(
            "model.uri: its schedule ends in pure noise (rescale_betas_zero_snr), of which a model "
            "with epsilon prediction learns nothing; take one with v_prediction"
        )


def check_blocks(config: DreamBoothConfig, weights: Weights) -> None:
    """Refuse rates of blocks that the UNet does not have, or that have nothing to train."""
    file = weights.path / "unet" / "config.json"
    if not config.train.block_rates or not file.is_file():
        return
    values: dict[str, Any] = json.loads(file.read_text())
    for name in config.train.block_rates:
        kind, *rest = name.split(".")
        count = len(values.get(f"{kind[:-1]}_types", ()))
        if rest and kind in ("down_blocks", "up_blocks") and rest[0] not in map(str, range(count)):
            raise BadInput(f"train.block_rates: {name}: the model's {kind} are 0 .. {count - 1}")
        if config.train.method == "lora" and not _has_adapter(name, values, config.lora.targets):
            raise BadInput(
                f"train.block_rates: {name} has no layer that lora.targets={config.lora.targets} "
                "trains; leave it out, or give targets that do"
            )


def _has_adapter(name: str, values: dict[str, Any], targets: str) -> bool:
    """Whether a block of the UNet has layers that get an adapter."""
    kind, *rest = name.split(".")
    if kind not in ("down_blocks", "mid_block", "up_blocks"):
        return False
    if targets == "convolution":
        return True
    of_kind = values.get(f"{kind[:-1]}_types", [values.get("mid_block_type") or "CrossAttn"])
    types = of_kind[int(rest[0]) :][:1] if kind != "mid_block" and rest else of_kind
    attends = any("CrossAttn" in each for each in types)
    return attends and not {"resnets", "downsamplers", "upsamplers"} & set(rest)


def check_token(config: DreamBoothConfig, tokenizer: Any) -> None:
    """Refuse to learn a word that the model has learned before."""
    word = config.identifier
    if config.inversion.num_vectors and tokenizer is not None and word in tokenizer.get_vocab():
        raise BadInput(
            f"inversion.token: the model's tokenizer knows {word!r} already; take another, such as "
            f"<{word.strip('<>')}2>, in instance.prompt too"
        )


def check_encoders(encoders: EncodersConfig, key: str) -> None:
    """Refuse a local encoder that is not there; what the hub has is known only by asking."""
    for name, uri in (("subject", encoders.subject), ("prompt", encoders.prompt)):
        if uri is None or uri == "starter" or storage.is_remote(uri):
            continue
        is_path = uri.startswith(("/", ".", "~")) or uri.count("/") != 1
        if Path(uri).exists() and not (Path(uri) / "config.json").is_file():
            raise BadInput(f"{key}.{name}: {uri} is no encoder: it has no config.json")
        if is_path and not Path(uri).exists():
            raise BadInput(f"{key}.{name}: {uri} does not exist")


def check_trackers(config: DreamBoothConfig) -> None:
    trackers = config.trackers
    for name, settings in (("wandb", trackers.wandb), ("mlflow", trackers.mlflow)):
        if settings is None:
            continue
        if importlib.util.find_spec(name) is None:
            raise BadInput(f"trackers.{name} needs the package {name}; install it on every node")
        known = _arguments(name)
        for argument in settings:
            if argument not in known:
                near = difflib.get_close_matches(argument, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
                raise BadInput(f"trackers.{name} takes no argument {argument!r}; {hint}")
    if trackers.wandb is not None and _needs_key(trackers.wandb) and not _wandb_key():
        raise BadInput(
            "trackers.wandb needs an API key: `wandb login`, or WANDB_API_KEY, on every node; or "
            "trackers.wandb.offline=true"
        )


def _arguments(tracker: str) -> list[str]:
    """Keyword arguments that Lightning's logger takes, or hands on."""
    from pytorch_lightning import loggers

    loggers_by_name: dict[str, Any] = {"wandb": loggers.WandbLogger, "mlflow": loggers.MLFlowLogger}
    taken = list(inspect.signature(loggers_by_name[tracker].__init__).parameters)
    if tracker == "wandb":
        import wandb  # type: ignore

        taken += inspect.signature(wandb.init).parameters
    return sorted(set(taken) - {"self", "kwargs"})


def _needs_key(settings: dict[str, Any]) -> bool:
    mode = settings.get("mode") or os.environ.get("WANDB_MODE", "online")
    return not settings.get("offline") and mode not in OFFLINE


def _wandb_key() -> str | None:
    import wandb  # type: ignore

    key: str | None = wandb.api.api_key
    return key
