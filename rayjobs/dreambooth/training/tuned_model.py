"""A model while it is tuned: which of its networks train, and what they predict.

Owns what is trainable and its names in a checkpoint, the text conditioning and the UNet call.
Knows nothing of data, optimizers or workers. Legend: B rows, L tokens, D P widths.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from rayjobs.config import BadInput
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.attention import NoKernel
from rayjobs.diffusion.modules.upload import upload
from rayjobs.diffusion.text import inversion
from rayjobs.diffusion.text.chunks import Chunk, tokenize
from rayjobs.diffusion.text.encoder import encode_chunks
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data import rng
from rayjobs.dreambooth.training import lora

Said = tuple[Chunk, ...]
"""A caption in chunks."""


class Text(NamedTuple):
    """The UNet's text conditioning: states (B, L, D) and, for SDXL, pooled vectors (B, P)."""

    states_BLD: torch.Tensor
    pooled_BP: torch.Tensor | None
    own_BL: torch.Tensor | None = None
    """Which states are a row's own, and no padding; None where all are."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Text":
        """The same with all tensors changed, as by a move to another device."""
        others = (self.pooled_BP, self.own_BL)
        return Text(change(self.states_BLD), *(None if x is None else change(x) for x in others))


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
        self.caption_syntax = config.train.caption_syntax
        self.averaged = config.train.ema_decay is not None
        self.compute = compute
        self.unet = model.unet
        self.learned = torch.nn.ParameterList(_add_tokens(model, config))
        encoders = model.text_encoders if config.train.text_encoders else []
        self.text_encoders = torch.nn.ModuleList(encoders)
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

    def encode(
        self, captions: Sequence[str | None], dropout_keys_B: torch.Tensor | None = None
    ) -> Text:
        said = self._chunks(captions)
        if dropout_keys_B is not None:
            keys_N = _keys_of_chunks(dropout_keys_B, said)
            for encoder in self.text_encoders:
                lora.set_dropout_keys(encoder, keys_N)
        with self._autocast():
            return encode(self.model, said, [caption is not None for caption in captions])

    def _chunks(self, captions: Sequence[str | None]) -> list[Said]:
        syntax = self.caption_syntax
        return [tokenize(self.model, caption or "", syntax).chunks for caption in captions]

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
            teachers_text = text
            if self.trains_text:
                has_text = [caption is not None for caption in captions]
                teachers_text = encode(teacher, self._chunks(captions), has_text)
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


def encode(model: Model, said: Sequence[Said], has_text: Sequence[bool]) -> Text:
    """The conditioning of captions in chunks; those without text as in the model's own training."""
    states_NLD, pooled_NP = encode_chunks(model, [chunk for chunks in said for chunk in chunks])
    counts = [len(chunks) for chunks in said]
    states = [part.flatten(0, 1)[None] for part in states_NLD.split(counts)]
    pooled = [None] * len(said)
    if model.family == "sdxl" and pooled_NP is not None:
        pooled = [part[:1] for part in pooled_NP.split(counts)]
    texts = [Text(*each) for each in zip(states, pooled, strict=True)]
    return joined(
        [
            text if has or not model.force_zeros else text.map(torch.zeros_like)
            for text, has in zip(texts, has_text, strict=True)
        ]
    )


def joined(texts: Sequence[Text]) -> Text:
    """Conditionings of a row each as one, padded to the longest."""
    lengths = [text.states_BLD.shape[1] for text in texts]
    longest = max(lengths)
    padded = [
        F.pad(text.states_BLD, (0, 0, 0, longest - length))
        for text, length in zip(texts, lengths, strict=True)
    ]
    pooled = [text.pooled_BP for text in texts if text.pooled_BP is not None]
    own_BL = None
    if min(lengths) < longest:
        own_BL = torch.arange(longest) < torch.tensor(lengths)[:, None]
        own_BL = upload(own_BL, padded[0].device)
    return Text(torch.cat(padded), torch.cat(pooled) if pooled else None, own_BL)


def _keys_of_chunks(keys_B: torch.Tensor, said: Sequence[Said]) -> torch.Tensor:
    """(N,): a key for each chunk, of which the first has its row's."""
    counts = upload(torch.tensor([len(chunks) for chunks in said]), keys_B.device)
    salts = [
        rng.key("chunk", number) if number else 0 for each in said for number in range(len(each))
    ]
    keys_N = keys_B.repeat_interleave(counts, output_size=len(salts))
    return keys_N ^ upload(torch.tensor(salts), keys_B.device)


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
    try:
        output: torch.Tensor = model.unet(
            x_BCHW.to(dtype),
            timesteps_B,
            encoder_hidden_states=text.states_BLD.to(dtype),
            encoder_attention_mask=text.own_BL,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
    except NoKernel:
        raise BadInput(
            f"model.attention {model.options.attention} cannot train on this device in this "
            "precision; use auto, or another train.precision"
        ) from None
    return output.float()


def _add_tokens(model: Model, config: DreamBoothConfig) -> list[torch.nn.Parameter]:
    """The identifier's embeddings as new tokens, where textual inversion is on."""
    settings = config.inversion
    if not settings.num_vectors:
        return []
    initial = settings.initial or str(config.prior.prompt).split()[-1]
    vectors = inversion.initial_vectors(model, initial, settings.num_vectors)
    return inversion.add_word(model, config.identifier, vectors)


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
