"""What can be known to be wrong before a run begins, beyond its file: packages, devices, encoders.

Owns the checks that look at this machine and at the model's small files. `resolved` calls them
before anything is written. Knows no torch; a tracker's arguments are looked at only where it is on.
"""

import difflib
import importlib.util
import inspect
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.text import syntax
from rayjobs.diffusion.weights import Weights
from rayjobs.dreambooth.config import DreamBoothConfig, EncodersConfig
from rayjobs.dreambooth.data.photos import Photo, shortened

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
OFFLINE = ("offline", "disabled", "dryrun")
MAX_CAPTION_TOKENS = 3500
"""Of a caption in any syntax but plain: it fits into the chunks that a prompt may have."""


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
    """Refuse a model whose own noise schedule cannot be trained on."""
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
    """Refuse rates of blocks that the UNet does not have."""
    file = weights.path / "unet" / "config.json"
    if not config.train.block_rates or not file.is_file():
        return
    values: dict[str, Any] = json.loads(file.read_text())
    for name in config.train.block_rates:
        kind, *rest = name.split(".")
        count = len(values.get(f"{kind[:-1]}_types", ()))
        if rest and kind in ("down_blocks", "up_blocks") and rest[0] not in map(str, range(count)):
            raise BadInput(f"train.block_rates: {name}: the model's {kind} are 0 .. {count - 1}")


def check_token(config: DreamBoothConfig, tokenizer: Any) -> None:
    """Refuse to learn a word that the model has learned before."""
    word = config.identifier
    if config.inversion.num_vectors and tokenizer is not None and word in tokenizer.get_vocab():
        raise BadInput(
            f"inversion.token: the model's tokenizer knows {word!r} already; take another, such as "
            f"<{word.strip('<>')}2>, in instance.prompt too"
        )


def check_captions(
    config: DreamBoothConfig, photos: Sequence[Photo], identifier: str, tokenizer: Any
) -> list[str]:
    """Warnings for captions that are perhaps not taken as they were meant.

    Raises BadInput for those that cannot be taken at all. Without a tokenizer none is measured.
    """
    check_syntax(config, photos)
    words = [word.lower() for word in identifier.split()]
    warnings = _tell(
        f"captions without the identifier {identifier!r} teach nothing of it",
        (
            p.name
            for p in photos
            if not all(w in text.lower() for text in p.captions for w in words)
        ),
    )
    how = config.train.caption_syntax
    if how == "plain":
        warnings += _tell(
            "weights such as (word:1.3) are taken as plain text, and train.caption_syntax=a1111 "
            "reads them",
            (p.name for p in photos if any(map(syntax.looks_weighted, p.captions))),
        )
    else:
        warnings += _tell(
            f"words in brackets are weighted, as {how} has it; a backslash before each bracket "
            "makes it text",
            (p.name for p in photos if any(map(_weighs, p.captions))),
        )
    for photo in () if tokenizer is None else photos:
        longest = max(len(ids) - 2 for ids in tokenizer(list(photo.captions)).input_ids)
        most = tokenizer.model_max_length - 2
        if how == "plain" and longest > most:
            warnings.append(
                f"{photo.name}: its caption has {longest} tokens, of which the model reads {most}; "
                "train.caption_syntax=a1111 reads all"
            )
        if longest > MAX_CAPTION_TOKENS:
            raise BadInput(f"{photo.name}: its caption has {longest} tokens; make it shorter")
    return warnings


def check_syntax(config: DreamBoothConfig, photos: Sequence[Photo]) -> None:
    """Refuse captions that ask for what their syntax has and we have not."""
    train = config.train
    if train.caption_syntax == "plain":
        return
    shuffles = train.shuffle_tags or train.tag_dropout
    for caption, name in {text: photo.name for photo in photos for text in photo.captions}.items():
        try:
            syntax.check_syntax(f"{name}: its caption", caption, train.caption_syntax)
        except ValueError as error:
            raise BadInput(str(error)) from None
        if shuffles and _weighs(caption) and any(map(_is_open, caption.split(","))):
            raise BadInput(
                f"{name}: its caption has brackets around several tags, which train.shuffle_tags "
                "and train.tag_dropout would tear apart; give each tag its own"
            )


def _weighs(caption: str) -> bool:
    return any(part.weight != 1 for section in syntax.parse(caption) for part in section)


def _is_open(tag: str) -> bool:
    bare = re.sub(r"\\.", "", tag)
    return any(bare.count(opens) != bare.count(closes) for opens, closes in ("()", "[]"))


def _tell(what: str, names: Iterable[str]) -> list[str]:
    found = list(names)
    return [f"{what}: {shortened(found)}"] if found else []


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
