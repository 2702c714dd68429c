import copy
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import SiglipConfig, SiglipModel

from mmap_peft import (
    CoOpConfig,
    IVLPConfig,
    MaPLeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    TaskGrouping,
    VPTConfig,
)
from mmap_peft.data.pictograms import draw

from ..conftest import tiny_clip
from ..tuner.test_families import build


CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5)
IMAGES = [draw(style, "sun", number) for number, style in enumerate(["print", "clipart", "photo", "sketch", "photo"])]


def make(clip, processor, tasks, config=CONFIG):
    classifier = MultiTaskClassifier(clip, processor, tasks, config)
    if config is not None:
        classifier.set_grouping(TaskGrouping(list(classifier.tasks), [["print", "photo"], ["clipart"]]))
    return classifier


@pytest.fixture
def classifier(clip, processor, tasks):
    return make(clip, processor, tasks)


def pixels(metadata, images=IMAGES):
    """Pixels made of images of the right size with nothing but numpy and what the file says."""
    size, mean, std = (json.loads(metadata[name]) for name in ("image_size", "image_mean", "image_std"))
    assert all(image.size == (size, size) for image in images)
    array = (np.stack([np.asarray(image) for image in images]) / 255.0 - mean) / std
    return array.transpose(0, 3, 1, 2).astype(np.float32)


def run_torch(exported):
    return exported(torch.tensor(pixels(exported.metadata))).numpy()


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("task", "classes"), [("clipart", 5), ("photo", 4)])
def test_onnx_needs_its_file_only_and_agrees(task, classes, classifier, tmp_path):
    expected = classifier.predict(IMAGES, task=task).probabilities
    path = classifier.export(task=task, format="onnx", path=tmp_path)
    assert [path] == list(tmp_path.iterdir()) == [tmp_path / f"{task}.onnx"]
    session = onnxruntime.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["task"] == task
    assert json.loads(metadata["class_names"]) == classifier.tasks[task].class_names
    assert json.loads(metadata["image_processor"]) == json.loads(classifier.processor.image_processor.to_json_string())
    assert [(node.name, node.shape) for node in session.get_outputs()] == [("probabilities", ["batch", classes])]
    for count in (1, 5):
        found = session.run(None, {"pixel_values": pixels(metadata)[:count]})[0]
        assert found.dtype == np.float32 and found.shape == (count, classes)
        close(found, expected[:count])


RIDING = {
    "coop": CoOpConfig(num_prompts=2, init_std=0.5),
    "vpt": VPTConfig(num_prompts=2, init_std=0.5),
    "ivlp": IVLPConfig(num_prompts=2, num_vision_prompts=3, vision_depth=1, init_std=0.5),
    "maple": MaPLeConfig(num_prompts=2, init_std=0.5),
}


@pytest.mark.parametrize("method", RIDING)
def test_prompts_that_ride_on_are_baked_too(method, clip, processor, tasks):
    classifier = make(clip, processor, tasks, RIDING[method])
    close(run_torch(classifier.export("photo")), classifier.predict(IMAGES, "photo").probabilities)


def test_prompts_that_ride_on_in_onnx_and_siglip(processor, tasks, tmp_path):
    special = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = build("siglip", vocab_size=len(processor.tokenizer), **special)
    classifier = make(model, processor, tasks, RIDING["ivlp"])
    path = classifier.export("photo", format="onnx", path=tmp_path)
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, {"pixel_values": pixels(session.get_modelmeta().custom_metadata_map)})[0]
    close(found, classifier.predict(IMAGES, "photo").probabilities)


@pytest.mark.parametrize("task", ["clipart", "photo"])
def test_torch_agrees(task, classifier):
    expected = classifier.predict(IMAGES, task=task).probabilities
    exported = classifier.export(task=task, format="torch")
    assert exported.class_names == classifier.tasks[task].class_names
    close(run_torch(exported), expected)
    one = torch.tensor(pixels(exported.metadata, IMAGES[:1]))
    assert not exported(one).requires_grad
    close(exported(one), expected[:1])
    close(copy.deepcopy(exported)(one), expected[:1])


def test_a_torch_file_runs_where_torch_alone_is(classifier, tmp_path):
    expected = classifier.predict(IMAGES, task="clipart").probabilities
    path = tmp_path / "new" / "served.pt2"
    exported = classifier.export("clipart", path=path)
    np.save(tmp_path / "pixels.npy", pixels(exported.metadata))
    script = f"""
import json, sys, numpy, torch
metadata = {{"class_names": ""}}
served = torch.export.load({str(path)!r}, extra_files=metadata).module()
pixels = torch.tensor(numpy.load({str(tmp_path / "pixels.npy")!r}))
assert not {{"mmap_peft", "transformers", "peft"}} & set(sys.modules)
print(json.dumps([json.loads(metadata["class_names"]), served(pixels[:1]).tolist(), served(pixels).tolist()]))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    names, one, five = json.loads(output.stdout)
    assert names == exported.class_names
    close(one, expected[:1])
    close(five, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("depth", [None, 1])
def test_attentions_and_depths(attention, depth, processor, tasks):
    config = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5, depth=depth)
    classifier = make(tiny_clip(attention), processor, tasks, config)
    expected = classifier.predict(IMAGES, task="photo").probabilities
    close(run_torch(classifier.export("photo")), expected)
    with classifier.zero_shot():
        assert (classifier.predict(IMAGES, task="photo").probabilities - expected).abs().max() > 1e-3


def test_without_prompts(classifier, processor, tasks):
    plain = make(tiny_clip(), processor, tasks, config=None)
    expected = plain.predict(IMAGES, task="photo").probabilities
    close(run_torch(plain.export("photo")), expected)
    with classifier.zero_shot():
        close(run_torch(classifier.export("photo")), expected)
    with classifier.model.disable_adapter():
        close(run_torch(classifier.export("photo")), expected)


def test_half_precision_is_exported_as_float32(processor, tasks):
    classifier = make(tiny_clip().bfloat16(), processor, tasks)
    exported = classifier.export("photo")
    assert {tensor.dtype for tensor in exported.state_dict().values()} == {torch.float32}
    half = exported.vision_model.embeddings.patch_embedding.weight.bfloat16()
    assert torch.equal(half, classifier.clip.vision_model.embeddings.patch_embedding.weight)


def test_a_siglip_is_exported_too(processor, tasks):
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    shared = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "max_position_embeddings": 20, **shared, **ids}
    vision = {"hidden_size": 32, "image_size": 48, "patch_size": 16, **shared}
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    classifier = make(siglip, processor, tasks)
    close(run_torch(classifier.export("photo")), classifier.predict(IMAGES, task="photo").probabilities)


def test_prompts_and_texts_cost_no_work(classifier, tmp_path):
    """With prompts a graph holds the same layers and products as without: their keys and values are constants."""

    def work():
        graph = onnx.load(classifier.export("photo", format="onnx", path=tmp_path)).graph
        return sorted(node.op_type for node in graph.node if node.op_type in ("MatMul", "Gemm", "LayerNormalization"))

    with_prompts = work()
    with classifier.zero_shot():
        assert with_prompts == work()


def test_a_file_holds_the_vision_tower_and_hardly_more(classifier, tmp_path):
    clip = classifier.clip
    exported = classifier.export("photo")
    expected = {f"vision_model.{name}" for name in clip.vision_model.state_dict()}
    expected |= {"visual_projection.weight", "class_weight"}
    found = {name.replace(".layer.", ".") for name in exported.state_dict()}
    extra = {f"vision_model.encoder.layers.{index}.prompt_{kind}" for index in (0, 1) for kind in ("key", "value")}
    assert found == expected | extra
    assert not any(type(module).__module__.startswith("peft") for module in exported.modules())
    path = classifier.export("photo", format="onnx", path=tmp_path)
    weights = sum(tensor.nbytes for tensor in exported.state_dict().values())
    assert weights < path.stat().st_size < weights + 60_000
    assert b"site-packages" not in path.read_bytes()


def test_the_classifier_stays_as_it_is_and_the_export_too(classifier):
    classifier.train()
    classifier.clip.text_model.eval()  # a mode within the mode

    def state():
        return (
            {name: (tensor.clone(), tensor.requires_grad) for name, tensor in classifier.named_parameters()},
            {name: module.training for name, module in classifier.named_modules()},
            dict(classifier.routes),
        )

    predicted = classifier.predict(IMAGES, task="photo").probabilities
    parameters, modes, routes = state()
    exported = classifier.export("photo")
    now, modes_now, routes_now = state()
    assert modes_now == modes and routes_now == routes
    assert all(torch.equal(now[name][0], parameters[name][0]) for name in parameters | now)
    assert all(now[name][1] == parameters[name][1] for name in parameters)
    assert torch.equal(classifier.predict(IMAGES, task="photo").probabilities, predicted)

    served = run_torch(exported)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    classifier.routes["photo"] = ("photo",)
    assert np.array_equal(run_torch(exported), served)
    assert np.abs(run_torch(classifier.export("photo")) - served).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"task": "sketch"}, "'sketch' is none of the tasks; write one of print, clipart, photo"),
        ({"task": "photo", "format": "tflite"}, "format='tflite' is none .* write 'torch' or 'onnx'"),
        ({"task": "photo", "format": "onnx", "path": "a.pt2"}, "path='a.pt2' is no folder .* end in '.onnx'"),
        ({"task": "photo", "path": "a.onnx"}, "path='a.onnx' is no folder .* end in '.pt2'"),
    ],
)
def test_what_cannot_be_exported_stops_with_a_sentence(arguments, sentence, classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        classifier.export(**arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_onnx_a_sentence_says_what_to_install(package, classifier, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs the package {package}, .* pip install mmap_peft\[onnx\]"):
        classifier.export("photo", format="onnx")
    assert run_torch(classifier.export("photo")).shape == (5, 4)


def test_a_file_is_replaced_only_by_a_whole_one(classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = classifier.export(task="photo", format="onnx")
    assert str(path) == "photo.onnx"
    before = path.read_bytes()

    def fails(program, file, **options):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx.ONNXProgram, "save", fails)
        with pytest.raises(OSError, match="no space left"):
            classifier.export(task="photo", format="onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["photo.onnx"]
    assert path.read_bytes() == before
    with classifier.zero_shot():
        classifier.export(task="photo", format="onnx")
    assert path.read_bytes() != before
    image = pixels(
        {"image_size": "48", "image_mean": "[0, 0, 0]", "image_std": "[1, 1, 1]"}, [Image.new("RGB", (48, 48))]
    )
    assert onnxruntime.InferenceSession(path).run(None, {"pixel_values": image})[0].shape == (1, 4)
