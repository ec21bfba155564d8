"""Full fine-tuning with weights, gradients and moments sharded over the workers (FSDP2).

Owns the Lightning strategy, what is sharded, and how shards become files that any number of workers
can read. `callback` stores the files.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed.checkpoint as dcp
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from rayjobs.dreambooth.training.tuned_model import TunedModel


class RayFSDP2(ModelParallelStrategy):
    """Lightning's strategy for sharded modules, on Ray Train's workers and devices."""

    def __init__(self) -> None:
        world_size = ray.train.get_context().get_world_size()
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1)

    @property
    def root_device(self) -> torch.device:
        return ray.train.torch.get_device()

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Gradients stay on each worker, unreduced, until the step's last backward pass."""
        assert self.model is not None
        roots = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for root in roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in roots:
                root.set_requires_gradient_sync(True)


def shard(tuned: TunedModel, mesh: Any) -> None:
    """Shard every tuned network, and the frozen teacher, block by block over `mesh`.

    Weights travel in the dtype that they are computed in, gradients in float32, as they are added.
    What goes into a block stays as it is: autocast decides there, and sizes need float32.

    Must come before the optimizer is made, which would otherwise hold the unsharded weights.
    """
    mixed = MixedPrecisionPolicy(tuned.compute, torch.float32, cast_forward_inputs=False)
    for network in [*(network for _, network in tuned.parts()), *tuned.teachers()]:
        for block in _blocks(network):
            fully_shard(block, mesh=mesh, mp_policy=mixed)
        kind = type(network)
        fully_shard(network, mesh=mesh, mp_policy=mixed)
        # By the name of an encoder's class transformers knows which layers' states to give.
        sharded = type(network)
        sharded.__module__, sharded.__qualname__ = kind.__module__, kind.__qualname__


def write(folder: Path, module: Any) -> None:
    """Write this worker's shards of a state into its own folder. All workers call it together."""
    dcp.save(_state(module), checkpoint_id=str(folder))


def read(folder: Path, module: Any) -> None:
    """Load a state, written by any number of workers. All workers call it together."""
    state = _state(module)
    dcp.load(state, checkpoint_id=str(folder))
    with torch.no_grad():
        trained = module.tuned.trainable()
        for name, tensor in state["trained"].items():
            trained[name].copy_(tensor)
    set_optimizer_state_dict(module.tuned, module.optimizer, state["optimizer"])


def read_weights(folder: Path, into: dict[str, torch.nn.Parameter], averaged: bool) -> None:
    """Read whole weights in one process, which needs no workers."""
    name = "average" if averaged else "trained"
    state = {name: {key: parameter.detach() for key, parameter in into.items()}}
    dcp.load(state, checkpoint_id=str(folder), no_dist=True)


def _state(module: Any) -> dict[str, Any]:
    trained = {name: p.detach() for name, p in module.tuned.trainable().items()}
    optimizer = get_optimizer_state_dict(module.tuned, module.optimizer)
    state = {"trained": trained, "optimizer": optimizer}
    return state | ({"average": module.average} if module.average else {})


def _blocks(network: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The repeated parts: the UNet's residual and transformer blocks, an encoder's layers."""
    for module in network.modules():
        is_layer = type(module).__name__ == "CLIPEncoderLayer"
        if isinstance(module, (BasicTransformerBlock, ResnetBlock2D)) or is_layer:
            yield module
