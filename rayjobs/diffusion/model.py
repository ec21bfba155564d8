"""A loaded model: the parts of an SDXL-family or Stable Diffusion pipeline on one device.

Owns how weights become modules, and what of a family's conventions the engine must know. Knows
nothing of requests.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from rayjobs.diffusion import facts
from rayjobs.diffusion.economy import deep
from rayjobs.diffusion.facts import FAMILIES, Usual
from rayjobs.diffusion.files.header import first_line
from rayjobs.diffusion.modules import onednn, rowwise
from rayjobs.diffusion.modules.attention import use_kernel
from rayjobs.diffusion.modules.compiled import Compiled
from rayjobs.diffusion.modules.pipeline import load_pipeline, prediction_of, scheduler_config
from rayjobs.diffusion.modules.replay import Replay
from rayjobs.diffusion.modules.upload import upload
from rayjobs.diffusion.sampler_names import Prediction
from rayjobs.diffusion.weights import Source, locate

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is held. Speed and memory, and the last bits, but not what it draws.

    `attention` names the UNet's scaled-dot-product kernel. `compile` is `blocks` (each kind of
    repeated block once: quick to start) or `full` (the whole UNet); `Engine.warm` does it, and what
    it did not is called as without. `channels_last`, the order of convolutions' memory, is `auto`
    where that is the faster: on a CPU and in what is compiled. `onednn` is for linear layers on a
    CPU that are neither trained nor compiled, where it is the faster. The autoencoder is in
    bfloat16 where its config says that float16 overflows and the GPU computes that, else in
    float32, unless `vae_dtype` says otherwise.
    """

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    vae_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    attention: Literal["auto", "math", "flash", "efficient", "cudnn"] = "auto"
    channels_last: Literal["auto"] | bool = "auto"
    onednn: bool = True
    compile: Literal["no", "blocks", "full"] = "no"
    vae_slicing: bool = False
    vae_tiling: bool = False


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline's parts, in evaluation mode on `device`. Shared by everything that uses them."""

    uri: str
    family: str
    unet: Any
    vae: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler: Any
    force_zeros: bool
    sha256: str
    dtype: torch.dtype
    device: str
    usual: Usual
    """The steps and guidance that it is made for."""
    options: ModelOptions = field(default_factory=ModelOptions)
    is_refiner: bool = False
    """Whether its UNet is told an aesthetic score, and made for drawing over another's latents."""
    compiled: Compiled | None = None
    """Its compiled calls, which models on the same UNet have in common."""

    @property
    def prediction(self) -> Prediction:
        """What the UNet was trained to predict, which a sampler has to fit."""
        return prediction_of(self.scheduler)

    @property
    def is_edm(self) -> bool:
        """Whether the UNet was trained with EDM preconditioning, as Playground v2.5 was."""
        return self.prediction.is_edm

    @property
    def vae_scale(self) -> int:
        """Pixels per latent, along a side."""
        return facts.vae_scale(self.vae.config)

    @property
    def default_side(self) -> int:
        return facts.default_side(self.unet.config, self.vae.config)

    @property
    def needs_mask(self) -> bool:
        """Whether it only makes masked parts of pictures anew, which its UNet takes as inputs."""
        return facts.needs_mask(self.unet.config)

    @property
    def default_guidance_scale(self) -> float:
        return self.usual.guidance_scale

    @cached_property
    def replay(self) -> Replay:
        """Calls the UNet; its recording serves every engine of this model."""
        return Replay(self.unet)

    @cached_property
    def replay_keeping(self) -> Replay:
        """The same, and gives what its deep blocks gave."""
        return Replay(self.unet, deep.keeping)

    @cached_property
    def replay_reusing(self) -> Replay:
        """Calls its outermost blocks on what the deep ones gave earlier."""
        return Replay(self.unet, deep.reusing)

    def forget_calls(self) -> None:
        """Record and compile again: layers have other weights now, or biases that they had not."""
        for name in ("replay", "replay_keeping", "replay_reusing"):
            self.__dict__.pop(name, None)
        if self.compiled is not None:
            self.compiled.renew()

    @property
    def trace_warmup_s(self) -> float:
        """Seconds spent on recordings, over what those steps take afterwards."""
        ways = (self.replay, self.replay_keeping, self.replay_reusing)
        return sum(way.trace_warmup_s for way in ways)

    @cached_property
    def latents_mean_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The autoencoder's own (1, C, 1, 1) mean and deviation; 0 and 1 where it names none."""
        mean = getattr(self.vae.config, "latents_mean", None)
        std = getattr(self.vae.config, "latents_std", None)
        if mean is None or std is None or self.family == "sd":
            mean, std = [0.0], [1.0]
        shape = (1, -1, 1, 1)
        both = upload(torch.tensor([mean, std], dtype=self.vae.dtype), self.device)
        return both[0].view(shape), both[1].view(shape)


def load_model(
    source: str | Source,
    options: ModelOptions | None = None,
    *,
    config: str | None = None,
    alone: bool = True,
) -> Model:
    """Load `starter`, a local diffusers folder, a single `.safetensors` file, or a hub id.

    A `Source` says more of it than its uri, among them `config`: a local diffusers folder or hub id
    whose configs and tokenizers a single file is to use; without it those of the matching base
    model come from the hub. Not `alone`, other threads compute meanwhile: torch's default dtype,
    which is everybody's, is then left as it is, for twice the memory of the host.

    Raises:
        ValueError: nothing is there, it cannot be read, it is a pickle, or it is another family.
    """
    source = Source(uri=source, config=config) if isinstance(source, str) else source
    options = options or ModelOptions()
    dtype = _choose_dtype(options.dtype, _choose_device(options.device))
    weights = locate(source)
    try:
        pipeline = load_pipeline(weights, dtype if alone else torch.float32)
    except Exception as error:
        raise ValueError(f"cannot load model {source.uri!r}: {first_line(error)}") from error
    return assemble(source.uri, pipeline, weights.sha256, options, usual=weights.usual)


def _suit_cpu(module: torch.nn.Module, options: ModelOptions) -> None:
    rowwise.use_for_activations(module)
    if options.onednn and onednn.is_faster():
        onednn.use_for_linear(module)


def assemble(
    uri: str,
    pipeline: Any,
    sha256: str,
    options: ModelOptions,
    *,
    family: str | None = None,
    usual: Usual | None = None,
) -> Model:
    """A model of a pipeline's parts, which need no pipeline around them if `family` is given."""
    family = family or FAMILIES[type(pipeline).__name__]
    device = _choose_device(options.device)
    if options.channels_last == "auto":
        # On a GPU the other order takes 6 % less for the UNet and 35 % for a decode (measured).
        options = replace(options, channels_last=device == "cpu" or options.compile != "no")
    dtype = _choose_dtype(options.dtype, device)
    vae_dtype = _vae_dtype(pipeline.vae, dtype, options.vae_dtype, device)
    pipeline.unet.to(device=device, dtype=dtype)
    pipeline.vae.to(device=device, dtype=vae_dtype)
    encoders = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    tokenizers = [pipeline.tokenizer, getattr(pipeline, "tokenizer_2", None)]
    for encoder in filter(None, encoders):
        encoder.to(dtype=dtype)
    for module in [pipeline.unet, pipeline.vae, *filter(None, encoders)]:
        module.to(device).eval().requires_grad_(False)
        if device == "cpu" and options.compile == "no":
            _suit_cpu(module, options)
    if options.vae_slicing:
        pipeline.vae.enable_slicing()
    if options.vae_tiling:
        pipeline.vae.enable_tiling()
    if options.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    use_kernel(pipeline.unet, options.attention)
    unet_config = pipeline.unet.config
    return Model(
        uri=uri,
        family=family,
        unet=pipeline.unet,
        vae=pipeline.vae,
        text_encoders=[encoder for encoder in encoders if encoder is not None],
        tokenizers=[tokenizer for tokenizer in tokenizers if tokenizer is not None],
        scheduler=pipeline.scheduler,
        force_zeros=bool(getattr(pipeline.config, "force_zeros_for_empty_prompt", False)),
        sha256=sha256,
        dtype=dtype,
        device=device,
        usual=usual or facts.usual(family, scheduler_config(pipeline.scheduler), unet_config),
        options=options,
        is_refiner=bool(getattr(pipeline.config, "requires_aesthetics_score", False)),
        compiled=_compiled(pipeline, options, device),
    )


def hold(module: Any, model: Model) -> None:
    """Keep a network beside a model as its UNet is kept."""
    module.to(device=model.device, dtype=model.dtype).eval().requires_grad_(False)
    if model.device == "cpu":
        _suit_cpu(module, model.options)
    if model.options.channels_last:
        module.to(memory_format=torch.channels_last)
    if hasattr(module, "attn_processors"):
        use_kernel(module, model.options.attention)


def _compiled(pipeline: Any, options: ModelOptions, device: str) -> Compiled | None:
    if options.compile == "no":
        return None
    decodes = device.startswith("cuda") and not (options.vae_slicing or options.vae_tiling)
    parts = pipeline.unet, pipeline.vae, options.compile
    return Compiled(*parts, attention=options.attention, decodes=decodes)


def _choose_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but this process sees no CUDA device")
    return name


def _choose_dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return DTYPES[name]


def _vae_dtype(vae: Any, dtype: torch.dtype, name: str, device: str) -> torch.dtype:
    """bfloat16 has float32's range, at a fraction of its time and at half of its memory.

    TF32 would be no other way out: torch allows it to a whole process, so that a decode beside the
    steps would change the bits of whatever another model computes in float32 meanwhile.
    """
    if name != "auto":
        return DTYPES[name]
    if dtype != torch.float16 or not vae.config.force_upcast:
        return dtype
    on_gpu = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if on_gpu else torch.float32
