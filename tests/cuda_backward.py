"""Gradients on a GPU's twin: torch's own engine asks for a real device before it begins.

Calls each node of the graph as the engine does, in this thread. Knows nothing of what is computed.
"""

from collections import Counter, defaultdict
from typing import Any

import torch


def backward(loss: torch.Tensor) -> None:
    """As `loss.backward()`."""
    root: Any = loss.grad_fn
    waiting, ready = _uses(root), [root]
    gradients: dict[Any, dict[int, torch.Tensor]] = defaultdict(dict)
    gradients[root][0] = torch.ones_like(loss)
    while ready:
        node = ready.pop()
        given = gradients.pop(node, {})
        made = _call(node, given)
        for gradient, (following, number) in zip(made, node.next_functions, strict=True):
            if following is None:
                continue
            if gradient is not None:
                gradient = _fitted(gradient, following._input_metadata[number])
                before = gradients[following].get(number)
                gradients[following][number] = gradient if before is None else before + gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


def _uses(root: Any) -> Counter[Any]:
    """How often each node's gradient is added to."""
    uses: Counter[Any] = Counter()
    seen, stack = {root}, [root]
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                uses[following] += 1
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
    return uses


def _fitted(gradient: torch.Tensor, metadata: Any) -> torch.Tensor:
    """Of a tensor that was spread over others, the sum; in its own dtype."""
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    return gradient if gradient.dtype == metadata.dtype else gradient.to(metadata.dtype)


def _call(node: Any, given: dict[int, torch.Tensor]) -> tuple[Any, ...]:
    """Gradients of what it was computed from; of nothing comes nothing."""
    if not given:
        return (None,) * len(node.next_functions)
    with torch.no_grad():
        made = node(*map(given.get, range(len(node._input_metadata))))
    made = made if isinstance(made, tuple) else (made,)
    return made if node.next_functions else ()
