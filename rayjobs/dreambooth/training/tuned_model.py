"""A model while it is tuned: which of its networks train, and what they predict.

Owns what is trainable and its names in a checkpoint, the text conditioning and the UNet call.
Knows nothing of data, optimizers or workers. Legend: B rows, L tokens, D P widths.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch.nn.attention import sdpa_kernel

from rayjobs.config import BadInput
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.text import inversion
from rayjobs.diffusion.text.inversion import expand_words
from rayjobs.diffusion.unet_batch import KERNELS
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.training import lora

NO_KERNEL = ("No available kernel", "No viable backend")
"""In torch's messages, on CUDA and on a CPU, when the kernel does not take these tensors."""


class Text(NamedTuple):
    """The UNet's text conditioning: states (B, L, D) and, for SDXL, pooled vectors (B, P)."""

    states_BLD: torch.Tensor
    pooled_BP: torch.Tensor | None


class TunedModel(torch.nn.Module):
    """The UNet, the text encoders where they train, and learned tokens.

    The names of these three attributes are part of the parameters' names in checkpoints.
    """

    def __init__(self, model: Model, config: DreamBoothConfig, compute: torch.dtype):
        super().__init__()
        self.method = config.train.method
        self.only_tokens = config.inversion.alone
        """Whether nothing but learned tokens is trained."""
        self.trains_text = config.train.text_encoders or config.inversion.num_vectors > 0
        """Whether captions must be encoded again at every step."""
        self.averaged = config.train.ema_decay is not None
        self.compute = compute
        self.unet = model.unet
        self.learned = torch.nn.ParameterList(_add_tokens(model, config))
        encoders = model.text_encoders if config.train.text_encoders else []
        self.text_encoders = torch.nn.ModuleList(encoders)
        if model.options.attention != "auto":
            _fix_attention_kernel(model.unet, model.options.attention)
        # Inside a list a module is no submodule: it is neither trained, synchronised nor saved.
        self._model = [model]
        full_teacher = self.method == "full" and config.prior.mode == "teacher"
        needs_copy = full_teacher and not self.only_tokens
        self._teacher = [_frozen_copy(model, config.train.text_encoders)] if needs_copy else []
        for part, network in self.parts():
            unused = _unused_layers(model, network, part)
            if self.method == "lora":
                lora.add(network, part, config.lora, config.train.seed, unused)
            else:
                network.requires_grad_(True)
                for name in unused:
                    network.get_submodule(name).requires_grad_(False)
        self.learned.requires_grad_(True)
        if config.train.gradient_checkpointing:
            self._save_memory()

    @property
    def model(self) -> Model:
        return self._model[0]

    def parts(self) -> Iterator[tuple[str, Any]]:
        """The tuned networks, each with its folder's name in a pipeline."""
        if self.only_tokens:
            return
        yield "unet", self.unet
        for number, encoder in enumerate(self.text_encoders):
            yield ("text_encoder" if number == 0 else f"text_encoder_{number + 1}"), encoder

    def teachers(self) -> list[Any]:
        """The frozen UNet that full fine-tuning towards a teacher keeps."""
        return [teacher.unet for teacher in self._teacher]

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Every trained parameter by its name in checkpoints."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def encode(self, captions: Sequence[str | None]) -> Text:
        with self._autocast():
            return encode(self.model, captions)

    def predict(
        self, x_BCHW: torch.Tensor, timesteps_B: torch.Tensor, text: Text, time_ids_B6: torch.Tensor
    ) -> torch.Tensor:
        with self._autocast():
            return predict(self.model, x_BCHW, timesteps_B, text, time_ids_B6)

    @torch.no_grad()
    def teach(
        self,
        x_BCHW: torch.Tensor,
        timesteps_B: torch.Tensor,
        captions: Sequence[str | None],
        text: Text,
        time_ids_B6: torch.Tensor,
    ) -> torch.Tensor:
        """What the untrained model predicts for the same latents.

        `text` is used where no text encoder trains; else the captions are encoded by the teacher.
        """
        teacher = self._teacher[0] if self._teacher else self.model
        with ExitStack() as stack:
            stack.enter_context(self._autocast())
            if not self._teacher:
                for _, network in self.parts():
                    stack.enter_context(lora.disabled(network))
            teachers_text = encode(teacher, captions) if self.trains_text else text
            return predict(teacher, x_BCHW, timesteps_B, teachers_text, time_ids_B6)

    def _autocast(self) -> Any:
        """Mixed precision for the forward pass."""
        if self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(torch.device(self.model.device).type, self.compute)

    def _save_memory(self) -> None:
        self.unet.enable_gradient_checkpointing()
        encoders: Any = self.text_encoders
        for encoder in encoders:
            encoder.gradient_checkpointing_enable()
            encoder.enable_input_require_grads()


def encode(model: Model, captions: Sequence[str | None]) -> Text:
    """Text conditioning of captions; None is no text, encoded as in the model's own training.

    SDXL: the last hidden states but one of both encoders, concatenated, and the second's pooled
    vector, zeros for no text; Stable Diffusion: the last states, normalised.
    """
    sdxl, states, pooled_BP = model.family == "sdxl", [], None
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        tokens_BL = tokenizer(
            [expand_words(caption or "", tokenizer) for caption in captions],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        output = encoder(tokens_BL.to(model.device), output_hidden_states=True)
        states.append(output.hidden_states[-2] if sdxl else output[0])
        pooled_BP = output[0] if sdxl and output[0].ndim == 2 else pooled_BP
    states_BLD = torch.cat(states, dim=-1)
    if model.force_zeros:
        has_text_B = torch.tensor([caption is not None for caption in captions]).to(model.device)
        states_BLD = states_BLD * has_text_B[:, None, None]
        pooled_BP = None if pooled_BP is None else pooled_BP * has_text_B[:, None]
    return Text(states_BLD, pooled_BP)


def predict(
    model: Model,
    x_BCHW: torch.Tensor,
    timesteps_B: torch.Tensor,
    text: Text,
    time_ids_B6: torch.Tensor,
) -> torch.Tensor:
    """The UNet's output (B, C, H, W), float32.

    The size conditioning stays float32 until it is sinusoids: bf16 cannot hold 1023.
    """
    dtype = model.dtype  # not the UNet's property, which walks over all its modules
    added: dict[str, Any] | None = None
    if model.family == "sdxl" and text.pooled_BP is not None:
        added = {"text_embeds": text.pooled_BP.to(dtype), "time_ids": time_ids_B6}
    output: torch.Tensor = model.unet(
        x_BCHW.to(dtype),
        timesteps_B,
        encoder_hidden_states=text.states_BLD.to(dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return output.float()


def _add_tokens(model: Model, config: DreamBoothConfig) -> list[torch.nn.Parameter]:
    """The identifier's embeddings as new tokens, where textual inversion is on."""
    settings = config.inversion
    if not settings.num_vectors:
        return []
    initial = settings.initial or str(config.prior.prompt).split()[-1]
    vectors = inversion.initial_vectors(model, initial, settings.num_vectors)
    return inversion.add_word(model, config.identifier, vectors)


class _FixedKernel:
    """An attention processor that runs in one of torch's kernels, also when it is recomputed."""

    def __init__(self, processor: Any, name: str):
        self._processor, self._name = processor, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with sdpa_kernel(KERNELS[self._name]):
                return self._processor(*args, **kwargs)
        except RuntimeError as error:
            if not any(text in str(error) for text in NO_KERNEL):
                raise
            raise BadInput(
                f"model.attention {self._name} cannot train on this device in this precision; "
                "use auto, or another train.precision"
            ) from None


def _fix_attention_kernel(unet: Any, name: str) -> None:
    """Wrap processors, not the UNet's call, outside which gradient checkpointing repeats layers."""
    processors = unet.attn_processors
    unet.set_attn_processor({key: _FixedKernel(each, name) for key, each in processors.items()})


def _unused_layers(model: Model, network: Any, part: str) -> tuple[str, ...]:
    """Layers without a gradient: SDXL reads the first encoder's states before its last layer."""
    if model.family != "sdxl" or part != "text_encoder":
        return ()
    last = f"encoder.layers.{network.config.num_hidden_layers - 1}."
    names = [name for name, module in network.named_modules() if not list(module.children())]
    return tuple(name for name in names if last in f"{name}." or "final_layer_norm" in name)


def _frozen_copy(model: Model, with_text: bool) -> Model:
    """The model as it is now, for full fine-tuning, which changes the original."""
    encoders = copy.deepcopy(model.text_encoders) if with_text else model.text_encoders
    return dataclasses.replace(model, unet=copy.deepcopy(model.unet), text_encoders=encoders)
