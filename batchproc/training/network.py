"""The real/bogus network: plain convolutions with an early stride, made for int8 and for one CPU core."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["SIZE", "RealBogusNet"]

SIZE = 31  #: Side of the input in pixels


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int) -> nn.Sequential:
    # No padding: the edge of a stamp is no edge on the sky. Batch norm is folded into the convolution on export.
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


class RealBogusNet(nn.Module):
    """Stamps ``(n, c, 31, 31)``, normalised → logit of being real ``(n, 1)``.

    Parameters
    ----------
    widths : tuple of int
        Channels of the three convolutions.
    hidden : int
        Width of the layer before the answer.
    dropout : float
        Before the last layer, in training only.
    channels : int
        Three; or six, of stamps at two scales.
    """

    def __init__(
        self,
        widths: tuple[int, int, int] = (32, 64, 96),
        hidden: int = 64,
        dropout: float = 0.2,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(  # (n, c, 31, 31)
            _conv(channels, widths[0], kernel=5, stride=2),  # (n, 32, 14, 14)
            _conv(widths[0], widths[1], kernel=3, stride=2),  # (n, 64, 6, 6)
            _conv(widths[1], widths[2], kernel=3, stride=1),  # (n, 96, 4, 4)
        )
        self.answer = nn.Sequential(
            nn.Flatten(), nn.Linear(widths[2] * 16, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1)
        )

    def forward(self, stamps: torch.Tensor) -> torch.Tensor:
        """Logit of being real."""
        logit: torch.Tensor = self.answer(self.features(stamps))
        return logit
