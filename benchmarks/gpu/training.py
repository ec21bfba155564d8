"""Seconds and memory of an optimizer step at full size: a LoRA, and the whole UNet."""

import gc
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.model import build, unet_inputs
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.training.tuned_model import Text, TunedModel

GIB = 2**30


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    bench.drop_ways()
    for method, batch, checkpointing in (
        ("lora", 2, False),
        ("lora", 2, True),
        ("lora", 8, True),
        ("full", 2, True),
    ):
        gc.collect()
        if bench.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = {"method": method, "batch": batch, "gradient_checkpointing": checkpointing}
        try:
            yield row | _step(bench, method, batch, checkpointing)
        except torch.OutOfMemoryError as error:
            yield row | {"error": str(error).split("\n")[0]}


def _step(bench: Bench, method: str, batch: int, checkpointing: bool) -> dict[str, Any]:
    config = DreamBoothConfig.model_validate(
        {
            "model": {"uri": "random"},
            "instance": {"uri": "none", "prompt": "a photo of sks dog"},
            "train": {
                "method": method,
                "steps": 1000,
                "gradient_checkpointing": checkpointing,
            },
            "prior": {"mode": "none"},
            "output": {"uri": "none"},
            "run": {"name": "benchmark"},
        }
    )
    compute = torch.bfloat16 if bench.on_gpu else torch.float32
    model = build(bench.device, bench.small, "float32" if method == "full" else "auto")
    tuned = TunedModel(model, config, compute)
    tuned.train()
    before = torch.cuda.memory_allocated() if bench.on_gpu else 0
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-5)
    x_BCHW, t_B, arguments = unet_inputs(model, batch, bench.side)
    added = arguments["added_cond_kwargs"]
    text = Text(arguments["encoder_hidden_states"], added["text_embeds"])

    def step() -> None:
        predicted = tuned.predict(x_BCHW.float(), t_B.long(), text, added["time_ids"])
        predicted.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    found = timing.measure(step, bench.device, repeats=3)
    if bench.on_gpu:
        found["weights_gib"] = before / GIB
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found
