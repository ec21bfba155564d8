"""Memory of SDXL by arithmetic: `python -m benchmarks.sizing` prints the tables of the guide.

Runs the real shapes on tensors without data and adds up those that live at once. No GPU is needed,
and none is asked: what CUDA, its libraries and torch's allocator take on top is `OVERHEAD_GIB`.
"""

import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import model as shapes
from rayjobs.diffusion.facts import Usual
from rayjobs.diffusion.model import Model
from rayjobs.dreambooth.training.lora import ATTENTION

GIB = 2**30
CARDS_GB = (24, 40, 48, 80, 141)
SIDES = (512, 768, 1024)
ROWS = (1, 4, 8, 16)
OVERHEAD_GIB = 1.5
"""CUDA's own, cuDNN's and cuBLAS' workspaces, and what torch's allocator cannot join."""
BLOCK = 512
"""Bytes to which torch's allocator rounds."""


class Living(TorchDispatchMode):
    """Adds up the bytes of tensors that live at once, but for those of before."""

    def __init__(self, before: Iterable[torch.Tensor]):
        super().__init__()
        self.bytes = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in before)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return made

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known.add(storage)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.bytes -= size


@contextmanager
def default_dtype(dtype: torch.dtype) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(mode: FakeTensorMode, dtype: torch.dtype, small: bool) -> Model:
    """SDXL without data, its weights in `dtype`."""
    with default_dtype(dtype), mode:
        unet: Any = UNet2DConditionModel(**(shapes.THIN_UNET if small else shapes.UNET))
        vae: Any = AutoencoderKL(**(shapes.THIN_VAE if small else shapes.VAE))
        encoders = shapes.encoders(small)
    for part in (unet, vae, *encoders):
        part.eval().requires_grad_(False)
    return Model(
        uri="shapes",
        family="sdxl",
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=[],
        scheduler=shapes.scheduler(),
        force_zeros=True,
        sha256="",
        dtype=dtype,
        device="cpu",
        usual=Usual(30, 5.0),
    )


def gib_of_weights(model: Model) -> float:
    parts = (model.unet, model.vae, *model.text_encoders)
    return sum(p.nbytes for part in parts for p in part.parameters()) / GIB


def peak_gib(work: Callable[[], Any], before: Iterable[torch.Tensor]) -> float:
    with Living(before) as living:
        made = work()
    del made
    return living.peak / GIB


def _inputs(model: Model, rows: int, side: int) -> tuple[Any, ...]:
    size, unet = side // 8, model.unet.config
    latents = torch.empty(rows, 4, size, size, dtype=model.dtype)
    states = torch.empty(rows, 77, unet.cross_attention_dim, dtype=model.dtype)
    width = model.text_encoders[1].config.projection_dim
    return latents, states, torch.empty(rows, width, dtype=model.dtype), torch.empty(rows, 6)


def call_gib(mode: FakeTensorMode, model: Model, slots: int, side: int) -> float:
    """Of a UNet call."""
    with mode, torch.no_grad():
        latents, states, pooled, ids = _inputs(model, slots, side)
        added = {"text_embeds": pooled, "time_ids": ids}
        t = torch.empty(slots)
        work = lambda: model.unet(latents, t, states, added_cond_kwargs=added)  # noqa: E731
        return peak_gib(work, model.unet.parameters())


def decode_gib(mode: FakeTensorMode, model: Model, side: int) -> float:
    """Of one picture."""
    with mode, torch.no_grad():
        z = torch.empty(1, 4, side // 8, side // 8, dtype=model.vae.dtype)
        return peak_gib(lambda: model.vae.decode(z, return_dict=False)[0], model.vae.parameters())


def activations_gib(
    mode: FakeTensorMode, model: Model, method: str, side: int, checkpointing: bool
) -> float:
    """Of a forward and a backward pass of one row, beside weights and the gradients that stay.

    In bfloat16 throughout; mixed precision keeps the inputs of norms in float32 besides. A LoRA
    keeps what its layers see, as those layers themselves would.
    """
    unet = model.unet
    unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(
            method == "full" or name.removesuffix(".weight").endswith(ATTENTION)
        )
    unet.train()
    with mode:
        latents, states, pooled, ids = _inputs(model, 1, side)
        added = {"text_embeds": pooled, "time_ids": ids}
        for parameter in unet.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

        def step() -> None:
            predicted = unet(latents, torch.empty(1), states, added_cond_kwargs=added)[0]
            predicted.square().mean().backward()

        gradients = [p.grad for p in unet.parameters() if p.grad is not None]
        found = peak_gib(step, [*unet.parameters(), *gradients])
    unet.zero_grad()
    unet.eval().requires_grad_(False)
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def shown(gib: float) -> str:
    return f"{gib:.3g}"


def rows_that_fit(gib: float, each_gib: float) -> str:
    """As many as there is room for, at least one, else none."""
    return str(int(gib / each_gib)) if gib >= each_gib else "-"


def drawing(mode: FakeTensorMode, model: Model) -> str:
    """What pictures take, and how many rows with guidance a call may have on a card, or a part."""
    weights, made = gib_of_weights(model), ""
    costs, fit = [], []
    for side in SIDES:
        one, three = (call_gib(mode, model, slots, side) for slots in (1, 3))
        slot, decode = (three - one) / 2, decode_gib(mode, model, side)
        fixed = weights + decode + OVERHEAD_GIB
        costs.append([side, *map(shown, (weights, slot, decode))])
        costs[-1] += [shown(fixed + 2 * rows * slot) for rows in ROWS]
        for share in (1.0, 0.5, 0.25) if side == max(SIDES) else (1.0,):
            left = [rows_that_fit(share * card - fixed, 2 * slot) for card in CARDS_GB]
            fit.append([side, f"{share:g}", *left])
    rows = [f"rows: {rows}" for rows in ROWS]
    made += table(["px", "weights", "a slot", "a decode", *rows], costs) + "\n"
    return made + table(["px", "of a card", *(f"{card} GB" for card in CARDS_GB)], fit)


def training(mode: FakeTensorMode, model: Model) -> str:
    """What a worker of a training takes, and the rows of a micro-batch on a card."""
    params = sum(p.numel() for p in model.unet.parameters()) / GIB
    others = gib_of_weights(model) - 2 * params
    # In float32 weights, gradients and two moments, and the weights once more as autocast has them.
    fixed = {"lora": 2 * params + others, "full": 18 * params + others}
    found = []
    for method in ("lora", "full"):
        for checkpointing in (True, False):
            row = activations_gib(mode, model, method, max(SIDES), checkpointing)
            rest = fixed[method] + OVERHEAD_GIB
            fits = [rows_that_fit(card - rest, row) for card in CARDS_GB]
            kind = "with" if checkpointing else "without"
            found.append([method, kind, shown(fixed[method]), shown(row), *fits])
    cards = [f"{card} GB" for card in CARDS_GB]
    return table(["method", "checkpointing", "held", "a row", *cards], found)


def main() -> None:
    small = "--small" in sys.argv
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = build(mode, torch.bfloat16, small)
    sys.stdout.write(f"{drawing(mode, model)}\n{training(mode, model)}")


if __name__ == "__main__":
    main()
