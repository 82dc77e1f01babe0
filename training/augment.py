"""Small random changes to pictures: place, size, angle, colour; on white throughout."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_PLAIN_SHARE = 0.2


def augment(pixels: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Return changed copies of pictures with values in [0, 1], shape (n, 3, height, width).

    A fifth of the pictures stays as it is: that is what the catalog will show the model.
    """
    n = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle = uniform(-0.2, 0.2) * strength
    angle = torch.where(uniform(0, 1) < 0.5, angle, torch.zeros(n))
    zoom = torch.exp(uniform(math.log(0.75), math.log(1.25)) * strength)
    stretch = torch.exp(uniform(-0.1, 0.1) * strength)
    shift = uniform(-0.12, 0.12, 2) * strength
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = [
        torch.stack([cos * stretch, -sin, shift[:, 0]], dim=1),
        torch.stack([sin, cos / stretch, shift[:, 1]], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    # Sampling outside gives zeros; on the inverted picture zero is white.
    moved = 1 - functional.grid_sample(1 - pixels, grid.to(pixels.device), align_corners=False)
    tint = uniform(0.85, 1.1, 3, 1, 1).to(pixels.device)
    contrast = uniform(0.75, 1.25, 1, 1, 1).to(pixels.device)
    grey = moved.mean(dim=1, keepdim=True)
    saturation = uniform(0.6, 1.3, 1, 1, 1).to(pixels.device)
    coloured = grey + (moved - grey) * saturation
    changed = ((coloured - 0.5) * contrast + 0.5) * tint
    plain = (torch.rand(n, generator=generator) < _PLAIN_SHARE).view(n, 1, 1, 1)
    return torch.where(plain.to(pixels.device), pixels, changed.clamp(0, 1))
