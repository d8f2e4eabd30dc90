"""SimGAN's Algorithm 1 in plain PyTorch, written the obvious way: what one gets from the paper in an afternoon.

The same networks, losses, optimiser, schedule-free learning rates and batch as ours; float32, eager, NCHW. Batches are
gathered and normalised by NumPy on the host, the history is a NumPy array there. D's weight gradients in R's step are
computed and thrown away (``zero_grad`` is all that most ports do about them), D looks at refined and real images in two
passes, and Adam is torch's default. What is *not* slow here on purpose: R runs without a tape in D's step, and half of
D's refined images come from the history, so that R refines b/2 and not b images for it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainTrainer:
    """Args: the two networks (trained in place), uint8 images ``[N, H, W]``, and the settings."""

    def __init__(
        self,
        refiner: nn.Module,
        discriminator: nn.Module,
        synthetic: np.ndarray,
        real: np.ndarray,
        *,
        batch: int,
        k_g: int,
        lam: float,
        rates: tuple[float, float],
        history: int,
        device: torch.device,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.refiner, self.discriminator = refiner.to(device), discriminator.to(device)
        self.synthetic, self.real = synthetic, real
        self.batch, self.k_g, self.lam, self.device, self.autocast = batch, k_g, lam, device, autocast
        self.r_optimiser = torch.optim.Adam(refiner.parameters(), rates[0], betas=(0.5, 0.999))
        self.d_optimiser = torch.optim.Adam(discriminator.parameters(), rates[1], betas=(0.5, 0.999))
        self.history = np.zeros((history, 1, *synthetic.shape[1:]), np.float32)
        self.filled = 0
        self.random = np.random.default_rng(0)

    def draw(self, images: np.ndarray, count: int) -> Tensor:
        chosen = images[self.random.integers(len(images), size=count)]
        return torch.from_numpy(chosen[:, None].astype(np.float32) / 127.5 - 1).to(self.device)

    def swap(self, fresh: Tensor) -> Tensor:
        """As many images from the history as go in; random ones are replaced once it is full."""
        new, count = fresh.float().cpu().numpy(), len(fresh)
        if self.filled < len(self.history):
            stored = min(count, len(self.history) - self.filled)
            self.history[self.filled : self.filled + stored] = new[:stored]
            self.filled += stored
            old = self.history[self.random.choice(self.filled, count, replace=False)]
        else:
            old = self.history[self.random.choice(self.filled, count, replace=False)]
            self.history[self.random.choice(self.filled, count, replace=False)] = new
        return torch.from_numpy(old).to(self.device)

    def iteration(self) -> tuple[float, float]:
        """One iteration; R's and D's last losses."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            for _ in range(self.k_g):
                x = self.draw(self.synthetic, self.batch)
                refined = self.refiner(x)
                logits = self.discriminator(refined)
                adversarial = self.cross_entropy(logits, 0)
                r_loss = adversarial + self.lam * (refined - x).abs().sum() / self.batch
                self.r_optimiser.zero_grad()
                r_loss.backward()
                self.r_optimiser.step()
            with torch.no_grad():
                fresh = self.refiner(self.draw(self.synthetic, self.batch // 2))
            refined = torch.cat([fresh, self.swap(fresh).to(fresh.dtype)])
            y = self.draw(self.real, self.batch)
            d_loss = self.cross_entropy(self.discriminator(refined), 1) + self.cross_entropy(self.discriminator(y), 0)
            self.d_optimiser.zero_grad()
            d_loss.backward()
            self.d_optimiser.step()
        return r_loss.item(), d_loss.item()

    def cross_entropy(self, logits: Tensor, target: int) -> Tensor:
        """Summed over patches, mean over images; class 0 = real, class 1 = refined."""
        labels = torch.full((len(logits), *logits.shape[2:]), target, device=self.device)
        return F.cross_entropy(logits, labels, reduction="sum") / len(logits)
