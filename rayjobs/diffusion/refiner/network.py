"""A model with all that calls of its rows need.

Owns what is made once for each model of an engine. Knows neither when rows are called nor why.
"""

from rayjobs.diffusion.adapters.bank import LoraBank
from rayjobs.diffusion.control.bank import ControlBank
from rayjobs.diffusion.ip_adapter.bank import IpAdapterBank
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.text.encoder import PromptEncoder
from rayjobs.diffusion.unet_batch import UNetBatch

PROMPT_CACHE = 512
"""Chunks of texts whose embeddings are kept."""


class Network:
    """Its adapters, its texts' embeddings, and the layout of its UNet's calls."""

    def __init__(self, model: Model, max_rows: int, slots: int, *, fixed_shape: bool):
        alone = fixed_shape and model.device.startswith("cuda")
        self.model = model
        self.loras = LoraBank(model, exact=fixed_shape and not alone)
        self.controls = ControlBank(model)
        self.ip_adapters = IpAdapterBank(model)
        self.prompts = PromptEncoder(
            model, self.loras, 1 if alone else max_rows, PROMPT_CACHE, fixed_shape=fixed_shape
        )
        self.unet_batch = UNetBatch(model, self.loras, slots, fixed_shape=fixed_shape, alone=alone)
