"""Which base and processor a classifier was made with, so that the same ones come back, or the difference is named."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
from annotated_types import Le
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from safetensors import safe_open
from transformers import AutoModel, PreTrainedModel

from ..checking import checked
from ..hub import repository
from ..tuner.fingerprint import Fingerprint
from .processes import is_sharded


QUANTISED = "quantised"
Pixels = dict[str, Annotated[int, Le(4096)]]  # what a processor resizes to needs memory


@dataclass
class BaseRecord:
    """A classifier's base and processor.

    Args:
        revision (`str`, *optional*): commit of the base on the Hub; `None`: its main branch, or a folder.
        subfolder (`str`): the base's folder in its repository or folder.
        dtype (`str`, *optional*): dtype of its weights, such as `"float16"`.
        weights (`str`, *optional*): SHA-256 of its weights, or `"quantised"`; `None`: they are offloaded.
        texts (`str`, *optional*): SHA-256 of the token ids of all class texts.
        image_processor (`dict`): settings of the image processor; empty if it cannot tell them.
        image_processor_class (`str`): name of its class.
    """

    revision: str | None = None
    subfolder: str = ""
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    weights: str | None = None
    texts: str | None = None
    image_processor: dict[str, Any] | None = None
    image_processor_class: str | None = None

    @classmethod
    def of(cls, classifier: Any) -> BaseRecord:
        """The base and processor of a classifier. The weights are read once, unless they change."""
        clip, image_processor = classifier.clip, classifier.processor.image_processor
        frozen = classifier.adapter_set.text_parameters()[0]
        if not is_sharded(classifier):  # else it is remembered from before
            fingerprint = Fingerprint(frozen)
            if classifier.base_cache is None or classifier.base_cache[0] != fingerprint:
                classifier.base_cache = fingerprint, (*_place(clip), weights_digest(clip, frozen))
        revision, subfolder, weights = classifier.base_cache[1] if classifier.base_cache else (None, "", None)
        texts = [classifier.texts.of(task, classifier.routes[name]) for name, task in classifier.tasks.items()]
        return cls(
            revision,
            subfolder,
            str(clip.dtype).removeprefix("torch."),
            weights,
            hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
            processor_settings(image_processor),
            type(image_processor).__name__,
        )

    @classmethod
    def from_dict(cls, values: Any) -> BaseRecord:
        """The record that `to_dict` made. Raises a `ValueError` if the values are not those of a record."""
        kinds = get_type_hints(cls, include_extras=True)
        values = checked({} if values is None else values, dict[str, Any], "base")
        return cls(
            **{name: checked(values[name], kind, f"base.{name}") for name, kind in kinds.items() if name in values}
        )

    to_dict = asdict

    def load_model(self, name: str, **download: Any) -> PreTrainedModel:
        """The base with this name, on the Hub or in a folder. Raises an `OSError` if it cannot be loaded."""
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        try:
            return AutoModel.from_pretrained(name, dtype=dtype, **self.place, **download)
        except OSError as error:
            at = "".join(f", {key} {value!r}" for key, value in self.place.items())
            reason = " ".join(str(error).split())[:200]
            raise OSError(
                f"The base {name!r}{at} cannot be loaded ({reason}); load it and write from_pretrained(..., "
                "model=base)."
            ) from error

    @property
    def place(self) -> dict[str, str]:
        """`revision` and `subfolder` as keywords of `from_pretrained`, if they are set."""
        return {name: value for name in ("revision", "subfolder") if (value := getattr(self, name))}

    def restore_image_processor(self, processor: Any) -> None:
        """Give the image processor of `processor` the saved settings.

        Raises:
            ValueError: the settings are not those of an image processor of this class.
        """
        own = processor.image_processor
        if self.image_processor_class is None or self.differences_of(own) is None:
            return
        known = processor_settings(own) or {}
        given = self.image_processor or {}
        kinds = {name: Pixels if name in ("size", "crop_size") else type(value) for name, value in known.items()}
        if type(own).__name__ != self.image_processor_class or not given or given.keys() - known.keys():
            raise ValueError(
                f"The classifier was saved with an image processor of the class {self.image_processor_class}, whose "
                f"settings do not fit the base's own, a {type(own).__name__}; write from_pretrained(..., "
                "processor=processor) with the processor of the training."
            )
        for name, value in given.items():
            checked(value, kinds[name] if known[name] is not None else Any, f"base.image_processor.{name}")
        processor.image_processor = type(own).from_dict(given)

    def differences_of(self, image_processor: Any) -> str | None:
        """The names of the settings that an image processor has different values of, or `None`."""
        if type(image_processor).__name__ != self.image_processor_class:
            return "class"
        saved, own = self.image_processor or {}, processor_settings(image_processor) or {}
        return ", ".join(name for name in sorted(saved | own) if saved.get(name) != own.get(name)) or None

    def differences(self, classifier: Any) -> Iterator[tuple[str, str]]:
        """What is different in a classifier: `"model"` or `"processor"`, and a sentence."""
        now = BaseRecord.of(classifier)
        name = classifier.clip.name_or_path or type(classifier.clip).__name__
        if self.dtype is not None and self.dtype != now.dtype:
            yield "model", f"The base {name} is in {now.dtype}, but the adapters were trained on one in {self.dtype}."
        elif self.dtype is not None and self.weights != now.weights:
            which = " One is quantised or offloaded." if None in (self.weights, now.weights) else ""
            yield (
                "model",
                f"The weights of the base {name} are not those that the adapters were trained on.{which}",
            )
        if self.texts is not None and self.texts != now.texts:
            yield "processor", "The tokenizer makes other tokens of the class texts than that of the training."
        names = self.image_processor_class and self.differences_of(classifier.processor.image_processor)
        if names:
            yield "processor", f"The image processor differs in its {names} from that of the training."


def processor_settings(image_processor: Any) -> dict[str, Any] | None:
    """The settings of an image processor; `None` if it cannot tell them."""
    try:
        return json.loads(image_processor.to_json_string())
    except (AttributeError, TypeError, ValueError):
        return None


def weights_digest(clip: PreTrainedModel, weights: list[torch.Tensor]) -> str | None:
    """SHA-256 of some weights of a CLIP, or `"quantised"`; `None` if they are offloaded."""
    if getattr(clip, "is_quantized", False):
        return QUANTISED  # its layers change their weights when they are first used
    if any(tensor.is_meta for tensor in weights):
        return None
    digest = hashlib.sha256()
    for tensor in weights:
        data = tensor.detach()
        digest.update(f"{data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _place(clip: PreTrainedModel) -> tuple[str | None, str]:
    """Revision and subfolder that a model was loaded from, which transformers does not keep."""
    name = clip.name_or_path
    if os.path.isdir(name):
        roots = {None: Path(name)}
    elif repository.hub_id(name):
        cache = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
        roots = {root.name: root for root in cache.glob("*")}
    else:
        return None, ""
    places = {
        (revision, "" if config.parent == root else config.parent.name): config.parent
        for revision, root in roots.items()
        for config in (root / "config.json", *sorted(root.glob("*/config.json")))
        if config.is_file() and any(config.parent.glob("*.safetensors"))
    }
    if len(places) == 1:
        return next(iter(places))
    return next((place for place, folder in places.items() if _holds(folder, clip)), (None, ""))


def _holds(folder: Path, clip: PreTrainedModel) -> bool:
    """Whether the weights in a folder are those of a model."""
    weights, found = {name.replace(".base_layer.", "."): weight for name, weight in clip.named_parameters()}, 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys() & weights.keys():
                found += 1
                own = weights[name]
                if own.is_meta or not torch.equal(tensors.get_tensor(name).to(own.dtype), own.cpu()):
                    return False
    return found > 0
