"""From one sample to the model's inputs and back, in NumPy; the parts are stateless and have their inverse beside
them."""

from torchpi.transforms.actions import absolute_actions, bool_mask, delta_actions, pad_to_dim, unpad
from torchpi.transforms.images import resize_with_pad, to_uint8_hwc
from torchpi.transforms.normalize import (
    Normalization,
    NormStats,
    constant_dims,
    load_norm_stats,
    normalize,
    save_norm_stats,
    unnormalize,
)
from torchpi.transforms.pipeline import Transforms
from torchpi.transforms.prompt import (
    HFTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    clean_text,
    digitize_state,
    load_tokenizer,
    pi05_prompt_text,
    tokenize_prompt,
)

__all__ = [
    "HFTokenizer",
    "NormStats",
    "Normalization",
    "SentencePieceTokenizer",
    "Tokenizer",
    "Transforms",
    "absolute_actions",
    "bool_mask",
    "clean_text",
    "constant_dims",
    "delta_actions",
    "digitize_state",
    "load_norm_stats",
    "load_tokenizer",
    "normalize",
    "pad_to_dim",
    "pi05_prompt_text",
    "resize_with_pad",
    "save_norm_stats",
    "to_uint8_hwc",
    "tokenize_prompt",
    "unnormalize",
    "unpad",
]
