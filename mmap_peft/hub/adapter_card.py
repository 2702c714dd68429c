"""The README of an adapter's folder: `adapter_card_template.md` and the values that it shows."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import ModelCard, ModelCardData
from markupsafe import Markup
from peft import PeftConfig, PeftModel, get_peft_model_state_dict

from ..methods.pooled import PooledConfig, keeps_images
from ..tuner.checked import CheckedTuner
from ..version import __version__
from .markdown import escaped, link, literal, settings
from .repository import hub_id, shown_base


MARK = "<!-- Written by mmap_peft. Without this line, it is not written again. -->"


def adapter_card(
    config: PeftConfig,
    base_model: str | None,
    base_class: str,
    parameters: int,
    repo_id: str | None = None,
    places: Sequence[str] = ("",),
    tasks: int = 0,
    chosen: Mapping[str, float] | None = None,
) -> ModelCard:
    """A card that says which method and base an adapter is of, and how PEFT loads it.

    Args:
        config (`PeftConfig`), chosen (`Mapping[str, float]`, *optional*): the method and its settings, and those that
            take the place of some.
        base_model (`str`, *optional*), base_class (`str`): name or folder of the base, and the name of its class.
        parameters (`int`): the adapter's number of parameters.
        repo_id, places (*optional*): where the adapters will be, for the code example: the repository, and their
            folders in it.
        tasks (`int`): number of the tasks of the classifier that it belongs to; 0: it belongs to none.
    """
    base_id, known = hub_id(base_model), getattr(config, "method", None)  # PEFT's own configs have none
    name = shown_base(base_model) or base_class
    relation, tags = "adapter" if base_id else None, ["mmap_peft", "clip"]
    metadata = ModelCardData(base_model=base_id, base_model_relation=relation, library_name="peft", tags=tags)
    values = {
        "method": getattr(known, "name", type(config).__name__.removesuffix("Config")),
        "source": getattr(known, "source", None),
        "settings": settings(config, chosen),
        "parameters": parameters,
        "tasks": tasks,
        "of_peft": not isinstance(config, PooledConfig),
        "keeps_images": keeps_images(config),
        "base_name": name,
        "base": link(base_id, name),
        "base_class": base_class,
        "base_literal": literal(base_id or "path/to/the/base"),
        "repo_id": literal(repo_id or "path/or/name"),
        "places": [place and literal(place) for place in places],
        "versions": f"mmap_peft {__version__}, peft {peft.__version__}",
        "mark": Markup(MARK),
    }
    template = Path(__file__).with_name("adapter_card_template.md")
    return ModelCard.from_template(metadata, template_path=str(template), **escaped(values))


def replace_empty_cards() -> None:
    """Let `PeftModel.save_pretrained` write an `adapter_card` for the methods of this library, where PEFT would write
    a form with gaps. A README that somebody has written is updated as PEFT does it."""
    of_peft = PeftModel.create_or_update_model_card
    if getattr(of_peft, "writes_adapter_cards", False):
        return

    @functools.wraps(of_peft)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> Any:
        path = Path(output_dir) / "README.md"
        if not isinstance(self.base_model, CheckedTuner) or (path.exists() and not _is_replaced(path)):
            return of_peft(self, output_dir)
        base, (adapter, config) = self.get_base_model(), next(iter(self.peft_config.items()))
        state = get_peft_model_state_dict(self, adapter_name=adapter, save_embedding_layers=False)
        size = sum(tensor.numel() for tensor in state.values())
        places = ["" if name == "default" else name for name in self.peft_config]
        name = base.__dict__.get("name_or_path") or config.base_model_name_or_path
        return adapter_card(config, name, type(base).__name__, size, None, places).save(path)

    vars(create_or_update_model_card)["writes_adapter_cards"] = True
    PeftModel.create_or_update_model_card = create_or_update_model_card


def _is_replaced(path: Path) -> bool:
    """Whether a README is one of `adapter_card`, or the form that PEFT leaves empty."""
    text, form = ModelCard.load(path).text, ModelCard.from_template(ModelCardData()).text
    return MARK in text or text.strip().startswith(form.strip())
