"""Train the small CLIP that ships with the package from scratch, on captioned pictograms (about 40 minutes, 2 cores).

    python examples/pretrain_small_clip.py --output mmap_peft/data/small_clip

The pictures are pictograms in other styles and poses than those of the four tasks (stripes, dots, gradients, clouds,
...). Phase 1 draws them with more variation and augments colours and positions, to prevent overfitting. Each step
contrasts a batch of pictures with one caption for each class, so that pictures of the same class are not negatives of
each other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmap_peft.data import pictograms, rendering


TEMPLATES = [
    "a photo of a {}.", "a picture of a {}.", "{}", "an image of the {}.", "a drawing of a {}.", "this is a {}.",
    "a small {}.", "a large {}.", "a colourful {}.", "the {} on a wall.", "a sign with a {}.", "one {}.",
]  # fmt: skip
SEED = 20_000  # far from the seeds of the data set


def other_style(character: str, rng: np.random.Generator, wide: bool = False) -> Image.Image:
    """A pictogram with independent patterns for background, fill and line; one third have plain colours instead.

    `wide` rotates and shrinks them more, makes outlines thicker, and adds patches and worn places.
    """
    if wide:
        mask = rendering.pose(character, rng, tilt=35, scale=(0.45, 0.95), slant=0.2)
    else:
        mask = rendering.pose(character, rng, tilt=20, scale=(0.6, 0.95), slant=0.1)
    if rng.random() < 1 / 3:
        ground, ink = rendering.hue(rng, (0.0, 0.4), (0.7, 1.0)), rendering.hue(rng, (0.0, 1.0), (0.0, 0.4))
        return rendering.finish(rendering.over(rendering.paper(ground), mask, ink))
    size = rendering.CANVAS
    y, x = np.mgrid[:size, :size]

    def pattern() -> np.ndarray:
        kind = rng.integers(6)
        angle, pitch = rng.uniform(0, np.pi), rng.uniform(8, 24)
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / pitch)
        if kind == 0:
            return (wave > rng.uniform(-0.5, 0.5)).astype(np.float32)
        if kind == 1:
            other = np.sin((y * np.cos(angle) - x * np.sin(angle)) * 2 * np.pi / pitch)
            return (wave * other > 0.2).astype(np.float32)
        if kind == 2:
            return ((x * np.cos(angle) + y * np.sin(angle)) / (1.5 * size)).clip(0, 1).astype(np.float32)
        if kind == 3:
            return rendering.clouds(rng, int(rng.integers(3, 12)))
        return np.zeros((size, size), dtype=np.float32)

    bright = bool(rng.random() < 0.5)
    ground_value, ink_value = ((0.55, 1.0), (0.0, 0.45)) if bright else ((0.0, 0.4), (0.6, 1.0))
    spread = rng.uniform(0.1, 0.7)

    def paint(value: tuple[float, float]) -> np.ndarray:
        first, second = rendering.hue(rng, (0.0, 1.0), value), rendering.hue(rng, (0.0, 1.0), value)
        return first + spread * pattern()[..., None] * (second - first)

    picture = paint(ground_value)
    if wide and rng.random() < 0.4:
        left, top = rng.uniform(0.0, 0.15, 2) * size
        patch = ((x > left) & (y > top) & (x < size - top) & (y < size - left)).astype(np.float32)
        picture = rendering.over(picture, patch, paint(ground_value))
    line = rng.random()
    if line < 0.25:
        mask = rendering.edges(mask, int(rng.integers(3, 6)))
    elif line < 0.5:
        width = int(rng.integers(3, 9 if wide else 6))
        picture = rendering.over(picture, rendering.grow(mask, width), paint(ink_value))
        ink_value = ground_value
    if wide and rng.random() < 0.3:
        mask = mask * (2 * rendering.clouds(rng, int(rng.integers(6, 20))) - rng.uniform(0.0, 0.4)).clip(0, 1)
    picture = rendering.over(picture, rendering.blur(mask, rng.uniform(0, 1.5 if wide else 0.8)), paint(ink_value))
    if rng.random() < 0.3:
        picture = picture + rng.normal(0, rng.uniform(0, 0.1), picture.shape)
    return rendering.finish(picture)


def _pixels(job: tuple[int, int, bool]) -> np.ndarray:
    label, index, wide = job
    character = pictograms.GLYPHS[pictograms.CLASS_NAMES[label]]
    return np.asarray(other_style(character, np.random.default_rng([SEED + wide, label, index]), wide))


def draw_all(per_class: int, wide: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """All pictures of one phase, (pictures, 3, 48, 48) as bytes, and their labels."""
    jobs = [(label, index, wide) for label in range(len(pictograms.CLASS_NAMES)) for index in range(per_class)]
    with multiprocessing.Pool() as pool:
        drawn = list(tqdm(pool.imap(_pixels, jobs, chunksize=64), total=len(jobs), desc="drawing"))
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor([label for label, _, _ in jobs])


def vary(batch: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Swap the colour channels of a batch, turn a third of it to the negative, and shift it by up to 3 pixels."""
    batch = batch[:, torch.from_numpy(rng.permutation(3))]
    negative = torch.from_numpy(rng.random(len(batch)) < 1 / 3)[:, None, None, None]
    batch = torch.where(negative, 1 - batch, batch)
    down, right = rng.integers(0, 7, 2)
    padded = F.pad(batch, (3, 3, 3, 3), mode="replicate")
    return padded[..., down : down + batch.shape[-2], right : right + batch.shape[-1]]


def make_tokenizer(captions: list[str], context: int) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of its own: all bytes, and the words of the captions."""
    reference = CLIPTokenizer()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = reference._tokenizer.normalizer, reference._tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=context)


def make_model(tokenizer: CLIPTokenizer, context: int) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": context, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "initializer_factor": 3.0,
    }  # fmt: skip
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": rendering.SIZE, "patch_size": 8, "initializer_factor": 3.0,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96, initializer_factor=3.0))


@torch.no_grad()
def zero_shot(model: CLIPModel, processor: CLIPProcessor, pictures: list[Image.Image], labels: np.ndarray) -> float:
    """Accuracy of "a photo of a {}." over all classes."""
    names = [TEMPLATES[0].format(name) for name in pictograms.CLASS_NAMES]
    inputs = processor(text=names, images=pictures, return_tensors="pt", padding=True)
    return float((model(**inputs).logits_per_image.argmax(-1).numpy() == labels).mean())


def train(
    model: CLIPModel, processor: CLIPProcessor, pixels: torch.Tensor, labels: torch.Tensor, phase: int, epochs: int,
    batch_size: int, learning_rate: float,
) -> None:  # fmt: skip
    """One phase: cross entropy of pictures over one caption a class, each caption from a random template."""
    names = pictograms.CLASS_NAMES
    images = processor.image_processor
    mean, std = torch.tensor(images.image_mean).view(3, 1, 1), torch.tensor(images.image_std).view(3, 1, 1)
    check_labels = np.repeat(np.arange(len(names)), 4)
    checks = {
        style: [pictograms.draw(style, names[c], i, seed=SEED) for c in range(len(names)) for i in range(4)]
        for style in rendering.STYLES
    }
    steps = epochs * (len(labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(phase)
    bar = tqdm(total=steps, desc=f"training, phase {phase}")
    for epoch in range(epochs):
        model.train()
        order = torch.from_numpy(rng.permutation(len(labels)))
        for rows in order[: len(order) // batch_size * batch_size].split(batch_size):
            batch = pixels[rows] / 255.0
            batch = ((vary(batch, rng) if phase else batch) - mean) / std
            captions = [TEMPLATES[rng.integers(len(TEMPLATES))].format(name) for name in names]
            text = processor.tokenizer(captions, return_tensors="pt", padding=True)
            loss = F.cross_entropy(model(pixel_values=batch, **text).logits_per_image, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            model.logit_scale.data.clamp_(0, np.log(100))
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        model.eval()
        accuracy = {style: zero_shot(model, processor, checks[style], check_labels) for style in checks}
        print(f"\nepoch {epoch + 1}:", {style: round(100 * value, 1) for style, value in accuracy.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=600, help="pictures of each class, in each phase")
    parser.add_argument("--epochs", type=int, nargs=2, default=(16, 8), help="of phase 0 and phase 1")
    parser.add_argument("--learning-rates", type=float, nargs=2, default=(1e-3, 7e-4), help="the largest, by phase")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--begin-with", type=Path, help="the output of phase 0, to run only phase 1")
    args = parser.parse_args()

    torch.manual_seed(0)
    context = 32
    tokenizer = make_tokenizer(
        [template.format(name) for template in TEMPLATES for name in pictograms.CLASS_NAMES], context
    )
    size = {"height": rendering.SIZE, "width": rendering.SIZE}
    images = CLIPImageProcessorPil(size={"shortest_edge": rendering.SIZE}, crop_size=size)
    processor = CLIPProcessor(images, tokenizer)
    model = CLIPModel.from_pretrained(args.begin_with) if args.begin_with else make_model(tokenizer, context)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    for phase in (1,) if args.begin_with else (0, 1):
        pixels, labels = draw_all(args.per_class, wide=bool(phase))
        train(model, processor, pixels, labels, phase, args.epochs[phase], args.batch_size, args.learning_rates[phase])
        model.save_pretrained(args.output)
        processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
