"""C-Abstractor: patch features in, a fixed number of decoder embeddings out (Honeybee, arXiv 2312.06742).

    learned positions + features → RegStage → adaptive average pooling to √M × √M → RegStage → Linear, SiLU, Linear

A RegStage is timm's: RegNet bottlenecks of ratio 1 with depthwise 3×3 convolutions, squeeze-and-excite 0.25, LayerNorm
over channels and SiLU.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mm.model.connector.base import Connector, ConnectorShape

NORM_EPSILON = 1e-6  # LayerNorm2d's in timm


class CAbstractor(Connector):
    """Locality kept by convolutions, any grid (it need not be a multiple of √num_tokens).

    Reads num_tokens, hidden_size (of both stages) and depth (blocks a stage).

    Initialisation: convolutions He-normal by fan-out (timm's RegNet), linear layers and positions normal with
    `init_std`, biases zero. No branch starts at zero: the readout needs every path's gradient from the first step.
    """

    def __init__(
        self, config: ConnectorShape, vision_hidden: int, grid: int, output_size: int, init_std: float = 0.02
    ) -> None:
        super().__init__(config, vision_hidden, grid, output_size, init_std)
        self.position_embedding = nn.Parameter(torch.empty(1, grid * grid, vision_hidden))
        self.stage1 = _stage(config.depth, vision_hidden, config.hidden_size)
        self.pool = nn.AdaptiveAvgPool2d(self.side)
        self.stage2 = _stage(config.depth, config.hidden_size, config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, output_size)
        self.fc2 = nn.Linear(output_size, output_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.position_embedding, std=self.init_std)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.init_std)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        x = self.as_grid(features + self.position_embedding)
        x = self.stage2(self.pool(self.stage1(x)))
        return self.fc2(F.silu(self.fc1(x.flatten(2).transpose(1, 2))))


def _stage(depth: int, in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(*(Bottleneck(in_channels if i == 0 else channels, channels) for i in range(depth)))


class Bottleneck(nn.Module):
    """RegNet's block at stride 1: conv 1×1, depthwise 3×3, squeeze-and-excite, conv 1×1, and a shortcut."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm1 = LayerNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm2 = LayerNorm2d(channels)
        self.squeeze = SqueezeExcite(channels, round(in_channels * 0.25))  # a quarter of the input's, as in timm
        self.conv3 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm3 = LayerNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), LayerNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        y = self.squeeze(F.silu(self.norm2(self.conv2(y))))
        return F.silu(self.norm3(self.conv3(y)) + self.shortcut(x))


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the means of all channels."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [n, c, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
