"""The networks of a model while it is tuned: which parts train, how each predicts.

Owns what is trainable and its names in a checkpoint, the text conditioning and the UNet call.
Knows nothing of data, of optimizers or of workers. Legend: B rows, L tokens, D P widths.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch

from rayjobs.diffusion.model import Model
from rayjobs.diffusion.text import inversion
from rayjobs.diffusion.text.inversion import expand_words
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.training import lora


class Text(NamedTuple):
    """What the UNet is told of B captions: states (B, L, D) and, for SDXL, pooled (B, P)."""

    states_BLD: torch.Tensor
    pooled_BP: torch.Tensor | None


class Networks(torch.nn.Module):
    """The UNet, and the text encoders where they train; everything else of the model stays out."""

    def __init__(self, model: Model, config: DreamBoothConfig, compute: torch.dtype):
        super().__init__()
        self.method = config.train.method
        self.alone = config.inversion.alone
        asked = config.inversion
        self.runs_text = config.train.text_encoders or asked.num_vectors > 0
        """Whether text must be encoded anew at every step."""
        self.averaged = config.train.ema_decay is not None
        self.compute = compute
        self.unet = model.unet
        self.learned = torch.nn.ParameterList(_learn_word(model, config))
        tuned = model.text_encoders if config.train.text_encoders else []
        self.text_encoders = torch.nn.ModuleList(tuned)
        # Held in lists these are no submodules: neither trained, nor sent around, nor saved.
        self._model = [model]
        full_teacher = self.method == "full" and config.prior.mode == "teacher"
        copied = full_teacher and not self.alone
        self._teacher = [_frozen_copy(model, config.train.text_encoders)] if copied else []
        for part, network in self.parts():
            idle = _idle_layers(model, network, part)
            if self.method == "lora":
                lora.add(network, part, config.lora, config.train.seed, idle)
            else:
                network.requires_grad_(True)
                for name in idle:
                    network.get_submodule(name).requires_grad_(False)
        self.learned.requires_grad_(True)
        if config.train.gradient_checkpointing:
            self._save_memory()

    @property
    def model(self) -> Model:
        return self._model[0]

    def parts(self) -> Iterator[tuple[str, Any]]:
        """What is tuned, by its folder's name in a pipeline."""
        if self.alone:
            return
        yield "unet", self.unet
        for number, encoder in enumerate(self.text_encoders):
            yield ("text_encoder" if number == 0 else f"text_encoder_{number + 1}"), encoder

    def teachers(self) -> list[Any]:
        """The frozen networks beside, of full fine-tuning towards a teacher."""
        return [teacher.unet for teacher in self._teacher]

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Every trained parameter by its name in checkpoints."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def encode(self, captions: Sequence[str | None]) -> Text:
        with self._computing():
            return encode(self.model, captions)

    def predict(
        self, x_BCHW: torch.Tensor, timesteps_B: torch.Tensor, text: Text, time_ids_B6: torch.Tensor
    ) -> torch.Tensor:
        with self._computing():
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
        """What the untrained model predicts of the same latents; `text` is used where frozen."""
        teacher = self._teacher[0] if self._teacher else self.model
        with ExitStack() as stack:
            stack.enter_context(self._computing())
            if not self._teacher:
                for _, network in self.parts():
                    stack.enter_context(lora.disabled(network))
            known = encode(teacher, captions) if self.runs_text else text
            return predict(teacher, x_BCHW, timesteps_B, known, time_ids_B6)

    def _computing(self) -> Any:
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
    """Text conditioning of captions; None is no text, as the model's makers mean it.

    SDXL: the last hidden states but one of both encoders, side by side, and the second's pooled
    vector, zeros for no text; Stable Diffusion: the last states, normed.
    """
    sdxl, states, pooled_BP = model.family == "sdxl", [], None
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        tokens_BL = tokenizer(
            [expand_words(caption or "", model.words) for caption in captions],
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
        said_B = torch.tensor([caption is not None for caption in captions]).to(model.device)
        states_BLD = states_BLD * said_B[:, None, None]
        pooled_BP = None if pooled_BP is None else pooled_BP * said_B[:, None]
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


def _learn_word(model: Model, config: DreamBoothConfig) -> list[torch.nn.Parameter]:
    """The embeddings of the identifier, where it is learned as a word of its own."""
    asked = config.inversion
    if not asked.num_vectors:
        return []
    like = asked.initial or str(config.prior.prompt).split()[-1]
    vectors = inversion.initial_vectors(model, like, asked.num_vectors)
    return inversion.add_word(model, config.word, vectors)


def _idle_layers(model: Model, network: Any, part: str) -> tuple[str, ...]:
    """Layers that no loss reaches: SDXL reads the first encoder before its last layer."""
    if model.family != "sdxl" or part != "text_encoder":
        return ()
    last = f"encoder.layers.{network.config.num_hidden_layers - 1}."
    names = [name for name, module in network.named_modules() if not list(module.children())]
    return tuple(name for name in names if last in f"{name}." or "final_layer_norm" in name)


def _frozen_copy(model: Model, with_text: bool) -> Model:
    """The model as it is now, for full fine-tuning, which changes the original."""
    encoders = copy.deepcopy(model.text_encoders) if with_text else model.text_encoders
    return dataclasses.replace(model, unet=copy.deepcopy(model.unet), text_encoders=encoders)
