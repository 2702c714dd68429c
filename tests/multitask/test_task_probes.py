"""Prompts with a linear classifier of each task: the formula, its start, files, and every way of sharing prompts."""

import warnings

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import TrainerCallback

from mmap_peft import CoOpConfig, MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, Task, TaskGrouping, VPTConfig
from mmap_peft.data.pictograms import draw
from mmap_peft.methods.text_probe import TextProbe
from mmap_peft.multitask.consistency import Consistency
from mmap_peft.multitask.task_trainer import TaskTrainer

from ..conftest import load_clip, make_task


CONFIGS = {
    "mmap": lambda probe=True: MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.2, probe=probe),
    "coop": lambda probe=True: CoOpConfig(num_prompts=2, init_std=0.2, probe=probe),
    "vpt": lambda probe=True: VPTConfig(num_prompts=2, init_std=0.2, probe=probe),
}
GROUPS = [["print", "photo"], ["clipart"]]
PIXELS = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.tensor([2, 0, 1, 2])


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def make(clip_folder, processor, tasks):
    def classifier(config=CONFIGS["mmap"], grouped=True, disturbed=False, probe=True):
        made = MultiTaskClassifier(load_clip(clip_folder), processor, tasks, config(probe))
        if grouped:
            made.set_grouping(TaskGrouping.by_mode("given", list(made.tasks), GROUPS))
        if disturbed:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for adapter in made.adapters:
                    for parameter in made.adapter_parameters(adapter).values():
                        parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
        return made.eval()

    return classifier


def logits(classifier, texts_only=False):
    with torch.no_grad():
        if not texts_only:
            return classifier.eval()(PIXELS, NUMBERS).logits
        parts = []
        for row, number in enumerate(NUMBERS.tolist()):
            name = list(classifier.tasks)[number]
            image = classifier.image_features(PIXELS[row : row + 1], [classifier.routes[name]], torch.zeros(1).long())
            parts.append((image, classifier.encode_texts([name])[0]))
        return parts


def probes(classifier):
    named = {adapter: classifier.adapter_parameters(adapter) for adapter in classifier.adapters}
    return {adapter: found["probe.delta"] for adapter, found in named.items() if "probe.delta" in found}


# ---- the formula


def test_logits_are_the_formula(config, make):
    """exp(logit_scale) (T + s D) x + s c, each image with the prompts and the probe of its own task."""
    classifier = make(config, disturbed=True)
    found, scale = logits(classifier), 0.1
    for row, (image, text) in enumerate(logits(classifier, texts_only=True)):
        own = classifier.adapter_parameters(list(classifier.tasks)[NUMBERS[row]])
        weight = text + scale * own["probe.delta"]
        expected = classifier.logit_scale() * image[0] @ weight.T + scale * own["probe.bias"]
        torch.testing.assert_close(found[row, : len(text)], expected, atol=1e-4, rtol=1e-5)
        assert (found[row, len(text) :] == float("-inf")).all()


def test_it_starts_as_the_text_features_after_the_prompts(config, make):
    assert torch.equal(logits(make(config)), logits(make(config, probe=False)))
    assert torch.equal(logits(make(config, grouped=False)), logits(make(config, grouped=False, probe=False)))


def test_prompts_of_both_towers_and_probes_get_the_gradient_of_their_tasks(config, make):
    classifier = make(config, disturbed=True)
    classifier(PIXELS, torch.zeros(4).long(), torch.tensor([0, 1, 2, 0])).loss.backward()
    for adapter in classifier.adapters:
        for name, parameter in classifier.adapter_parameters(adapter).items():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == (adapter in ("group_0", "print")), (
                adapter,
                name,
            )
    by_parameter = classifier.tasks_by_parameter()
    assert [by_parameter[probes(classifier)[task]] for task in classifier.tasks] == [[0], [1], [2]]


def test_the_scale_is_a_factor_of_adams_learning_rate():
    torch.manual_seed(0)
    text, images, labels = torch.randn(3, 5), torch.randn(8, 5), torch.randint(3, (8,))
    probe = TextProbe(3, 5, scale=0.1)
    weight, bias = torch.nn.Parameter(text.clone()), torch.nn.Parameter(torch.zeros(3))
    settings = {"eps": 0.0, "weight_decay": 0.0}
    one, other = (
        torch.optim.AdamW(probe.parameters(), 0.3, **settings),
        torch.optim.AdamW([weight, bias], 0.03, **settings),
    )
    for _ in range(20):
        for optimizer, parts in (one, probe(text)), (other, (weight, bias)):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(images, *parts), labels).backward()
            optimizer.step()
    for found, expected in zip(probe(text), (weight, bias)):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_without_adapters_there_is_no_probe(config, make):
    classifier, plain = make(config, disturbed=True), make(config, grouped=False, probe=False)
    with plain.zero_shot():
        expected = logits(plain)
    with classifier.zero_shot():
        assert torch.equal(logits(classifier), expected)
    with classifier.model.disable_adapter():
        torch.testing.assert_close(logits(classifier), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(classifier), expected, atol=1e-2)


def test_other_classes_are_those_of_the_texts(make):
    classifier = make(disturbed=True)
    adapters, route = classifier.adapter_set, classifier.routes["print"]
    assert not adapters.weights_from_texts(route) and make(probe=False).adapter_set.weights_from_texts(route)
    other = classifier.texts_of(Task("other", ["sun", "dog"]), route)
    weight, bias = adapters.other_class_weights([route], lambda: [other])
    assert torch.equal(weight, other) and bias == 0.0


@pytest.mark.parametrize("config", [CONFIGS["mmap"], CONFIGS["vpt"]])
def test_other_classes_at_prediction(config, make):
    """They are told apart by their texts alone; the task's own classes, or some of them, keep the probe."""
    classifier, images = make(config, disturbed=True), [draw("print", "sun", 0), draw("photo", "star", 1)]
    own, others = classifier.tasks["print"].class_names, ["lighthouse", "violin", "sun"]
    found = classifier.predict(images, ["print", "photo"], class_names=others).probabilities
    pixels = classifier.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    for row, name in enumerate(("print", "photo")):
        route = classifier.routes[name]
        with torch.no_grad():
            texts = classifier.texts_of(Task("other", others, template=classifier.tasks[name].template), route)
            image = classifier.image_features(pixels[row : row + 1], [route], torch.zeros(1).long())
            expected = (classifier.logit_scale() * image @ texts.T).softmax(-1)[0]
            served = classifier.export(name, class_names=others)(pixels[row : row + 1])[0]
        torch.testing.assert_close(found[row], expected)
        torch.testing.assert_close(served, expected, atol=1e-5, rtol=1e-5)
    whole = classifier.predict(images, "print").probabilities
    some = classifier.predict(images, "print", class_names=own[:0:-1]).probabilities
    torch.testing.assert_close(some, F.normalize(whole[:, 1:].flip(1), p=1, dim=1))
    templates = [classifier.tasks["print"].template]
    torch.testing.assert_close(classifier.predict(images, "print", templates=templates).probabilities, whole)


def test_classes_that_are_not_trained(clip_folder, processor):
    """At its start, a probe leaves all losses and the prompts' gradients as they are; untrained rows get none."""
    names = ["sun", "cloud", "star", "heart"]
    task = Task(
        "print", names, train=[(draw("print", name, 0), name) for name in names], classes_for_training=names[:2]
    )
    found = []
    for probe in (False, True):
        config = CONFIGS["mmap"](probe)
        made = MultiTaskClassifier(load_clip(clip_folder), processor, [task], config)
        made.set_grouping(TaskGrouping.by_mode("all", ["print"]))
        consistency = Consistency(25.0, 10.0, 1.0, made.frozen_text_features(["print"]))
        labels = torch.tensor([0, 1, 1, 0])
        loss = made.train()(PIXELS, torch.zeros(4).long(), labels, consistency=consistency).loss
        loss.backward()
        parameters = made.adapter_parameters("print")
        found.append((loss, {key: each.grad for key, each in parameters.items() if "probe" not in key}))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    assert parameters["probe.delta"].grad[2:].abs().max() == 0 < parameters["probe.delta"].grad[:2].abs().min()


# ---- files


def test_a_folder_gives_them_back_and_plain_peft_loads_the_prompts(config, make, clip_folder, tmp_path):
    classifier = make(config, disturbed=True)
    classifier.save_pretrained(tmp_path)
    again = MultiTaskClassifier.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(classifier))
    fresh = make(config, grouped=False)
    fresh.load_adapters(tmp_path)
    assert torch.equal(logits(fresh), logits(classifier))
    assert fresh.adapter_config.probe
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(load_clip(clip_folder), tmp_path / "print").eval()
    with torch.no_grad():
        found = model.get_base_model().get_image_features(PIXELS).pooler_output
        expected = classifier.image_features(PIXELS, [("print",)], torch.zeros(4).long())
    torch.testing.assert_close(F.normalize(found, dim=-1), expected, atol=1e-6, rtol=1e-5)


def test_a_folder_of_other_classes_or_without_probes_changes_nothing(make, clip, processor, tmp_path):
    make(disturbed=True).save_pretrained(tmp_path / "probes")
    make(probe=False).save_pretrained(tmp_path / "plain")
    tasks = [make_task("print", 4), make_task("clipart", 5), make_task("photo", 4)]
    other = MultiTaskClassifier(clip, processor, tasks, CONFIGS["mmap"]())
    before = logits(other)
    for folder, reason in ("probes", r"'probe.bias' of shape \[3\].* need \[4\]"), ("plain", "probe=False"):
        with pytest.raises(ValueError, match=reason):
            other.load_adapters(tmp_path / folder)
    assert torch.equal(logits(other), before) and other.adapters == ["global"]


def test_an_export_agrees(config, make, tmp_path):
    classifier, image = make(config, disturbed=True), draw("photo", "sun", 0)
    expected = classifier.predict(image, "photo").probabilities
    pixels = classifier.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(classifier.export("photo", path=tmp_path)(pixels), expected, atol=1e-5, rtol=0)
    loaded = torch.export.load(tmp_path / "photo.pt2").module()
    torch.testing.assert_close(loaded(pixels), expected, atol=1e-5, rtol=0)


# ---- training


@pytest.mark.parametrize("sharing", ["groups", "global+groups", "none"])
def test_training_changes_the_probe_of_each_task(sharing, make, arguments, tmp_path):
    classifier = make(grouped=False)
    trainer = MultiTaskTrainer(model=classifier, args=arguments(sharing=sharing, max_steps=4, save_steps=4))
    trainer.train()
    found = probes(classifier)
    assert sorted(found) == sorted(classifier.tasks)
    assert all(probe.any() for probe in found.values())
    classifier.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(MultiTaskClassifier.from_pretrained(tmp_path / "saved")), logits(classifier))
    classifier.reset_adapters()
    assert not probes(classifier)
    classifier.separate_adapters()
    assert sorted(probes(classifier)) == sorted(found) and not any(
        probe.any() for probe in probes(classifier).values()
    )


def test_tasks_without_an_adapter_of_their_own_are_refused(make, arguments):
    classifier = make(grouped=False)
    before = logits(classifier)
    for kind, fields in (MultiTaskTrainer, {"sharing": "all"}), (TaskTrainer, {}):
        with pytest.raises(ValueError, match=r"task 'print' uses only global; write sharing='none'"):
            kind(model=classifier, args=arguments(**fields)).train()
    assert torch.equal(logits(classifier), before) and not classifier.trained_adapters
    classifier.separate_adapters()
    TaskTrainer(model=classifier, args=arguments(max_steps=1, save_strategy="no")).train()


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_resuming_equals_the_uninterrupted_run(make, arguments, tmp_path):
    fields = {"max_steps": 5, "save_steps": 1, "sharing": "none"}
    whole, cut, resumed = (make(grouped=False) for _ in range(3))
    MultiTaskTrainer(model=whole, args=arguments(output_dir=str(tmp_path / "whole"), **fields)).train()
    args = arguments(output_dir=str(tmp_path / "cut"), **fields)
    with pytest.raises(KeyboardInterrupt):
        MultiTaskTrainer(model=cut, args=args, callbacks=[Stop()]).train()
    MultiTaskTrainer(model=resumed, args=args).train(resume_from_checkpoint=True)
    for adapter in whole.adapters:
        for name, parameter in whole.adapter_parameters(adapter).items():
            assert torch.equal(resumed.adapter_parameters(adapter)[name], parameter), (adapter, name)


@pytest.mark.parametrize("group", [None, "photo", "nearest"])
def test_an_added_task_has_a_probe_of_its_own(group, make):
    classifier = make(disturbed=True)
    before = logits(classifier)
    classifier.add_task(make_task("sketch", 4), group=group)
    torch.testing.assert_close(logits(classifier), before, atol=1e-5, rtol=1e-5)
    assert classifier.training_adapters == ["sketch"]
    assert probes(classifier)["sketch"].shape == (4, 16) and not probes(classifier)["sketch"].any()
    classifier.train()(PIXELS, torch.full((4,), 3), torch.zeros(4).long()).loss.backward()
    assert probes(classifier)["sketch"].grad.any()
    assert all(probe.grad is None for name, probe in probes(classifier).items() if name != "sketch")
