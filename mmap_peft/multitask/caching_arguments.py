"""Training arguments of what is kept of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from ..checking import Amount, checked


CHOICES, DTYPES = ("auto", "always", "never"), ("float32", "bfloat16", "float16")
_KINDS = {"image_cache_gb": Amount, "cache_features": Literal[CHOICES], "cache_dtype": Literal[DTYPES] | None}


@dataclass
class CachingArguments:
    """Part of `MultiTaskTrainingArguments`."""

    image_cache_gb: float = HfArg(
        default=4.0,
        help="GB (1e9 bytes) of disk space in TMPDIR for the features of cache_features, of all processes and "
        "trainings together. What they do not need keeps resized images for later epochs: for each process, this much "
        "for training, as much for evaluation, and as much for crops. 0: nothing is kept.",
    )
    cache_features: str = HfArg(
        default="auto",
        help="Whether what enters the first layer of the image tower that adapters change is computed once for each "
        "image and kept, for later epochs and trainings. 'auto': where reading it is faster, which is on a CPU, and "
        "elsewhere for methods that change nothing in the image tower; 'always': an error says where it is "
        "impossible; 'never'. Augmented images need augment_views.",
        metadata={"choices": list(CHOICES)},
    )
    cache_dtype: str | None = HfArg(
        default=None,
        help="Dtype in which these features are kept: 'bfloat16' or 'float16' takes half the space of 'float32', and "
        "rounds them. None: that in which they are computed, which changes no bit.",
        metadata={"choices": list(DTYPES)},
    )

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            checked(getattr(self, name), kind, name)
        super().__post_init__()

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """`cache_dtype` as a dtype of torch."""
        return None if self.cache_dtype is None else getattr(torch, self.cache_dtype)
