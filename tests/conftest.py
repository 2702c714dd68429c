"""Small models and tasks that the tests share."""

from __future__ import annotations

import copy
import functools
import gc
import os
import tempfile


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask the network
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import datasets
import PIL.Image
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from mmap_peft import MultiTaskTrainingArguments, Task, load_processor, plot_grouping
from mmap_peft.data.pictograms import pictograms, small_clip
from mmap_peft.multitask import saving, trainer


datasets.disable_progress_bars()
gc.freeze()  # what is imported: accelerate collects garbage in each training, which took half a second


def pytest_collection_finish() -> None:
    """Every training collects garbage; it need not look through all the imported modules each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _quick():
    """No file has to outlast a power failure, and heat maps are drawn for tests with the fixture `pictures` only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        for module in (saving, trainer):
            patch.setattr(module, "plot_grouping", lambda grouping, path: PIL.Image.new("L", (1, 1)).save(path))
        yield


@pytest.fixture
def pictures(monkeypatch) -> None:
    """Heat maps are drawn, which takes as long as a short training."""
    for module in (saving, trainer):
        monkeypatch.setattr(module, "plot_grouping", plot_grouping)


@pytest.fixture(scope="session", autouse=True)
def _temporary_folder(tmp_path_factory):
    """Features that a run keeps for the next one are not kept for that of another test run. The path is short, since
    workers of a `DataLoader` have a socket in it, whose path may have at most 107 bytes."""
    tmp_path_factory.getbasetemp()  # not inside of it
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        yield


TEXT_WIDTH, VISION_WIDTH, TEXT_LAYERS, VISION_LAYERS = 32, 48, 3, 2


def tiny_clip(
    attention: str = "sdpa",
    seed: int = 0,
    text_width: int = TEXT_WIDTH,
    vision_width: int = VISION_WIDTH,
    intermediate: int = 64,
) -> CLIPModel:
    """A random CLIP whose biases and norms are no zeros and ones, so that a slip in them would show."""
    model, random_state = _tiny_clip(attention, seed, text_width, vision_width, intermediate)
    torch.set_rng_state(random_state)
    return copy.deepcopy(model)


@functools.cache
def _tiny_clip(
    attention: str, seed: int, text_width: int, vision_width: int, intermediate: int
) -> tuple[CLIPModel, torch.Tensor]:
    torch.manual_seed(seed)
    tokenizer = load_processor(small_clip()).tokenizer
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": text_width,
        "intermediate_size": intermediate,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 20,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": intermediate,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 16,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = CLIPModel._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.get_rng_state()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> str:
    """A folder that `CLIPModel.from_pretrained` and `load_processor` read."""
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip().save_pretrained(folder)
    load_processor(small_clip()).save_pretrained(folder)
    return str(folder)


def load_clip(folder: str) -> CLIPModel:
    """As `CLIPModel.from_pretrained(folder)`, in a third of its time."""
    return copy.deepcopy(_load_clip(str(folder)))


_load_clip = functools.cache(CLIPModel.from_pretrained)


@pytest.fixture
def clip(clip_folder) -> CLIPModel:
    return load_clip(clip_folder)


@pytest.fixture(scope="session")
def processor():
    return load_processor(small_clip())


@pytest.fixture(scope="session")
def inputs(processor) -> dict[str, torch.Tensor]:
    """Three images and three texts of unequal length, padded, without a mask."""
    texts = ["a photo of a bright sun.", "a very small snowflake on a wall", "this is a small chess knight on a wall"]
    ids = processor.tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
    return {"input_ids": ids, "pixel_values": torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="session")
def mask(processor, inputs) -> torch.Tensor:
    """The mask that goes with `inputs`."""
    ids = inputs["input_ids"]
    ends = (ids == processor.tokenizer.eos_token_id).int().argmax(dim=1, keepdim=True)
    return (torch.arange(ids.shape[1]) <= ends).long()


@pytest.fixture
def unpacked(monkeypatch) -> None:
    """Layers of 4 bits keep their weights as they were loaded.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 packs them anew at the first prediction. That fails for layers
    narrower than 64, as in small models, and lets no gradient through afterwards.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)


CLASSES = {"print": ["sun", "cloud", "star"], "photo": ["sun", "cloud", "star", "heart"]}


def make_task(style: str, classes: int, per_class: int = 4, name: str | None = None, **fields) -> Task:
    """A task of the first classes of pictograms in one style; the first half of the images train."""
    rows, names = _pictograms(style, per_class)
    rows = [dict(row) for row in rows if row["label"] < classes]
    train = [row for row in rows if row["index"] < per_class // 2]
    evaluation = [row for row in rows if row["index"] >= per_class // 2]
    return Task(name or style, names[:classes], **{"train": train, "eval": evaluation, **fields})


@functools.cache
def _pictograms(style: str, per_class: int) -> tuple[list[dict], list[str]]:
    data = pictograms(style, per_class)
    return list(data), data.features["label"].names


@pytest.fixture(scope="session")
def _tasks() -> list[Task]:
    return [make_task("print", 3), make_task("clipart", 5), make_task("photo", 4)]


@pytest.fixture
def tasks(_tasks) -> list[Task]:
    """Three tasks with 3, 5 and 4 classes."""
    return copy.deepcopy(_tasks)


@pytest.fixture
def arguments(tmp_path):
    """Makes settings of a short run; a float32 CPU, and no progress bar."""

    def make(**fields) -> MultiTaskTrainingArguments:
        short = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": 6,
            "max_steps": 6,
            "grouping_steps": 4,
            "grouping_snapshots": 2,
            "snapshot_images": 6,
            "save_steps": 2,
            "logging_steps": 1,
        }
        return MultiTaskTrainingArguments(**{**short, **fields})

    return make
