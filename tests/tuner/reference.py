"""CLIP with prompts, written out again from its weights: nothing of the tuner and of transformers' forward is used."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def _layer(layer, hidden, prompts, allowed):
    """Insert prompts after the first token, run the layer by hand, drop them."""
    batch, length = hidden.shape[:2]
    count = len(prompts)
    hidden = torch.cat([hidden[:, :1], prompts.expand(batch, -1, -1), hidden[:, 1:]], dim=1)
    attention = layer.self_attn
    heads = attention.num_heads

    def split(states):
        return states.view(batch, length + count, heads, -1).transpose(1, 2)

    normed = layer.layer_norm1(hidden)
    query, key, value = (split(project(normed)) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~allowed, float("-inf"))
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length + count, -1)
    hidden = hidden + attention.out_proj(mixed)
    hidden = hidden + layer.mlp.fc2(layer.mlp.activation_fn(layer.mlp.fc1(layer.layer_norm2(hidden))))
    return torch.cat([hidden[:, :1], hidden[:, 1 + count :]], dim=1)


def text_features(clip, ids, prompts, mask=None):
    """`prompts`: (layers, prompts, width). Returns (batch, dim)."""
    tower = clip.text_model
    batch, length = ids.shape
    hidden = tower.embeddings.token_embedding(ids) + tower.embeddings.position_embedding.weight[:length]
    count = prompts.shape[1]
    real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()
    real = torch.cat([real[:, :1], real.new_ones(batch, count), real[:, 1:]], dim=1)
    full = length + count
    allowed = torch.ones(full, full, dtype=torch.bool).tril() & real[:, None, None, :]
    for layer, own in zip(tower.encoder.layers, prompts):
        hidden = _layer(layer, hidden, own, allowed)
    hidden = tower.final_layer_norm(hidden)
    ends = (ids == tower.eos_token_id).int().argmax(-1)
    return clip.text_projection(hidden[torch.arange(batch), ends])


def image_features(clip, pixels, prompts):
    """`prompts`: (layers, prompts, width). Returns (batch, dim)."""
    tower = clip.vision_model
    patches = F.conv2d(pixels, tower.embeddings.patch_embedding.weight, stride=tower.embeddings.patch_size)
    patches = patches.flatten(2).transpose(1, 2)
    cls = tower.embeddings.class_embedding.expand(len(pixels), 1, -1)
    hidden = torch.cat([cls, patches], dim=1) + tower.embeddings.position_embedding.weight
    hidden = tower.pre_layrnorm(hidden)
    for layer, own in zip(tower.encoder.layers, prompts):
        hidden = _layer(layer, hidden, own, torch.ones((), dtype=torch.bool))
    return clip.visual_projection(tower.post_layernorm(hidden[:, 0]))


def logits(clip, ids, pixels, text_prompts, vision_prompts, mask=None):
    """(images, texts)."""
    text = F.normalize(text_features(clip, ids, text_prompts, mask), dim=-1)
    image = F.normalize(image_features(clip, pixels, vision_prompts), dim=-1)
    return clip.logit_scale.exp() * image @ text.T
