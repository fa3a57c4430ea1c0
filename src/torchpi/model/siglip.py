"""SigLIP: the vision tower, which encodes a camera image as patch tokens for the backbone.

Source: "Sigmoid Loss for Language Image Pre-Training" (arXiv:2303.15343), So400m/14, as used in PaliGemma
(arXiv:2407.07726): no class token, no pooling, and a final linear projection to the backbone's width.
"""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from torchpi.config import VisionConfig
from torchpi.errors import ModelError
from torchpi.model.layers import Linear, attend, float32_layer_norm, gelu_tanh, lecun_normal_

LAYER_NORM_EPS = 1e-6  # flax's default, torch's is 1e-5


class EncoderBlock(nn.Module):
    """Pre-norm transformer layer: self-attention, then an MLP, each added to the residual stream."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.fc1 = Linear(config.width, config.mlp_dim)
        self.fc2 = Linear(config.mlp_dim, config.width)

    def forward(self, x: Float[Tensor, "B P W"]) -> Float[Tensor, "B P W"]:
        """Run the layer; every patch attends to every patch."""
        qkv = self.qkv(float32_layer_norm(self.norm1, x))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in qkv.chunk(3, dim=-1))  # [B, P, heads, K]
        x = x + self.out(attend(q, k, v, mask=None))
        return x + self.fc2(gelu_tanh(self.fc1(float32_layer_norm(self.norm2, x))))


class SigLIP(nn.Module):
    """Image → patch tokens of the backbone's width."""

    def __init__(self, config: VisionConfig, *, image_size: int, out_width: int) -> None:
        super().__init__()
        self.config = config
        self.side = image_size // config.patch
        self.patch_embed = Linear(config.patch * config.patch * 3, config.width)
        if config.position == "learned":
            self.pos_embed = nn.Parameter(torch.empty(self.side * self.side, config.width))
        # Cast, because the elements of a ModuleList have no static type.
        self.blocks = cast("Sequence[EncoderBlock]", nn.ModuleList(EncoderBlock(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.head = Linear(config.width, out_width)

    def patchify(self, images: Float32[Tensor, "B h w 3"]) -> Float32[Tensor, "B P pixels"]:
        """Cut images into patches, row by row; the order inside a patch is row, column, channel."""
        patch, side = self.config.patch, self.side
        if images.shape[1:3] != (side * patch, side * patch):
            raise ModelError(
                f"The model needs images of {side * patch}×{side * patch} pixels, got {images.shape[1]}×"
                f"{images.shape[2]}; torchpi.transforms.images.resize_with_pad resizes them."
            )
        patches = images.unflatten(1, (side, patch)).unflatten(3, (side, patch))  # [B, side, patch, side, patch, 3]
        return patches.transpose(2, 3).reshape(images.shape[0], side * side, patch * patch * 3)

    def position_embedding(self) -> Float32[Tensor, "P W"]:
        """The position embedding in float32, learned or sinusoidal."""
        if self.config.position == "learned":
            return self.pos_embed.float()
        return posemb_sincos_2d(self.side, self.config.width, device=self.head.weight.device)

    def forward(self, images: Float32[Tensor, "B h w 3"], dtype: torch.dtype) -> Float[Tensor, "B P D"]:
        """Encode images.

        Args:
            images: RGB in [-1, 1].
            dtype: dtype of the encoder layers; patch and position embeddings are computed in float32.
        """
        x = self.patch_embed(self.patchify(images)) + self.position_embedding()
        x = x.to(dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(float32_layer_norm(self.norm, x))

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Initialize the weights as openpi does: xavier-uniform matrices, MLP biases N(0, 1e-6), position embedding
        N(0, 1/√width), head 0."""
        lecun_normal_(self.patch_embed.weight, generator)  # flax's default for a convolution
        nn.init.zeros_(self.patch_embed.bias)
        if self.config.position == "learned":
            nn.init.normal_(self.pos_embed, std=self.config.width**-0.5, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for weight in (*block.qkv.weight.chunk(3), block.out.weight, block.fc1.weight, block.fc2.weight):
                nn.init.xavier_uniform_(weight, generator=generator)
            nn.init.zeros_(block.qkv.bias)
            nn.init.zeros_(block.out.bias)
            nn.init.normal_(block.fc1.bias, std=1e-6, generator=generator)
            nn.init.normal_(block.fc2.bias, std=1e-6, generator=generator)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


def posemb_sincos_2d(
    side: int, width: int, temperature: float = 10_000.0, *, device: torch.device | None = None
) -> Float32[Tensor, "P W"]:
    """Fixed 2-D position embedding of MoCo v3 (arXiv:2104.02057): sine and cosine of the column, then of the row."""
    index = torch.arange(side, device=device)
    row, column = torch.meshgrid(index, index, indexing="ij")
    frequency = temperature ** -(torch.arange(width // 4, dtype=torch.float32, device=device) / max(width // 4 - 1, 1))
    y = row.flatten()[:, None] * frequency
    x = column.flatten()[:, None] * frequency
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)
