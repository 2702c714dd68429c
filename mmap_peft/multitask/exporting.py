"""One task of a classifier as an image classifier of its own: pixels in, probabilities out."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from ..tuner import inputs
from ..tuner.attention import SUPPORTED, PromptAttentionConfig, PromptStates
from ..tuner.layer import PromptedForward, key_and_value
from ..tuner.model import find_towers
from ..tuner.routing import RoutingHook


if TYPE_CHECKING:
    from .classifier import MultiTaskClassifier


class BakedLayer(nn.Module):
    """An encoder layer whose attention sees fixed prompts.

    Args:
        layer (`nn.Module`): the encoder layer, without hooks.
        prompts (`torch.Tensor`): (1, prompts, width).
    """

    def __init__(self, layer: nn.Module, prompts: torch.Tensor) -> None:
        super().__init__()
        self.layer, attention = layer, layer.self_attn
        attention.config = PromptAttentionConfig(attention.config)
        self.prompt_key, self.prompt_value = map(nn.Buffer, key_and_value(layer, prompts))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch = hidden_states.shape[0]  # unlike len(), open to any size when it is traced
        key, value = self.prompt_key.expand(batch, -1, -1), self.prompt_value.expand(batch, -1, -1)
        with self.layer.self_attn.config.joined_by(PromptStates(key, value, None)):
            return self.layer(hidden_states, *args, **kwargs)


class BakedTokens(nn.Module):
    """Puts fixed prompts among the tokens that a module gets, or takes them out again.

    Args:
        module (`nn.Module`): the embeddings, an encoder layer, or the encoder.
        prompts (`torch.Tensor`): (1, prompts, width).
        where (`str`): `"after"` the embeddings; `"instead"` of those that enter a layer; `"until"` the encoder ends.
    """

    def __init__(self, module: nn.Module, prompts: torch.Tensor, where: str) -> None:
        super().__init__()
        self.module, self.where, self.prompts = module, where, nn.Buffer(prompts)

    def _placed(self, tokens: torch.Tensor, skipped: int) -> torch.Tensor:
        prompts = self.prompts.expand(tokens.shape[0], -1, -1)
        return torch.cat([tokens[:, :1], prompts, tokens[:, 1 + skipped :]], dim=1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        count = self.prompts.shape[1]
        if self.where == "after":
            return self._placed(self.module(*args, **kwargs), 0)
        if self.where == "instead":
            return self.module(self._placed(args[0], count), *args[1:], **kwargs)
        output = self.module(*args, **kwargs)
        hidden = output.last_hidden_state
        output.last_hidden_state = torch.cat([hidden[:, :1], hidden[:, 1 + count :]], dim=1)
        return output


class TaskClassifier(nn.Module):
    """The image classifier of one task, in float32: pixels (batch, 3, H, W) in, probabilities (batch, classes) out.

    It holds copies of the vision tower, the keys and values of the task's prompts, and the features of its classes;
    nothing of the text tower, of PEFT or of other tasks, and nothing that trains. Made by
    `MultiTaskClassifier.export`.

    Args:
        classifier (`MultiTaskClassifier`): what to copy from; it stays as it is.
        task (`str`): name of one of its tasks.

    Attributes:
        class_names (`list[str]`): what the columns of the output stand for.
        metadata (`dict[str, str]`): what it takes to prepare pixels and to read the output: `task`, and as JSON
            `class_names`, `image_size`, `image_mean`, `image_std` and `image_processor`, all of its settings.

    Raises:
        ValueError: the base is quantised.
    """

    @torch.no_grad()
    def __init__(self, classifier: MultiTaskClassifier, task: str) -> None:
        super().__init__()
        clip = _merged(classifier)
        if any(not _is_float(parameter) for parameter in clip.parameters()):
            raise ValueError(
                "The base is quantised, but an exported task is float32; load the adapters onto float weights, for "
                "example MultiTaskClassifier.from_pretrained(folder, model=base.dequantize()), and export that."
            )
        self.vision_model = _without_prompts(clip).float()
        # A CLIP has it; a SigLIP's tower makes the features itself.
        projection = getattr(clip, "visual_projection", None)
        self.visual_projection = nn.Identity() if projection is None else copy.deepcopy(projection).float()
        _bake(find_towers(self.vision_model)["vision"], classifier, task)
        with classifier.evaluating():
            weight, bias = classifier._class_weights([task])
        self.class_weight = nn.Buffer(clip.logit_scale.float().exp() * weight.float())
        self.class_bias = nn.Buffer(bias.float().clone()) if isinstance(bias, torch.Tensor) else None
        self.requires_grad_(False).eval()

        self.class_names = list(classifier.tasks[task].class_names)
        self.image_size: int = self.vision_model.config.image_size
        processor = classifier.processor.image_processor
        fields = {
            "class_names": self.class_names,
            "image_size": self.image_size,
            "image_mean": processor.image_mean,
            "image_std": processor.image_std,
            "image_processor": json.loads(processor.to_json_string()),
        }
        self.metadata = {"task": task, **{name: json.dumps(value) for name, value in fields.items()}}

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        image = self.visual_projection(self.vision_model(pixel_values).pooler_output)
        return F.linear(F.normalize(image, dim=-1), self.class_weight, self.class_bias).softmax(dim=-1)


def _is_float(parameter: torch.Tensor) -> bool:
    # Quantised weights are whole numbers, or a tensor class of their own that calls itself float.
    return parameter.is_floating_point() and type(parameter.data) is torch.Tensor


def _merged(classifier: MultiTaskClassifier) -> nn.Module:
    """The CLIP; if it has adapters that are no prompts, a copy of it in which they are part of the weights."""
    if classifier.prompted or classifier.model is classifier.clip:
        return classifier.clip
    model = copy.deepcopy(classifier.model)
    if not any(classifier.routes.values()):  # zero-shot
        return model.unload()
    try:
        return model.merge_and_unload()
    except NotImplementedError:  # a nonlinearity: its layers stay
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                _rename(layer, model.active_adapter, "tuned")
        return model.get_base_model()


def _rename(layer: BaseTunerLayer, adapter: str, name: str) -> None:
    """Name an adapter anew: `global` is a word of Python's, which the code that torch.export writes cannot use."""
    for attribute in layer.adapter_layer_names:
        modules = getattr(layer, attribute)
        modules[name] = modules.pop(adapter)
    layer.set_adapter(name)


def _without_prompts(clip: nn.Module) -> nn.Module:
    """A copy of the vision tower as it was before it got prompts."""
    container = getattr(clip, "mmap", None)
    tower = copy.deepcopy(clip.vision_model, {id(container): container})  # the hooks' container is not copied along
    encoder = find_towers(tower)["vision"].encoder
    inputs.detach(tower)
    RoutingHook.detach(encoder)
    for layer in encoder.layers:
        if isinstance(layer.__dict__.get("forward"), PromptedForward):
            PromptedForward.detach(layer)
    if tower.config._attn_implementation not in SUPPORTED:
        tower.set_attn_implementation("sdpa")
    return tower


def _bake(tower: nn.Module, classifier: MultiTaskClassifier, task: str) -> None:
    """Put a task's prompts into a copy of the vision tower."""
    container = getattr(classifier.clip, "mmap", None)
    if container is None or container.disable_adapters:
        return
    routing, layers = container.route([classifier.routes[task]]), tower.encoder.layers
    tokens = [layer.layer_norm1.weight[None, None] for layer in layers]
    found = [container.routed(routing, "vision", index, token) for index, token in enumerate(tokens)]
    rides = container.rides(routing)
    for index, routed in enumerate(found):
        if routed is None:
            continue
        prompts = routed.prompts.float()
        if not rides:
            layers[index] = BakedLayer(layers[index], prompts)
        elif index:
            layers[index] = BakedTokens(layers[index], prompts, "instead")
        else:
            tower.embeddings = BakedTokens(tower.embeddings, prompts, "after")
    if rides and found[0] is not None:
        tower.encoder = BakedTokens(tower.encoder, found[0].prompts.float(), "until")


def export(
    classifier: MultiTaskClassifier, task: str, format: str = "torch", path: str | os.PathLike | None = None
) -> TaskClassifier | Path:
    """As `MultiTaskClassifier.export`."""
    classifier.check_task(task)
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is none that a task can be exported to; write 'torch' or 'onnx'.")
    if format == "onnx":
        _check_packages()
        path = "." if path is None else path
    target = None if path is None else _target(Path(path), classifier.tasks[task].adapter, format)
    exported = TaskClassifier(classifier, task)
    if target is not None:
        _write(exported, target, format)
    return exported if format == "torch" else target


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"format='onnx' needs the package {' and '.join(missing)}, which is not there; write "
            "pip install mmap_peft[onnx]."
        )


def _target(path: Path, adapter: str, format: str) -> Path:
    suffix = FORMATS[format][0]
    path = path / f"{adapter}{suffix}" if path.is_dir() else path
    if path.suffix != suffix:
        raise ValueError(
            f"path={str(path)!r} is no folder that is there, and no file for format={format!r}; let it end in "
            f"{suffix!r}."
        )
    return path


def _write(exported: TaskClassifier, target: Path, format: str) -> None:
    on_cpu = copy.deepcopy(exported).cpu()  # a file needs no accelerator; the caller's module stays where it is
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".exporting-") as folder:
        beside = Path(folder) / target.name
        FORMATS[format][1](on_cpu, beside)
        # ONNX keeps weights of 2 GB and more in a file of their own; the model, which names it, comes last.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == beside):
            os.replace(file, target.parent / file.name)


def _example(exported: TaskClassifier) -> torch.Tensor:
    # Two, since a batch of one would be taken for the only size there is.
    return torch.zeros(2, 3, exported.image_size, exported.image_size)


def _write_torch(exported: TaskClassifier, path: Path) -> None:
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(exported, (_example(exported),), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    torch.export.save(program, path, extra_files=exported.metadata)


def _write_onnx(exported: TaskClassifier, path: Path) -> None:
    program = torch.onnx.export(
        exported,
        (_example(exported),),
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["probabilities"],
        dynamic_shapes={"pixel_values": {0: "batch"}},
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces here
    program.model.metadata_props.update(exported.metadata)
    program.save(path)


FORMATS = {"torch": (".pt2", _write_torch), "onnx": (".onnx", _write_onnx)}
