"""From class names to token ids."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..checking import shortened
from ..prompts.base import PromptConfig
from ..tuner.assemble import Route
from .class_names import as_tuple
from .task import Task


INIT_WORDS = "a photo of a"  # CoOp and MaPLe start from these if they have no more than four prompts


class TextBatch(NamedTuple):
    """The texts of some tasks.

    Attributes:
        ids: (rows, tokens), padded.
        tasks: for each row, number of its task.
        classes: for each row, number of its class.
        counts: for each class of each task, how many rows it has.
        constants: for each chunk of rows, by its start and end, the `constants` of `shared_text_features`.
    """

    ids: torch.Tensor
    tasks: list[int]
    classes: list[int]
    counts: list[int]
    constants: dict[tuple[int, int], dict]


class ClassTexts:
    """Tokenizes the texts of each task's classes once.

    Where prompts replace words (CoOp, IVLP, MaPLe), a text has a word or more for each prompt before the class name:
    those of the task's template, or else placeholders, as in CoOp: `"X X X X cat."`.

    `config` is the config of the text tower, `prompts` that of the adapters.
    """

    def __init__(self, tokenizer: Any, config: Any, prompts: PromptConfig | None) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.placeholders = getattr(prompts, "placeholders", 0)
        self.names_last = getattr(prompts, "position", "end") == "end"
        self._ids: dict[Hashable, list[list[list[int]]]] = {}
        self._batch: tuple[list, TextBatch] | None = None  # the last one

    def first_words(self, count: int) -> list[int]:
        """Token ids of the words that this many prompts start from; none if there are too few words."""
        words = self._words(INIT_WORDS)
        return words[:count] if count <= len(words) else []

    def of(self, task: Task, route: Route) -> list[list[list[int]]]:
        """Token ids of the texts of each class. Tasks with the same texts get the same list object. A text with more
        tokens than the tower has positions raises a `ValueError`."""
        count = len(route) * self.placeholders
        texts = tuple((name, as_tuple(texts)) for name, texts in task.class_texts.items())
        key = count, tuple(task.class_names), as_tuple(task.template), texts
        if key not in self._ids:
            ids = [self._tokenize(task, texts) for texts in self._worded(task, count)]
            # A list that another thread has set stays, since features are cached by the list's id().
            self._ids.setdefault(key, next((known for known in list(self._ids.values()) if known == ids), ids))
        return self._ids[key]

    def without_memory(self) -> ClassTexts:
        """A copy that remembers no texts, for those that are encoded only once."""
        other = copy.copy(self)
        other._ids, other._batch = {}, None
        return other

    def forget_batch(self) -> None:
        """Make the next batch anew, and what was computed of its texts."""
        self._batch = None

    def check_templates(self, task: Task, route: Route) -> None:
        """Raise a `ValueError` if a task's templates would not be used, since prompts have no words to replace."""
        count = len(route) * self.placeholders
        if not self._uses_templates(task, count):
            instead = "leave `templates` out"
            if self.names_last:
                instead += f", or give templates with {count} words or more before {{}}"
            raise ValueError(
                f"Prompts of task {shortened(task.name)} replace {count} words of a text, which `templates` "
                f"{'do not have' if self.names_last else 'cannot have around the class name'}; {instead}."
            )

    def batch(self, tasks: Sequence[Task], routes: Sequence[Route]) -> TextBatch:
        """The texts of some tasks in one batch."""
        ids = [self.of(task, route) for task, route in zip(tasks, routes)]
        last = self._batch
        if last is None or last[0] != ids:
            last = self._batch = ids, self._padded(ids)  # usually that of the next step, too
        return last[1]

    def _padded(self, by_task: list[list[list[list[int]]]]) -> TextBatch:
        rows = [
            (torch.tensor(ids), number, label)
            for number, classes in enumerate(by_task)
            for label, texts in enumerate(classes)
            for ids in texts
        ]
        ids, numbers, labels = (list(column) for column in zip(*rows))
        # Padding comes after the end of a text, which a causal tower does not attend to, so no mask is needed. SigLIP
        # is not causal: it was trained on texts padded to the full length, and uses the last position.
        padding = self.tokenizer.pad_token_id
        if self.config.model_type.startswith("siglip"):
            ids[0] = F.pad(ids[0], (0, self.config.max_position_embeddings - len(ids[0])), value=padding)
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding)
        return TextBatch(padded, numbers, labels, [len(texts) for classes in by_task for texts in classes], {})

    def _words(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _uses_templates(self, task: Task, prompts: int) -> bool:
        before = min(len(self._words(text.partition("{}")[0].strip())) for text in as_tuple(task.template))
        return not prompts or (before >= prompts and self.names_last and not task.class_texts)

    def _worded(self, task: Task, prompts: int) -> list[tuple[str, ...]]:
        if self._uses_templates(task, prompts):
            return task.texts
        words = " ".join(["X"] * prompts)
        return [
            tuple(f"{words} {text}" for text in texts) if name in task.class_texts else (f"{words} {name}.",)
            for name, texts in zip(task.class_names, task.texts)
        ]

    def _tokenize(self, task: Task, texts: Sequence[str]) -> list[list[int]]:
        tokenized = self.tokenizer(list(texts), verbose=False)["input_ids"]
        positions = self.config.max_position_embeddings
        for text, ids in zip(texts, tokenized):
            if len(ids) > positions:
                fewer = f", or fewer than num_prompts={self.placeholders}" if self.placeholders else ""
                raise ValueError(
                    f"Text {shortened(text)} of task {shortened(task.name)} has {len(ids)} tokens with start and end, "
                    f"but the text tower has {positions} positions; write a shorter template, class name or class "
                    f"text{fewer}."
                )
        return tokenized
