"""The README of a saved classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData


if TYPE_CHECKING:
    from ..multitask.classifier import MultiTaskClassifier


def model_card(classifier: MultiTaskClassifier) -> ModelCard:
    """A card that says which tasks the adapters are for, on which base, and how to load them."""
    data = ModelCardData(
        base_model=classifier.clip.name_or_path or None,
        library_name="peft",
        pipeline_tag="zero-shot-image-classification",
        tags=["mmap_peft", "clip", "multi-task"],
    )
    rows = [
        f"| {task.name} | {len(task.class_names)} | {' + '.join(classifier.routes[task.name])} |"
        for task in classifier.tasks.values()
    ]
    picture = classifier.grouping is not None and classifier.grouping.similarity is not None
    first = next(iter(classifier.tasks))
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {len(classifier.tasks)} tasks for `{classifier.clip.name_or_path or type(classifier.clip).__name__}`\n",
        "| task | classes | adapters |\n|---|---|---|",
        *rows,
        "\n![affinity of the tasks](grouping.png)" if picture else "",
        "\n```python\nfrom mmap_peft import MultiTaskClassifier\n",
        'classifier = MultiTaskClassifier.from_pretrained("<this repository>")',
        f"classifier.predict(images, task={first!r})\n```\n",
        "Prompts: Xin et al., *MmAP: Multi-modal Alignment Prompt for Cross-domain Multi-task Learning*, AAAI 2024.",
    ]
    return ModelCard("\n".join(lines))
