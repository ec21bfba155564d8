"""Losses and gradients against references written from the papers, and the mistakes peers make."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EDMDPMSolverMultistepScheduler, EulerDiscreteScheduler

from rayjobs.dreambooth.training.objective import (
    Objective,
    build_objective,
    errors,
    huber_c,
    prior_preserving_loss,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (4, 6, 6)


def scheduler(kind: str) -> Any:
    if kind == "edm":
        return EDMDPMSolverMultistepScheduler()
    return EulerDiscreteScheduler(**BETAS, prediction_type=kind)


def network(x: torch.Tensor, t: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Something with parameters that depends on its input and its timestep."""
    return torch.tanh(theta[0] * x + theta[1] * torch.sin(t)[:, None, None, None]) * theta[2]


def reference(
    kind: str, gamma: float | None, rows: dict[str, torch.Tensor], theta: torch.Tensor, prior: float
) -> torch.Tensor:
    """The loss of a whole batch, row by row, in float64, from the papers' definitions."""
    alphas = torch.cumprod(
        1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0
    )
    sums = {False: torch.zeros((), dtype=torch.float64), True: torch.zeros((), dtype=torch.float64)}
    counts = {False: 0, True: 0}
    for z, n, level, is_prior in zip(*rows.values(), strict=True):
        z, n = z.double()[None], n.double()[None]
        if kind == "edm":
            sigma, data = float(level), 0.5
            total = sigma**2 + data**2
            noisy = z + sigma * n
            t = torch.tensor([math.log(sigma) / 4], dtype=torch.float64)
            raw = network(noisy / total**0.5, t, theta)
            denoised = data**2 / total * noisy + sigma * data / total**0.5 * raw
            weighted = total / (sigma * data) ** 2 * (denoised - z) ** 2
        else:
            t = torch.tensor([int(level)])
            a = alphas[t]
            x = a.sqrt() * z + (1 - a).sqrt() * n
            out = network(x, t.double(), theta)
            want = n if kind == "epsilon" else a.sqrt() * n - (1 - a).sqrt() * z
            weight = torch.ones(1, dtype=torch.float64)
            if gamma is not None:
                snr = a / (1 - a)
                weight = torch.minimum(snr, torch.tensor(gamma)) / (
                    snr if kind == "epsilon" else snr + 1
                )
            weighted = weight * (out - want) ** 2
        sums[bool(is_prior)] = sums[bool(is_prior)] + weighted.mean()
        counts[bool(is_prior)] += 1
    found = sums[False] / counts[False]
    return found + prior * sums[True] / counts[True] if counts[True] else found


def make_rows(objective: Objective, pairs: int, with_prior: bool = True) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(pairs)
    size = pairs * (2 if with_prior else 1)
    is_prior = torch.arange(size) % 2 == 1 if with_prior else torch.zeros(size, dtype=torch.bool)
    levels = [objective.level(float(u)) for u in torch.rand(size, generator=g)]
    return {
        "z": torch.randn(size, *SHAPE, generator=g) * 0.6,
        "noise": torch.randn(size, *SHAPE, generator=g),
        "levels": torch.tensor(levels),
        "is_prior": is_prior,
    }


def ours(
    objective: Objective,
    rows: dict[str, torch.Tensor],
    theta: torch.Tensor,
    prior: float,
    part: int,
) -> torch.Tensor:
    """The same through the objective, in parts of `part` rows whose losses are added."""
    is_prior = rows["is_prior"]
    counts = (int((~is_prior).sum()), int(is_prior.sum()))
    total = torch.zeros(())
    for first in range(0, len(is_prior), part):
        z, n, levels, of_prior = (tensor[first : first + part] for tensor in rows.values())
        x, t = objective.inputs(z, n, levels)
        wrong = errors(network(x, t.float(), theta), objective.target(z, n, levels))
        total = total + prior_preserving_loss(
            wrong, objective.weight(levels), of_prior, prior, *counts
        )
    return total


CASES = [
    ("epsilon", None),
    ("epsilon", 5.0),
    ("v_prediction", None),
    ("v_prediction", 5.0),
    ("edm", None),
]


@pytest.mark.parametrize(("kind", "gamma"), CASES)
@pytest.mark.parametrize("pairs", [1, 2, 3])
@pytest.mark.parametrize("with_prior", [True, False])
def test_loss_and_gradients(kind: str, gamma: float | None, pairs: int, with_prior: bool) -> None:
    objective = build_objective(scheduler(kind), gamma)
    rows = make_rows(objective, pairs, with_prior)
    for part in (1, 2, 3, 100):
        theta = torch.tensor([0.7, 0.3, 1.1], requires_grad=True)
        exact = theta.detach().double().requires_grad_()
        mine = ours(objective, rows, theta, 0.7, part)
        wanted = reference(kind, gamma, rows, exact, 0.7)
        mine.backward()
        wanted.backward()
        assert theta.grad is not None
        assert exact.grad is not None
        assert mine.item() == pytest.approx(wanted.item(), rel=1e-5)
        scale = exact.grad.abs().max()
        assert (theta.grad - exact.grad).abs().max() <= 1e-5 * max(1, float(scale))


def test_edm_targets_stay_exact_at_the_smallest_noise() -> None:
    """Built from the noisy latents F* loses its digits as sigma falls."""
    objective = build_objective(scheduler("edm"))
    rows = make_rows(objective, 4)
    sigma, data = torch.full((8,), 0.002), 0.5
    z, n = rows["z"], rows["noise"]
    exact = (0.002 * z.double() / data - data * n.double()) / (0.002**2 + data**2) ** 0.5
    assert (objective.target(z, n, sigma) - exact).abs().max() < 1e-6
    noisy = (z + 0.002 * n).bfloat16()
    skip, out = data**2 / (0.002**2 + data**2), 0.002 * data / (0.002**2 + data**2) ** 0.5
    naive = (z.bfloat16() - skip * noisy) / out
    assert (naive.double() - exact).abs().max() > 0.1


def test_a_whole_batch_of_prompts_keeps_its_order() -> None:
    """The peers' mistake: pictures in the order i i c c, prompts repeated as i c i c."""
    pictures = ["i", "i", "c", "c"]
    repeated = ["i", "c"] * 2
    assert [a == b for a, b in zip(pictures, repeated, strict=True)] == [True, False, False, True]
    # Ours says for each row what it is; the order of rows moves nothing.
    objective = build_objective(scheduler("epsilon"), 5.0)
    rows = make_rows(objective, 3)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    shuffled = {name: tensor[order] for name, tensor in rows.items()}
    theta = torch.tensor([0.7, 0.3, 1.1])
    assert float(ours(objective, rows, theta, 1.0, 6)) == pytest.approx(
        float(ours(objective, shuffled, theta, 1.0, 6)), rel=1e-6
    )


def test_weights_of_both_halves_are_kept_apart() -> None:
    """The peers' mistake: weights of 2 B rows against the loss of B broadcast silently at B = 1."""
    wrong, weight = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.1])
    broadcast = (weight * wrong[:1]).mean() + wrong[1:].mean()
    right = prior_preserving_loss(wrong, weight, torch.tensor([False, True]), 1.0, 1, 1)
    assert float(right) == pytest.approx(2.0 + 0.1)
    assert float(broadcast) == pytest.approx(2.1, abs=1e-6)  # 1.1 of the subject, 1 of the class
    assert float((weight * wrong[:1]).mean()) == pytest.approx(1.1)


def test_min_snr_of_v_is_never_above_one() -> None:
    """The peers' mistake: min(SNR, gamma) / SNR + 1 in place of min(SNR, gamma) / (SNR + 1)."""
    objective = build_objective(scheduler("v_prediction"), 5.0)
    levels = torch.tensor([0.0, 10, 100, 250, 500, 750, 999])
    weights = objective.weight(levels)
    published = [0.0043, 0.048, 0.529, 0.674, 0.276, 0.056, 0.0047]
    assert weights.tolist() == pytest.approx(published, rel=0.05)
    snr = alphas_of(levels)
    naive = snr.clamp(max=5) / snr + 1
    assert float(naive.min()) > 1
    of_epsilon = build_objective(scheduler("epsilon"), 5.0).weight(levels)
    assert of_epsilon.tolist() == pytest.approx([0.0043, 0.048, 0.591, 1, 1, 1, 1], rel=0.05)


def alphas_of(levels: torch.Tensor) -> torch.Tensor:
    alpha = DDPMScheduler(**BETAS).alphas_cumprod[levels.long()]
    return alpha / (1 - alpha)


def test_the_prior_half_is_weighed_like_the_other() -> None:
    """The peers' mistake: min-SNR on one half only, so that gamma moves the prior's weight."""
    objective = build_objective(scheduler("epsilon"), 5.0)
    levels = torch.tensor([3.0, 3.0])
    wrong, is_prior = torch.ones(2), torch.tensor([False, True])
    halves = [
        prior_preserving_loss(wrong * mask, objective.weight(levels), is_prior, 1.0, 1, 1)
        for mask in (~is_prior, is_prior)
    ]
    assert float(halves[0]) == float(halves[1]) < 0.1


def test_what_is_not_defined_is_refused() -> None:
    with pytest.raises(ValueError, match="min_snr_gamma is not defined for an EDM model"):
        build_objective(scheduler("edm"), 5.0)
    with pytest.raises(ValueError, match="'sample' is not supported"):
        build_objective(scheduler("sample"))
    ends_in_noise = EulerDiscreteScheduler(**BETAS, rescale_betas_zero_snr=True)
    ends_in_noise.alphas_cumprod[-1] = 0
    with pytest.raises(ValueError, match="needs a model with v prediction"):
        build_objective(ends_in_noise)


@pytest.mark.parametrize(
    ("name", "median", "below_one"), [("karras", 2.5, 0.40), ("lognormal", 0.30, 0.84)]
)
def test_edm_noise_levels(name: str, median: float, below_one: float) -> None:
    objective = build_objective(scheduler("edm"), None, name)
    draw: Callable[[float], float] = objective.level
    sigmas = torch.tensor([draw((i + 0.5) / 10_000) for i in range(10_000)])
    assert float(sigmas.median()) == pytest.approx(median, rel=0.05)
    assert float((sigmas < 1).float().mean()) == pytest.approx(below_one, abs=0.01)
    assert 0.001 < float(sigmas.min()) < float(sigmas.max()) < 110


def test_the_table_of_noise_levels_is_copied_to_a_device_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy at every call would wait for the device each time."""
    objective = build_objective(scheduler("v_prediction"), 5.0)
    levels = torch.tensor([3.0, 500.0], device="meta")
    z = torch.zeros(2, 4, 8, 8, device="meta")
    copies = []
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *args: (copies.append(args), to(self, *args))[1]
    )
    for _ in range(2):
        objective.inputs(z, z, levels)
        objective.target(z, z, levels)
        objective.weight(levels)
    assert copies == [(torch.device("meta"),)]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_weights_of_the_debiased_estimation(kind: str) -> None:
    alphas = torch.cumprod(
        1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0
    )
    objective = build_objective(scheduler(kind), debiased=True)
    for level in (0, 5, 400, 999):
        snr = min(1000.0, float(alphas[level] / (1 - alphas[level])))
        wanted = snr**-0.5 if kind == "epsilon" else 1 / (snr + 1)
        assert objective.weight(torch.tensor([level])).item() == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ValueError, match="debiased is not defined for an EDM model"):
        build_objective(scheduler("edm"), debiased=True)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_a_loss_that_forgives_outliers(kind: str) -> None:
    """Value by value as kohya's formula; for small errors as a square, for large ones linear."""
    torch.manual_seed(0)
    one, other = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    c_B = torch.tensor([0.1, 0.5, 1.0])
    for row, c in enumerate(c_B.tolist()):
        values = [
            2 * (c if kind == "huber" else 1) * (math.sqrt(d * d + c * c) - c)
            for d in (one - other)[row].flatten().tolist()
        ]
        mine = errors(one, other, kind, c_B)[row].item()
        assert mine == pytest.approx(sum(values) / len(values), rel=1e-5)
    scale = 1 if kind == "huber" else 1 / c_B[0].item()
    small, large = torch.full((1, 1, 1, 1), 1e-3), torch.full((1, 1, 1, 1), 1e3)
    zero, c_1 = torch.zeros(1, 1, 1, 1), c_B[:1]
    assert errors(small, zero, kind, c_1).item() == pytest.approx(scale * 1e-6, rel=0.02)
    assert errors(large, zero, kind, c_1).item() == pytest.approx(scale * 0.2 * 1e3, rel=1e-3)


def test_where_errors_begin_to_count_linearly() -> None:
    objective = build_objective(scheduler("epsilon"))
    levels = torch.tensor([0.0, 999.0])
    low, high = objective.sigmas(levels).tolist()
    assert (low, high) == pytest.approx((0.0292, 14.61), rel=1e-2)
    c = huber_c(objective.sigmas(levels), 0.1, "snr").tolist()
    assert c == pytest.approx([0.9 / (1 + s) ** 2 + 0.1 for s in (low, high)])
    edm = build_objective(scheduler("edm"))
    assert edm.sigmas(torch.tensor([0.5, 80.0])).tolist() == [0.5, 80.0]
    assert huber_c(objective.sigmas(levels), 0.1, "constant").tolist() == pytest.approx([0.1, 0.1])


def test_a_mask_says_where_errors_count() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    mask = torch.rand(2, 1, *SHAPE[1:])
    wanted = [
        sum(
            ((one - other)[row, :, y, x] ** 2).sum().item() * mask[row, 0, y, x].item()
            for y in range(SHAPE[1])
            for x in range(SHAPE[2])
        )
        / one[0].numel()
        for row in range(2)
    ]
    assert errors(one, other, mask_B1HW=mask).tolist() == pytest.approx(wanted, rel=1e-5)
