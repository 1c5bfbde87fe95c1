"""The two plain poolings of MM1's ablation (arXiv 2403.09611, section 3.1): by averages, and by learned queries."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mm.model.connector.base import Connector, ConnectorShape, init_linear

NORM_EPSILON = 1e-6
HEAD_DIM = 64  # of the queries' attention, as wide as a ViT's heads


class AveragePool(Connector):
    """Adaptive average pooling of the grid to √num_tokens × √num_tokens, then one linear layer.

    Reads num_tokens. Initialisation: normal with `init_std`, bias zero.
    """

    def __init__(
        self, config: ConnectorShape, vision_hidden: int, grid: int, output_size: int, init_std: float = 0.02
    ) -> None:
        super().__init__(config, vision_hidden, grid, output_size, init_std)
        self.pool = nn.AdaptiveAvgPool2d(self.side)
        self.proj = nn.Linear(vision_hidden, output_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init_linear(self.proj, self.init_std)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(self.pool(self.as_grid(features)).flatten(2).transpose(1, 2))


class AttentionPool(Connector):
    """num_tokens learned queries attend to the patches; one cross-attention layer, then one linear layer.

    Patches are normalised and given learned positions, which tell the queries where a patch lies. Reads num_tokens and
    hidden_size (of the attention, a multiple of 64). MM1 does not publish its layer; this is one of the usual form.
    Initialisation: normal with `init_std`, biases zero.
    """

    def __init__(
        self, config: ConnectorShape, vision_hidden: int, grid: int, output_size: int, init_std: float = 0.02
    ) -> None:
        super().__init__(config, vision_hidden, grid, output_size, init_std)
        width = config.hidden_size
        self.heads = max(1, width // HEAD_DIM)
        self.norm = nn.LayerNorm(vision_hidden, eps=NORM_EPSILON)
        self.position_embedding = nn.Parameter(torch.empty(1, grid * grid, vision_hidden))
        self.queries = nn.Parameter(torch.empty(1, config.num_tokens, width))
        self.kv = nn.Linear(vision_hidden, 2 * width)
        self.out = nn.Linear(width, width)
        self.proj = nn.Linear(width, output_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        for embedding in (self.position_embedding, self.queries):
            nn.init.normal_(embedding, std=self.init_std)
        for linear in (self.kv, self.out, self.proj):
            init_linear(linear, self.init_std)

    def forward(self, features: Tensor) -> Tensor:
        keys, values = self.kv(self.norm(features) + self.position_embedding).chunk(2, dim=-1)
        queries = self.queries.expand(len(features), -1, -1)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (queries, keys, values))
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(self.out(pooled))
