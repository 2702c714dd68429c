"""Text features of the frozen CLIP, which training compares those of the adapters with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .processes import is_sharded
from .task import Task
from .task_forward import TaskForward
from .text_features import TextFeatureCache


class FrozenFeatures(TaskForward):
    """The text features of a classifier without its prompts. Base of `MultiTaskClassifier`."""

    _frozen_cache: TextFeatureCache

    def frozen_text_features(
        self, names: Sequence[str], templates: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Unit text features of each of these tasks' classes by the plain base, (classes, dim), by task name.

        The features of several texts of a class are averaged and then scaled to length 1, as in PromptSRC's code. They
        are computed again only if the base has changed.

        Args:
            names (`Sequence[str]`): names of the tasks.
            templates (`Sequence[str]`, *optional*): texts of all classes but those with texts of their own. `None`:
                the template of each task.

        Raises:
            ValueError: a text is too long for the text tower.
        """
        tasks = {name: self.tasks[name] for name in names}
        if templates is not None:
            tasks = {
                name: Task(name, task.class_names, template=tuple(templates), class_texts=task.class_texts)
                for name, task in tasks.items()
            }
        keys = {name: id(self.texts.of(task, ())) for name, task in tasks.items()}

        def encode(missing: Sequence[str]) -> list[torch.Tensor]:
            distinct = {keys[name]: tasks[name] for name in missing}
            with self.evaluating():
                found = {key: self._frozen(task) for key, task in distinct.items()}
            return [found[keys[name]] for name in missing]

        if is_sharded(self):  # all processes must run a sharded tower together
            self._frozen_cache.clear()
        return dict(zip(names, self._frozen_cache(keys, self._fingerprint(of_adapters=False), encode)))

    def _frozen(self, task: Task) -> torch.Tensor:
        batch, parts = self.texts.batch([task], [()]), []
        for ids in batch.ids.split(self._texts_at_once(batch)):
            numbers = torch.zeros(len(ids), dtype=torch.long)
            prompts = self.adapter_set.prompts("text", [()], text=numbers, classes=numbers)
            keywords = {} if prompts is None else {"prompts": prompts}
            parts.append(self.clip.get_text_features(ids.to(self.device), **keywords).pooler_output)
        means = [part.mean(dim=0) for part in torch.cat(parts).split(batch.counts)]
        return F.normalize(torch.stack(means), dim=-1)
