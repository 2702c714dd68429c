"""One frozen CLIP that classifies the images of many tasks."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from huggingface_hub import CommitInfo, snapshot_download
from peft import PeftConfig
from transformers import PreTrainedModel

from ..checking import checked
from ..export import files
from ..export.merging import merged
from ..export.task_classifier import TaskClassifier
from ..keywords import check_keywords
from ..prompts.method import check_config
from ..tuner.assemble import Route
from . import loading, saving
from .class_texts import ClassTexts
from .decoding import decode_all
from .inputs import check_inputs
from .other_classes import LARGEST_CACHE, Choice
from .output import Prediction, RoutedPrediction
from .overlap import Overlap
from .peft_adapters import make_adapters
from .record import TrainingRecord
from .task import Task
from .task_caches import TaskCaches
from .text_features import TextFeatureCache


class MultiTaskClassifier(TaskCaches):
    """A frozen CLIP, its adapters, and the tasks that use them.

    A task has no decoder: the text features of its class names classify its image features. The adapters that it uses
    are its *route*. At first every task uses the adapter `"global"`. With prompts, after `set_grouping`, a task uses
    those of its group and its own, in this order: `("group_0", "art")`. Other methods have one adapter for all tasks,
    since two cannot be joined; those on pooled features, such as linear probes, are one for each task.

    Several threads may predict at once, except without a task where adapters change the CLIP and are no prompts.

    Args:
        model (`PreTrainedModel`): a CLIP with `get_text_features` and `get_image_features`. Adapters are added to it,
            so it can be the base of only one classifier.
        processor: its processor, with `tokenizer` and `image_processor`.
        tasks (`Sequence[Task]`): the tasks.
        config (`PeftConfig`, *optional*): the method: prompts (`MmAPConfig()`), one of PEFT's (`lora_config()`), or
            another of this library (`BitFitConfig()`). Without it there are no adapters: zero-shot.
        seed (`int`): seed of the adapters' initial values.
        text_chunk (`int`, *optional*): largest number of texts, of any tasks, that are encoded at a time, so that
            memory does not grow with the number of classes. Training then encodes texts again in the backward pass.
            Results are the same, but for rounding. `None`: as many as fit into a quarter of the device's
            memory, see `texts_at_once`; under `torch.compile` and FSDP, all. FSDP takes no other value.

    Raises:
        ValueError: no task, two tasks of the same name, a text that is too long for the text tower, settings that do
            not fit the model, or a model that has adapters already. The model is left as it was.
    """

    main_input_name = "pixel_values"  # a Trainer passes it to compute_metrics if include_for_metrics says so

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        tasks: Sequence[Task],
        config: PeftConfig | None = None,
        seed: int = 0,
        text_chunk: int | None = None,
    ) -> None:
        super().__init__()
        check_inputs(model, processor, tasks, seed, text_chunk)
        check_config(config)
        self.processor, self.text_chunk = processor, text_chunk
        self.tasks, self.routes, self.grouping = {}, {}, None
        self.trained_adapters, self.record = set(), TrainingRecord()
        config = copy.deepcopy(config)
        self.texts = ClassTexts(processor.tokenizer, model.config.text_config, config)
        if config is not None and self.texts.placeholders and config.init_ids is None:
            config.init_ids = self.texts.first_words(config.num_prompts)
        self._text_cache, self._frozen_cache = TextFeatureCache(), TextFeatureCache()
        self._other_texts, self._evaluating = TextFeatureCache(LARGEST_CACHE), Overlap()
        self.base_cache = None  # of `BaseRecord.of`
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            with torch.inference_mode(False):  # parameters that are made in inference mode cannot train
                self.adapter_set = make_adapters(model.requires_grad_(False), config, seed)
                for task in tasks:
                    route = self.adapter_set.first_route(task.adapter)
                    self.check_new_task(task, route)
                    self._enter(task, route)
        except BaseException:
            if "adapter_set" in self._modules:
                self.unload()
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            raise

    def _enter(self, task: Task, route: Route, seed: int | None = None) -> None:
        def text_features() -> torch.Tensor:
            with torch.no_grad(), self.evaluating():
                return self._encode({task.name: (task, ())})[0]

        with torch.inference_mode(False):  # parameters that are made in inference mode cannot train
            self.adapter_set.enter(task.adapter, len(task.class_names), text_features, seed)
        self.tasks = {**self.tasks, task.name: task}
        self.routes = {**self.routes, task.name: route}

    def check_task(self, task: str) -> None:
        """Raise a `ValueError` if there is no task of this name."""
        if task not in self.tasks:
            raise ValueError(f"{task!r} is none of the tasks; write one of {', '.join(self.tasks)}.")

    @overload
    def predict(
        self, images: Any, task: str | Sequence[str], class_names: Any = ..., templates: Any = ...
    ) -> Prediction: ...

    @overload
    def predict(
        self, images: Any, task: None = None, class_names: Any = ..., templates: Any = ...
    ) -> RoutedPrediction: ...

    @torch.no_grad()
    def predict(
        self,
        images: Any,
        task: str | Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        templates: str | Sequence[str] | None = None,
    ) -> Prediction | RoutedPrediction:
        """Classify images, all in one batch.

        Args:
            images: one image or several: a list, a generator, a column of a data set, or an array or tensor (images,
                height, width, channels). An image is a path, the bytes of a file, an open file, a PIL image, an array
                or a tensor, as [`decode`] says.
            task (`str` or a list of them, *optional*): name of their task, or of the task of each. `None`: the tasks
                are found by `prototypes`. This uses the plain base for a moment, so with adapters that change the
                CLIP and are no prompts, no other thread may predict meanwhile.
            class_names (`Sequence[str]`, *optional*): two or more classes to choose among, in the order of the answer,
                instead of the task's, or without `task` of every task. They are cleaned as those of a `Task`. Texts of
                other classes are encoded with the task's adapters, and kept for later calls with the same names.
            templates (`str` or a sequence of them, *optional*): instead of the task's template and `class_texts`. A
                class's feature is the normalised mean of the normalised features of its texts (Radford et al., ICML
                2021, section 3.1.4).

        Returns:
            `Prediction`, or `RoutedPrediction` without `task`.

        Raises:
            ValueError: an image that cannot be read, with its position; a name that no task has, or another number of
                names than of images; no `task` and no prototypes of a task; names or templates that are no texts, the
                same, empty or too long; other classes for linear probes or with `num_classes`, which have parameters
                of their own for each class; or probabilities that are not finite.
        """
        checked(task, str | list[str] | tuple[str, ...] | None, "task")
        choice, images = Choice.of(class_names, templates), decode_all(images)
        return self._predict_routed(images, choice) if task is None else self._predict_given(images, task, choice)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `tasks.json`, a model card, the prototypes if there are any, and a folder for each adapter, which is a
        PEFT adapter of its own.

        All files are replaced at once: if the process ends meanwhile, the folder holds the old adapters, or the new.

        Raises:
            ValueError: a zero-shot classifier, or weights that are not finite.
            OSError: a file cannot be written. The folder holds what it held before.
        """
        saving.save(self, Path(folder))

    def load_adapters(self, folder: str | os.PathLike, verify: bool = True) -> None:
        """Take routes, grouping, all adapters, and prototypes if it has any, from a folder that `save_pretrained`
        wrote.

        Args:
            folder (`str`): the folder.
            verify (`bool`): compare the files with the SHA-256 in `tasks.json`.

        Raises:
            ValueError: the folder is of other tasks, or a file is missing or damaged; nothing has changed then.
        """
        loading.load(self, Path(folder), verify)

    @classmethod
    @check_keywords(snapshot_download, without=("repo_id", "repo_type", "allow_patterns", "dry_run"))
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        model: PreTrainedModel | None = None,
        processor: Any = None,
        subfolder: str | None = None,
        text_chunk: int | None = None,
        verify: bool = True,
        **download: Any,
    ) -> MultiTaskClassifier:
        """Load a classifier from a folder or from the Hub.

        Args:
            name_or_path (`str`): a folder that `save_pretrained` wrote, or the id of a repository on the Hub.
            model (`PreTrainedModel`, *optional*): the base. `None`: the one that was trained on, by its name or path.
            processor (*optional*): the base's processor. `None`: the one that the base's name or path gives.
            subfolder (`str`, *optional*): the classifier's folder inside `name_or_path`.
            text_chunk (`int`, *optional*): as for the class.
            verify (`bool`): compare the files with the SHA-256 in `tasks.json`, and the base and its processor with
                those of the training. `False`: for adapters that were copied in by hand, or another base on purpose.
                A `model` or `processor` that is given and differs causes a warning only.
            download: as for `huggingface_hub.snapshot_download`: `revision`, `force_download` and others; `token`,
                `cache_dir` and `local_files_only` are used for the base and its processor, too.

        Raises:
            TypeError: an unknown keyword.
            ValueError: a name or subfolder that cannot be one, a file that is missing or damaged, or a base that was
                not given and is not found, or is another one than in training.
            OSError: the base cannot be loaded, or the Hub has no such repository or revision, or cannot be reached.
        """
        return loading.from_pretrained(cls, name_or_path, model, processor, subfolder, text_chunk, verify, **download)

    def export(
        self,
        task: str,
        format: str = "torch",
        path: str | os.PathLike | None = None,
        class_names: Sequence[str] | None = None,
        templates: str | Sequence[str] | None = None,
    ) -> TaskClassifier | Path:
        """Make an image classifier of one task: pixels (batch, 3, H, W) in, probabilities (batch, classes) out.

        It is a copy in float32, without the text tower and other tasks: prompts and text features become constants,
        and adapters of other methods are merged into the weights, except bottleneck adapters, which stay layers.

        ```python
        served = classifier.export("print")  # a module that needs only torch
        session = onnxruntime.InferenceSession(classifier.export("print", format="onnx"))
        ```

        Args:
            task (`str`): name of the task.
            format (`str`): `"torch"` returns a `TaskClassifier`, and with `path` also writes a file for
                `torch.export.load`. `"onnx"` writes a file for any ONNX runtime and returns its path; it needs
                `pip install mmap_peft[onnx]`. Both files take batches of any size, call the input `pixel_values`, and
                hold `TaskClassifier.metadata`: as an ONNX model's metadata, or as the `extra_files` of
                `torch.export.load`.
            path (`str`, *optional*): a file that ends in `.pt2` or `.onnx`, or a folder for one that is named after
                the task's adapter. `None`: nothing is written for torch, and for ONNX the current folder. An older
                file is replaced once the new one is whole.
            class_names, templates (*optional*): as for `predict`.

        Raises:
            ValueError: no such task or format, a path with another ending, or class names or templates as for
                `predict`.
            ImportError: ONNX's packages are not installed.
        """
        self.check_task(task)
        choice = Choice.of(class_names, templates)
        return files.export(lambda: self._task_classifier(task, choice), self.tasks[task].adapter, format, path)

    @torch.no_grad()
    def _task_classifier(self, task: str, choice: Choice | None) -> TaskClassifier:
        route = self.current_routes[task]
        clip = self.clip if self.uses_prompts else merged(self.model, bool(route))
        with self.evaluating():
            (weight, bias), classes = self.chosen_weights(task, choice)
            prompts, part = self.adapter_set.prompts("vision", [route]), self.adapter_set.part(route)
        weight, bias = self.logit_scale().float() * weight.float(), bias if isinstance(bias, torch.Tensor) else None
        processor, columns = self.processor.image_processor, None if classes.are_others else classes.columns
        return TaskClassifier(clip, prompts, weight, bias, task, classes.class_names, processor, part, columns)

    @check_keywords(saving.push, without=("classifier", "card_folder"))
    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Upload what `save_pretrained` writes to a repository on the Hub, in one commit. Files that are there already
        are not uploaded again, and those of an earlier push that this one lacks, such as a group's, are deleted.

        Args:
            repo_id (`str`): for example `"me/clip-mmap-office-home"`; it is created if it does not exist.
            options: `token`; `private`, for a new repository; `revision`, a branch, created if it does not exist;
                `subfolder`, a folder inside; `parent_commit`, the full id of the commit that the branch must still be
                at; `commit_message`.

        Returns:
            `CommitInfo`: its `oid` is the commit's id, its `commit_url` the address.

        Raises:
            TypeError: an unknown keyword.
            ValueError: a name or subfolder that cannot be one.
            OSError: the Hub refused, the connection broke, or the branch has a newer commit than `parent_commit`. The
                branch has not changed then.
        """
        return saving.push(self, repo_id, **options)
