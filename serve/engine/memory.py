"""How much of a device's memory a replica may use, and giving it back.

Ray counts the fractions of a GPU that it lends, and limits nothing: a replica that has a part of a
card keeps to that part of its memory. Owns this arithmetic. Knows nothing of models or of steps.
"""

import gc

import psutil
import torch

from serve.config import EngineConfig

MODELS_SHARE = 0.7
"""Of a replica's memory on a card, for weights; the rest is for steps."""


def share_of_card(num_gpus: float) -> float:
    """What of each of its cards a replica has that asks Ray for so many."""
    return num_gpus if 0 < num_gpus < 1 else 1.0


def keep_to_share(num_gpus: float) -> None:
    """Let this process allocate no more of its card: torch tries its cache first, and then fails
    here and not in a neighbour."""
    if share_of_card(num_gpus) < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share_of_card(num_gpus))


def own_bytes(total_bytes: float) -> float:
    """Of a card's memory, what this process may allocate."""
    return torch.cuda.get_per_process_memory_fraction() * total_bytes


def for_models(config: EngineConfig) -> float:
    """Bytes for weights."""
    if config.model_memory_gb is not None:
        return config.model_memory_gb * 2**30
    if torch.cuda.is_available():
        return MODELS_SHARE * own_bytes(torch.cuda.get_device_properties(0).total_memory)
    return 0.5 * psutil.virtual_memory().total


def for_a_step() -> float:
    """Bytes that a step may use beside what is held: of those free on the card, and of its own."""
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_allocated()
    return min(free + torch.cuda.memory_reserved() - held, own_bytes(total) - held)


def give_back() -> None:
    """Return to the card what nothing refers to any more."""
    if torch.cuda.is_available():
        gc.collect()  # models have reference cycles
        torch.cuda.empty_cache()
