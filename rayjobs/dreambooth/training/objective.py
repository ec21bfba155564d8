"""What the UNet is trained to predict, and its error: epsilon, v and EDM objectives.

Owns noise levels, targets, weights and the prior-preserving loss. All of it is float32, whatever
the UNet runs in. Knows nothing of data, workers or optimizers. Legend: B rows, C H W latents.
"""

import math
from typing import Any, Protocol

import torch

from rayjobs.diffusion.modules.pipeline import prediction_of
from rayjobs.diffusion.modules.upload import upload

MAX_SNR = 1000.0
"""Above it the debiased estimation's weights are those of this."""


class Objective(Protocol):
    """How a row is noised and judged. A level is a timestep, or for EDM a noise deviation sigma."""

    def level(self, quantile: float) -> float:
        """The noise level at a quantile in [0, 1) of the levels' distribution."""
        ...

    def inputs(
        self, z_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, levels_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the UNet sees: noisy latents and its timesteps (B,)."""
        ...

    def target(
        self, z_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, levels_B: torch.Tensor
    ) -> torch.Tensor:
        """What the UNet should predict."""
        ...

    def weight(self, levels_B: torch.Tensor) -> torch.Tensor:
        """Of each row's squared error, (B,)."""
        ...

    def sigmas(self, levels_B: torch.Tensor) -> torch.Tensor:
        """The noise's deviation over the signal's scale, (B,)."""
        ...


class Diffusion:
    """Discrete steps, with epsilon or v prediction (arXiv 2006.11239; arXiv 2202.00512)."""

    def __init__(
        self,
        alphas_cumprod: torch.Tensor,
        prediction_type: str,
        min_snr_gamma: float | None = None,
        debiased: bool = False,
    ):
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type {prediction_type!r} is not supported for training")
        if prediction_type == "epsilon" and float(alphas_cumprod.min()) <= 0:
            raise ValueError(
                "a schedule that ends in pure noise needs a model with v prediction, not epsilon"
            )
        self.alphas_cumprod = alphas_cumprod.float().cpu()
        self._alphas = self.alphas_cumprod
        """The same on the device of the latest levels: indexing there waits for no copy."""
        self.prediction_type = prediction_type
        self.gamma = min_snr_gamma
        self.debiased = debiased

    def level(self, quantile: float) -> float:
        return float(int(quantile * len(self.alphas_cumprod)))

    def inputs(
        self, z_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, levels_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        signal, spread = self._scales(levels_B)
        return signal * z_BCHW + spread * noise_BCHW, levels_B.long()

    def target(
        self, z_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, levels_B: torch.Tensor
    ) -> torch.Tensor:
        if self.prediction_type == "epsilon":
            return noise_BCHW
        signal, spread = self._scales(levels_B)
        return signal * noise_BCHW - spread * z_BCHW

    def weight(self, levels_B: torch.Tensor) -> torch.Tensor:
        """Ones; or min-SNR (arXiv 2303.09556): min(SNR, gamma) / SNR, for v over SNR + 1; or the
        debiased estimation's (arXiv 2310.08442): 1 / sqrt(SNR), for v 1 / (SNR + 1)."""
        if self.gamma is None and not self.debiased:
            return torch.ones_like(levels_B, dtype=torch.float32)
        alpha_B = self._alphas_at(levels_B)
        snr_B = alpha_B / (1 - alpha_B)
        if self.gamma is None:
            snr_B = snr_B.clamp(max=MAX_SNR)
            return snr_B.rsqrt() if self.prediction_type == "epsilon" else 1 / (snr_B + 1)
        over_B = snr_B if self.prediction_type == "epsilon" else snr_B + 1
        return snr_B.clamp(max=self.gamma) / over_B

    def sigmas(self, levels_B: torch.Tensor) -> torch.Tensor:
        alpha_B = self._alphas_at(levels_B)
        return ((1 - alpha_B) / alpha_B).sqrt()

    def _scales(self, levels_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha_B111 = self._alphas_at(levels_B)[:, None, None, None]
        return alpha_B111.sqrt(), (1 - alpha_B111).sqrt()

    def _alphas_at(self, levels_B: torch.Tensor) -> torch.Tensor:
        if self._alphas.device != levels_B.device:
            self._alphas = upload(self.alphas_cumprod, levels_B.device)
        return self._alphas[levels_B.long()]


class EDM:
    """Preconditioned noise levels (arXiv 2206.00364), the loss taken on the UNet's own output.

    The paper's loss lambda(sigma) ||D - z||^2 with lambda c_out^2 = 1 is the plain error of F
    against F* = (z - c_skip x) / c_out, whose closed form needs no division by a small sigma.
    """

    def __init__(
        self,
        sigma_data: float,
        sigma_min: float,
        sigma_max: float,
        rho: float,
        prediction_type: str,
        sigmas: str,
    ):
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type {prediction_type!r} is not supported for training")
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.rho, self.draws = rho, sigmas
        self.sign = 1.0 if prediction_type == "epsilon" else -1.0

    def level(self, quantile: float) -> float:
        """Uniform over the sampler's own (Karras) schedule, or log-normal N(-1.2, 1.2^2)."""
        if self.draws == "lognormal":
            quantile_1 = torch.tensor(max(quantile, 1e-9), dtype=torch.float64)
            return math.exp(-1.2 + 1.2 * float(torch.special.ndtri(quantile_1)))
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return float((high + quantile * (low - high)) ** self.rho)

    def inputs(
        self, z_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, levels_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = levels_B[:, None, None, None]
        scale_in = 1 / (sigma**2 + self.sigma_data**2).sqrt()
        return scale_in * (z_BCHW + sigma * noise_BCHW), levels_B.log() / 4

    def target(
        self, z_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, levels_B: torch.Tensor
    ) -> torch.Tensor:
        sigma, data = levels_B[:, None, None, None], self.sigma_data
        target = (sigma * z_BCHW / data - data * noise_BCHW) / (sigma**2 + data**2).sqrt()
        return self.sign * target

    def weight(self, levels_B: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(levels_B, dtype=torch.float32)

    def sigmas(self, levels_B: torch.Tensor) -> torch.Tensor:
        return levels_B.float()


def build_objective(
    scheduler: Any,
    min_snr_gamma: float | None = None,
    edm_sigmas: str = "karras",
    debiased: bool = False,
) -> Objective:
    """The objective for the model that this sampler (a diffusers scheduler) belongs to.

    Raises ValueError for weights by SNR with an EDM model, for which they are not defined.
    """
    config = scheduler.config
    if prediction_of(scheduler).is_edm:
        if min_snr_gamma is not None or debiased:
            name = "debiased" if debiased else "min_snr_gamma"
            raise ValueError(
                f"train.{name} is not defined for an EDM model; leave it out: "
                "the EDM loss has its own weights"
            )
        return EDM(
            config.sigma_data,
            config.sigma_min,
            config.sigma_max,
            config.rho,
            config.prediction_type,
            edm_sigmas,
        )
    return Diffusion(scheduler.alphas_cumprod, config.prediction_type, min_snr_gamma, debiased)


def errors(
    prediction_BCHW: torch.Tensor,
    target_BCHW: torch.Tensor,
    kind: str = "mse",
    c_B: torch.Tensor | None = None,
    mask_B1HW: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row's mean error, (B,) float32: squared, or with `c_B` a pseudo-Huber loss.

    That is 2 c (sqrt(d^2 + c^2) - c) for `huber`, and the same over c for `smooth_l1`, as kohya's
    sd-scripts have them. A mask multiplies each value's error before the mean over all of them.
    """
    error_BCHW = (prediction_BCHW.float() - target_BCHW.float()).pow(2)
    if kind != "mse":
        assert c_B is not None
        c_B111 = c_B[:, None, None, None]
        error_BCHW = 2 * ((error_BCHW + c_B111**2).sqrt() - c_B111)
        error_BCHW = error_BCHW * c_B111 if kind == "huber" else error_BCHW
    if mask_B1HW is not None:
        error_BCHW = error_BCHW * mask_B1HW
    return error_BCHW.mean(dim=(1, 2, 3))


def huber_c(sigmas_B: torch.Tensor, c: float, schedule: str) -> torch.Tensor:
    """(B,): `c`, or from it at pure noise to 1 without: (1 - c) / (1 + sigma)^2 + c."""
    if schedule == "constant":
        return torch.full_like(sigmas_B, c)
    return (1 - c) / (1 + sigmas_B) ** 2 + c


def prior_preserving_loss(
    errors_B: torch.Tensor,
    weight_B: torch.Tensor,
    is_prior_B: torch.Tensor,
    prior_weight: float,
    num_instance: int,
    num_prior: int,
) -> torch.Tensor:
    """mean_i(w_i e_i) + prior_weight mean_c(w_c e_c) (arXiv 2208.12242, eq. 2), or a part of it.

    The rows may be any part of a global batch of `num_instance` photographs and `num_prior` class
    images: the losses of the parts add up to the loss of the whole.
    """
    share_B = torch.where(is_prior_B, prior_weight / max(1, num_prior), 1.0 / num_instance)
    return (share_B * weight_B * errors_B).sum()
