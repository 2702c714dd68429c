import hashlib
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoProcessor, CLIPModel

from mmap_peft import MmAPConfig, MultiTaskClassifier, load_processor
from mmap_peft.data.pictograms import (
    CLASS_NAMES,
    GLYPHS,
    contact_sheet,
    draw,
    pictogram_domains,
    pictograms,
    small_clip,
)
from mmap_peft.data.rendering import STYLES
from mmap_peft.data.splits import make_tasks, split_at_random


def digest():
    digest = hashlib.sha256()
    for style in STYLES:
        for name in ("umbrella", "chess knight"):
            digest.update(draw(style, name, 3).tobytes())
    return digest.hexdigest()


def test_sixty_classes_with_a_glyph_of_their_own():
    assert len(CLASS_NAMES) == len(set(GLYPHS.values())) == 60
    blank = np.asarray(draw("print", "sun", 0)).mean()
    assert blank < 250
    for name in CLASS_NAMES:
        assert np.asarray(draw("print", name, 0)).min() < 160, name  # ink is there


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_pictures_are_the_same_in_every_process(hash_seed):
    code = "from tests.data.test_pictograms import digest; print(digest())"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest()


def test_pictures_differ_by_index_seed_style_and_class():
    base = draw("sketch", "sun", 0).tobytes()
    others = [
        draw("sketch", "sun", 1),
        draw("sketch", "sun", 0, seed=1),
        draw("photo", "sun", 0),
        draw("sketch", "cat", 0),
    ]
    assert len({base, *(picture.tobytes() for picture in others)}) == 5


def test_a_data_set_is_drawn_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    data = pictograms("clipart", per_class=3)
    with monkeypatch.context() as patch:
        patch.setattr(f"{draw.__module__}.draw", lambda *arguments: pytest.fail("drawn again"))
        assert pictograms("clipart", per_class=3)[61]["image"].tobytes() == data[61]["image"].tobytes()
    assert len(data) == 180
    row = data[61]
    assert (row["label"], row["index"], row["file"]) == (20, 1, "clipart/moon/1")
    assert row["image"].tobytes() == draw("clipart", "moon", 1).tobytes()
    assert row["image"].size == (48, 48)
    with pytest.raises(ValueError, match="is not a style of Pictograms; write one of print, clipart, sketch, photo"):
        pictograms("oil")


def test_the_contact_sheet_has_a_row_a_style():
    assert contact_sheet().size == (12 * 48, 4 * 48)


def test_the_small_clip_loads_as_any_clip_and_is_small():
    folder = small_clip()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8 * 2**20
    clip, processor = CLIPModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(text=["a photo of a sun."], images=[draw("print", "sun", 0)], return_tensors="pt")
    assert clip(**inputs).logits_per_image.isfinite().all()
    assert (folder / "README.md").read_text().startswith("---")


def test_the_default_adapters_are_below_a_hundredth_of_the_small_clip():
    clip = CLIPModel.from_pretrained(small_clip())
    base = sum(parameter.numel() for parameter in clip.parameters())
    tasks = make_tasks(pictogram_domains(2), split_at_random(pictogram_domains(2), 0.5))
    classifier = MultiTaskClassifier(clip, load_processor(small_clip()), tasks, MmAPConfig())
    adapter = sum(parameter.numel() for parameter in classifier.adapter_parameters("global").values())
    assert 8 * adapter / base < 0.01  # four groups of one task each, and four tasks


def test_zero_shot_is_neither_hopeless_nor_done():
    domains = pictogram_domains(per_class=4, seed=3)
    tasks = make_tasks(domains, split_at_random(domains, 0.25))
    clip, processor = CLIPModel.from_pretrained(small_clip()).eval(), load_processor(small_clip())
    classifier = MultiTaskClassifier(clip, processor, tasks).eval()
    for task in tasks:
        labels = torch.tensor([row["label"] for row in task.eval])
        found = classifier.predict([row["image"] for row in task.eval], task.name).probabilities.argmax(-1)
        assert 0.35 < (found == labels).float().mean() < 0.8, task.name  # 180 images: ± 0.04
