"""Transforms between a robot's sample and the model's inputs: NumPy, stateless, each next to its inverse."""

from torchpi.transforms.actions import absolute_actions as absolute_actions
from torchpi.transforms.actions import bool_mask as bool_mask
from torchpi.transforms.actions import delta_actions as delta_actions
from torchpi.transforms.actions import pad_to_dim as pad_to_dim
from torchpi.transforms.actions import unpad as unpad
from torchpi.transforms.images import ImageTransform as ImageTransform
from torchpi.transforms.images import resize_with_pad as resize_with_pad
from torchpi.transforms.images import to_uint8_hwc as to_uint8_hwc
from torchpi.transforms.normalize import Normalization as Normalization
from torchpi.transforms.normalize import NormStats as NormStats
from torchpi.transforms.normalize import constant_dims as constant_dims
from torchpi.transforms.normalize import load_norm_stats as load_norm_stats
from torchpi.transforms.normalize import normalize as normalize
from torchpi.transforms.normalize import save_norm_stats as save_norm_stats
from torchpi.transforms.normalize import unnormalize as unnormalize
from torchpi.transforms.pipeline import Transforms as Transforms
from torchpi.transforms.prompt import HFTokenizer as HFTokenizer
from torchpi.transforms.prompt import SentencePieceTokenizer as SentencePieceTokenizer
from torchpi.transforms.prompt import Tokenizer as Tokenizer
from torchpi.transforms.prompt import clean_text as clean_text
from torchpi.transforms.prompt import digitize_state as digitize_state
from torchpi.transforms.prompt import load_tokenizer as load_tokenizer
from torchpi.transforms.prompt import pi05_prompt_text as pi05_prompt_text
from torchpi.transforms.prompt import tokenize_prompt as tokenize_prompt
