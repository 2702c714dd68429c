"""What holds of every method that is no prompt: it starts as zero-shot, trains, is saved and loaded."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, CLIPConfig, CLIPModel, TrainerCallback

from mmap_peft import (
    BitFitConfig,
    BottleneckAdapterConfig,
    CLIPAdapterConfig,
    FullFineTuningConfig,
    LinearProbeConfig,
    MultiTaskClassifier,
    MultiTaskTrainer,
    TaskGrouping,
    TipAdapterConfig,
    ia3_config,
    ln_tuning_config,
    lora_config,
    starting_learning_rate,
)
from mmap_peft.data.pictograms import draw
from mmap_peft.methods.peft_configs import OTHER_PEFT_TYPES, PEFT_METHODS
from mmap_peft.multitask.images import TaskImages, collate

from ..conftest import load_clip, make_task
from ..tuner.test_families import build


POOLED = {"linear probe", "clip-adapter", "clip-adapter with texts", "tip-adapter-f"}  # each task has its own
OTHER_START = {"clip-adapter", "clip-adapter with texts", "tip-adapter-f"}
METHODS = {  # by name: the settings, and a learning rate that shows in a few steps
    "linear probe": (LinearProbeConfig, 1e-2),
    "clip-adapter": (lambda: CLIPAdapterConfig(ratio=0.6), 1e-1),
    "clip-adapter with texts": (lambda: CLIPAdapterConfig(reduction=2, text_ratio=0.5), 1e-1),
    "tip-adapter-f": (lambda: TipAdapterConfig(train_keys=True, beta=5.5), 1e-2),
    "full": (FullFineTuningConfig, 1e-3),
    "bitfit": (BitFitConfig, 1e-2),
    "adapter": (lambda: BottleneckAdapterConfig(bottleneck_size=4), 1e-2),
    "lora": (lambda: lora_config(r=4), 1e-2),
    "ln-tuning": (ln_tuning_config, 1e-2),
    "ia3": (ia3_config, 1e-2),
}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def make(clip_folder, processor, tasks):
    """Makes a classifier of a fresh CLIP."""

    def classifier(name, own_tasks=None):
        config = None if name is None else METHODS[name][0]()
        made = MultiTaskClassifier(load_clip(clip_folder), processor, own_tasks or tasks, config)
        return with_caches(made)

    return classifier


def with_caches(classifier):
    if classifier.adapter_set.empty_caches:
        classifier.fill_caches()
    return classifier


@pytest.fixture
def train(arguments):
    def trained(classifier, rate=1e-2, callbacks=(), **fields):
        args = arguments(learning_rate=rate, **fields)
        return MultiTaskTrainer(model=classifier, args=args, callbacks=list(callbacks))

    return trained


@pytest.fixture
def batch(processor, tasks):
    """Images of all three tasks, mixed."""
    images = TaskImages(tasks, "train", processor.image_processor)
    return collate([images[row] for row in (7, 0, 23, 14, 3, 16)])


@torch.no_grad()
def logits(classifier, batch):
    return classifier.eval()(**batch).logits


def parameters(classifier):
    return [(a, name, p) for a in classifier.adapters for name, p in classifier.adapter_parameters(a).items()]


def disturb(classifier, spread=0.05):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, _, parameter in parameters(classifier):
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))


def base_tensors(classifier):
    """The base's own tensors by their names, wherever a method has put them."""
    return {
        name.replace(".base_layer", ""): tensor
        for name, tensor in classifier.clip.state_dict().items()
        if ".<global>." not in f"{name}."
    }


# ---- the start


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_classifier_that_is_cast_as_a_whole_predicts_nearly_the_same(dtype, method, make):
    pictures = [draw("print", "sun", 40), draw("photo", "cloud", 41)]
    classifier = make(method)
    disturb(classifier)
    before = classifier.predict(pictures, ["print", "photo"]).probabilities
    after = classifier.to(dtype).predict(pictures, ["print", "photo"]).probabilities
    torch.testing.assert_close(after, before, atol=1e-5 if dtype == torch.float64 else 0.2, rtol=0)


def test_it_starts_as_zero_shot(method, make, batch):
    if method in OTHER_START:
        pytest.skip("it starts with random networks, or with training images, as its paper does")
    # Bottleneck adapters start near the identity: 24 of them with weights of 0.01 move logits of about 3 by less.
    tolerance = 0.05 if method == "adapter" else 1e-5
    torch.testing.assert_close(logits(make(method), batch), logits(make(None), batch), atol=tolerance, rtol=0)


def test_zero_shot_is_the_base_to_the_bit_and_leaves_no_trace(method, make, batch):
    classifier, plain = make(method), logits(make(None), batch)
    disturb(classifier)
    _, _, first = parameters(classifier)[0]
    first.requires_grad_(False)
    before, flags = logits(classifier, batch), [p.requires_grad for p in classifier.parameters()]
    assert not torch.equal(before, plain)
    with classifier.zero_shot():
        assert torch.equal(logits(classifier, batch), plain)
        with classifier.zero_shot():
            assert torch.equal(logits(classifier, batch), plain)
        assert torch.equal(logits(classifier, batch), plain)
    assert torch.equal(logits(classifier, batch), before)
    assert [p.requires_grad for p in classifier.parameters()] == flags


@pytest.mark.parametrize("family", ["siglip", "clipseg"])
def test_other_families(family, method, processor, tasks, batch):
    tokenizer = processor.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

    def classifier(config):
        return MultiTaskClassifier(build(family, vocab_size=len(tokenizer), **special), processor, tasks, config)

    found, plain = classifier(METHODS[method][0]()), classifier(None)
    tolerance = 0.05 if method == "adapter" else 1e-5
    if method not in OTHER_START:
        torch.testing.assert_close(logits(found, batch), logits(plain, batch), atol=tolerance, rtol=0)
    found.train()(**batch).loss.backward()
    reached = {tower for _, name, p in parameters(found) for tower in ("text", "vision")
               if tower in name and p.grad is not None and p.grad.any()}  # fmt: skip
    assert reached >= (set() if method in POOLED else {"text", "vision"})


# ---- training


@pytest.mark.parametrize("names", [["clipart"], ["print", "clipart", "photo"]], ids=["one task", "three tasks"])
def test_training_lowers_the_loss_of_the_training_images_and_leaves_the_base(names, method, make, train, tasks):
    classifier = make(method, [task for task in tasks if task.name in names])
    start, count = base_tensors(classifier), sum(p.numel() for *_, p in parameters(classifier))
    start = {name: tensor.clone() for name, tensor in start.items()}
    trainer = train(classifier, METHODS[method][1], max_steps=8, save_strategy="no")
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < before - 0.01
    assert classifier.grouping is None
    assert not Path(trainer.args.output_dir, "grouping").exists()
    assert set(trainer.optimizer.param_groups[0]["params"]) | set(trainer.optimizer.param_groups[1]["params"]) == {
        parameter for *_, parameter in parameters(classifier)
    }
    assert sum(p.numel() for p in classifier.parameters() if p.requires_grad) == count
    after = base_tensors(classifier)
    assert after.keys() == start.keys()
    assert all(torch.equal(after[name], start[name]) for name in start)


def test_every_parameter_gets_a_gradient(method, make, batch):
    classifier = make(method)
    disturb(classifier)  # past zeros of LoRA's B
    classifier.train()(**batch).loss.backward()
    for adapter, name, parameter in parameters(classifier):
        # A key's bias adds the same to all scores of a query.
        if not re.search("k_proj.bias$", name):
            assert parameter.grad is not None and parameter.grad.any(), (adapter, name)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["bitfit", "lora", "linear probe", "clip-adapter", "tip-adapter-f"])
def test_resuming_equals_the_uninterrupted_run(method, make, train, tmp_path):
    fields = {"max_steps": 5, "save_steps": 1}
    whole, cut, resumed = make(method), make(method), make(method)
    train(whole, output_dir=str(tmp_path / "whole"), **fields).train()
    with pytest.raises(KeyboardInterrupt):
        train(cut, output_dir=str(tmp_path / "cut"), callbacks=[Stop()], **fields).train()
    train(resumed, output_dir=str(tmp_path / "cut"), **fields).train(resume_from_checkpoint=True)
    for (*_, found), (*_, expected) in zip(parameters(resumed), parameters(whole), strict=True):
        assert torch.equal(found, expected)


# ---- files


def test_saving_and_loading_gives_equal_logits(method, make, batch, tmp_path):
    classifier = make(method)
    disturb(classifier)
    classifier.record.prompted = dict.fromkeys(classifier.tasks, 0.5)
    classifier.save_pretrained(tmp_path)
    again = MultiTaskClassifier.from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), logits(classifier, batch))
    assert again.routes == classifier.routes
    assert again.adapters == classifier.adapters
    assert all(p.requires_grad for *_, p in parameters(again))
    for adapter in classifier.adapters:
        sizes = [tensor.numel() for tensor in load_file(tmp_path / adapter / "adapter_model.safetensors").values()]
        scales = 2 if method == "tip-adapter-f" else 0
        assert sum(sizes) == scales + sum(p.numel() for p in classifier.adapter_parameters(adapter).values())
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    other = make(method)
    other.load_adapters(tmp_path)
    assert torch.equal(logits(other, batch), logits(classifier, batch))


def test_an_adapter_is_one_of_peft(method, make, batch, clip_folder, tmp_path):
    classifier = make(method)
    disturb(classifier)
    classifier.save_pretrained(tmp_path)
    folder = tmp_path / classifier.adapters[0]
    if method in POOLED:
        name = type(classifier.adapter_config).__name__
        with pytest.raises(ValueError, match=rf"PEFT cannot load it; write .*{name}\(\)\), or its from_pre"):
            PeftModel.from_pretrained(load_clip(clip_folder), folder)
        return
    with torch.no_grad():
        expected = classifier.clip.get_image_features(batch["pixel_values"]).pooler_output
        for loaded in (
            PeftModel.from_pretrained(load_clip(clip_folder), folder).get_base_model(),
            CLIPModel.from_pretrained(folder),
        ):
            assert torch.equal(loaded.eval().get_image_features(batch["pixel_values"]).pooler_output, expected)


def test_a_folder_of_another_shape_changes_nothing(method, make, batch, tmp_path):
    classifier, other = make(method), make("lora" if method != "lora" else "ia3")
    other.save_pretrained(tmp_path)
    before = logits(classifier, batch)
    with pytest.raises(ValueError, match="but the classifier"):
        classifier.load_adapters(tmp_path)
    assert torch.equal(logits(classifier, batch), before)


def test_a_card_names_the_method_and_no_prompts(method, make, tmp_path):
    classifier = make(method)
    classifier.record.zero_shot = dict.fromkeys(classifier.tasks, 0.25)
    classifier.record.prompted = dict.fromkeys(classifier.tasks, 0.5)
    classifier.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "prompt" not in card.split("---", 2)[2].replace("mmap", "")
    assert "## Source" in card
    count = sum(p.numel() for *_, p in parameters(classifier))
    assert f"{count:,} trained parameters, {100 * count / 122161:.3g} % of the base" in card
    assert "| print | 3 |" in card and "50.0 %" in card


# ---- export


def test_an_export_agrees(method, make, tmp_path):
    classifier = make(method)
    disturb(classifier)
    image = draw("photo", "sun", 0)
    pixels = classifier.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    expected = classifier.predict(image, task="photo").probabilities
    own = method in (*POOLED, "adapter")  # a bias, or layers, that a plain CLIP has not
    exported = classifier.export("photo", path=tmp_path if own else None)
    torch.testing.assert_close(exported(pixels), expected, atol=1e-5, rtol=0)
    if own:
        loaded = torch.export.load(tmp_path / "photo.pt2").module()
        torch.testing.assert_close(loaded(pixels), expected, atol=1e-5, rtol=0)
    assert torch.equal(classifier.predict(image, task="photo").probabilities, expected)  # it has only been copied
    with classifier.zero_shot():
        expected = classifier.predict(image, task="photo").probabilities
        torch.testing.assert_close(classifier.export("photo")(pixels), expected, atol=1e-5, rtol=0)


# ---- tasks and groups


def test_groups_stop_with_a_sentence(method, make, train):
    classifier = make(method)
    classifier.reset_adapters()  # empties caches, which count as trained
    trainer = train(classifier, grouping="all")
    for attempt in (
        trainer.train,
        trainer.group_tasks,
        lambda: classifier.set_grouping(TaskGrouping.by_mode("all", list(classifier.tasks))),
        lambda: classifier.add_task(make_task("sketch", 3), group="photo"),
        # One adapter that all tasks share is what the others have.
        *([classifier.share_one_adapter] if method in POOLED else []),
    ):
        with pytest.raises(ValueError, match="has no prompts to join; train without groups"):
            attempt()
    assert list(classifier.tasks) == ["print", "clipart", "photo"]


def test_one_more_task(method, make, batch):
    classifier = make(method)
    disturb(classifier)
    before = logits(classifier, batch)
    classifier.add_task(make_task("sketch", 4))
    assert torch.equal(logits(classifier, batch), before)
    probe = method in POOLED
    assert classifier.routes["sketch"] == (("sketch",) if probe else ("global",))
    assert classifier.training_tasks == (["sketch"] if probe else ["print", "clipart", "photo", "sketch"])
    output = classifier.train()(batch["pixel_values"], torch.full((6,), 3), torch.zeros(6, dtype=torch.long))
    output.loss.backward()
    assert {a for a, _, p in parameters(classifier) if p.grad is not None} == {"sketch" if probe else "global"}


def test_the_seed_of_one_more_task_decides_its_start(make):
    starts = []
    for fields in {}, {"seed": 0}, {"seed": 5}:
        classifier = make("clip-adapter")
        classifier.add_task(make_task("sketch", 4), **fields)
        starts.append(classifier.adapter_parameters("sketch")["image.0.weight"])
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


OTHERS = [PEFT_TYPE_TO_CONFIG_MAPPING[name] for name in OTHER_PEFT_TYPES if name in PEFT_TYPE_TO_CONFIG_MAPPING]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of kernels that are not there, and of sizes that are adjusted
@pytest.mark.parametrize("config_class", OTHERS, ids=lambda config_class: config_class.__name__)
def test_each_of_the_listed_methods_of_peft_trains_and_a_folder_gives_it_back(
    config_class, clip_folder, processor, tasks, batch, tmp_path
):
    clip = CLIPModel.from_pretrained(clip_folder)  # as below: the last bit can depend on where weights are in memory
    classifier = MultiTaskClassifier(clip, processor, tasks, config_class(target_modules=["q_proj", "v_proj"]))
    before = logits(classifier, batch)
    for _ in range(2):  # some start at a point where only a part of them has a gradient
        classifier.train()(**batch).loss.backward()
        with torch.no_grad():
            for parameter in classifier.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=0.05)
                    parameter.grad = None
    trained = logits(classifier.eval(), batch)
    assert not torch.equal(trained, before)
    classifier.save_pretrained(tmp_path)
    assert torch.equal(logits(MultiTaskClassifier.from_pretrained(tmp_path), batch), trained)


KNOWN = {*OTHER_PEFT_TYPES, *(method.peft_type for method in PEFT_METHODS)}


@pytest.mark.parametrize("peft_type", sorted({name.value for name in PeftType} - KNOWN))
def test_other_methods_of_peft_are_refused_with_those_that_work(peft_type, clip, processor, tasks):
    class Settings(PeftConfig):
        pass

    before = {name: parameter.requires_grad for name, parameter in clip.named_parameters()}
    with pytest.raises(ValueError, match=f"peft_type='{peft_type}' is no method .* BITFIT, .* LORA, .* MMAP, "):
        MultiTaskClassifier(clip, processor, tasks, Settings(peft_type=peft_type))
    assert {name: parameter.requires_grad for name, parameter in clip.named_parameters()} == before


def test_any_tuner_of_peft_will_do(make, clip, processor, tasks, batch, tmp_path):
    classifier = MultiTaskClassifier(clip, processor, tasks, LoHaConfig(target_modules=["q_proj"], r=2))
    torch.testing.assert_close(logits(classifier, batch), logits(make(None), batch), atol=1e-5, rtol=0)
    disturb(classifier)
    classifier.save_pretrained(tmp_path)
    assert torch.equal(logits(MultiTaskClassifier.from_pretrained(tmp_path), batch), logits(classifier, batch))
    assert "# LoHa of 3 tasks" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match=r"no starting learning rate for LoHaConfig; methods with one are MMAP, "):
        starting_learning_rate(LoHaConfig())


@pytest.mark.usefixtures("unpacked")
def test_a_base_of_four_bits(method, clip_folder, processor, tasks, batch, tmp_path):
    def base():
        return CLIPModel.from_pretrained(clip_folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))

    if method == "full":
        with pytest.raises(ValueError, match="is quantised, and whole numbers have no gradient"):
            MultiTaskClassifier(base(), processor, tasks, FullFineTuningConfig())
        return
    classifier = with_caches(MultiTaskClassifier(base(), processor, tasks, METHODS[method][0]())).train()
    optimizer = torch.optim.Adam([p for *_, p in parameters(classifier)], METHODS[method][1])
    losses = []
    for _ in range(3):
        losses.append(classifier(**batch).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    classifier.save_pretrained(tmp_path)
    loaded = MultiTaskClassifier.from_pretrained(tmp_path, model=base(), processor=processor)
    assert torch.equal(logits(loaded, batch), logits(classifier, batch))


# ---- sizes


def counted(name):
    """Parameters that a method trains on CLIP ViT-B/16, and those of the base."""
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(vision_config={"patch_size": 16}))
        base = sum(parameter.numel() for parameter in clip.parameters())
        config = {"adapter": BottleneckAdapterConfig, "lora": lora_config}.get(name, METHODS[name][0])()
        return get_peft_model(clip, config).get_nb_trainable_parameters()[0], base


def test_sizes_are_those_of_the_formulas_and_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    layers, towers, dim, classes = 12, {"text": 512, "vision": 768}, 512, 65
    widths = sum(towers.values())
    expected = {
        "adapter": layers * 2 * sum(2 * 64 * d + d + 64 for d in towers.values()),
        "lora": layers * 2 * 2 * 8 * widths,
        "ia3": layers * (2 + 4) * widths,
        # queries, keys, values, output, two of the MLP (4 d and d), two norms; then the norms outside the layers
        "bitfit": layers * (4 + 4 + 1 + 2) * widths + 512 + 2 * 768,
        "ln-tuning": layers * 2 * 2 * widths + 2 * 512 + 2 * 2 * 768,
        "full": 149_620_737,
    }
    for name, count in expected.items():
        assert counted(name) == (count, 149_620_737), name
        assert f"{count:,}" in page, name
    assert f"{classes * (dim + 1):,}" in page


@pytest.mark.parametrize("name", METHODS)
def test_each_has_a_learning_rate_to_start_with_which_the_page_names(name):
    rate = starting_learning_rate(METHODS[name][0]())
    assert 1e-6 < rate < 1e-2
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    assert f"| {rate:.0e} |".replace("e-0", "e-") in page


def test_a_probe_of_another_task_list_is_refused(make, tmp_path):
    make("linear probe").save_pretrained(tmp_path)
    description = json.loads((tmp_path / "tasks.json").read_text())
    description["adapters"].reverse()
    (tmp_path / "tasks.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="holds the adapters"):
        make("linear probe").load_adapters(tmp_path)


def test_probes_of_names_that_an_early_version_wrote_otherwise_load(make, tmp_path):
    made = make("linear probe")
    made.save_pretrained(tmp_path)
    text = (tmp_path / "tasks.json").read_text()
    (tmp_path / "photo").rename(tmp_path / "phot")
    description = json.loads(text.replace('"photo"', '"phot"').replace('"name": "phot"', '"name": "photo"'))
    del description["files"], description["sha256"]
    (tmp_path / "tasks.json").write_text(json.dumps(description))
    fresh = make("linear probe")
    with torch.no_grad():
        fresh.adapter_parameters("photo")["weight"].zero_()
    fresh.load_adapters(tmp_path)
    assert torch.equal(fresh.adapter_parameters("photo")["weight"], made.adapter_parameters("photo")["weight"])
    assert fresh.routes == made.routes
