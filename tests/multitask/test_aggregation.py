import inspect

import pytest
import torch
from torch import nn
from torchjd import aggregation
from torchjd.aggregation import PCGrad, Sum

from mmap_peft import (
    LinearProbeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    MultiTaskTrainer,
    Task,
    TaskGrouping,
    lora_config,
)
from mmap_peft.multitask.aggregation import (
    add_task_gradients,
    aggregate_task_gradients,
    backward_passes,
    find_aggregator,
)
from mmap_peft.multitask.output import task_losses

from ..conftest import load_clip


CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1)


def backward(losses, tasks_by_parameter, aggregator):
    """One step of one batch."""
    add_task_gradients(torch.stack(losses), tasks_by_parameter)
    aggregate_task_gradients(tasks_by_parameter, aggregator or Sum())


@pytest.fixture
def problem():
    """Three losses: `shared` is of all, `pair` of the first two, `own` of the last; `none` of nobody."""
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(3)) for name in ("shared", "pair", "own", "none")}
    mixing = torch.randn(3, 3, 3)

    def losses():
        used = [parameters["shared"] + parameters["pair"]] * 2 + [parameters["shared"] * parameters["own"]]
        return [(matrix @ value).square().sum() for matrix, value in zip(mixing, used)]

    tasks = {"shared": [0, 1, 2], "pair": [0, 1], "own": [2], "none": []}
    return parameters, losses, {parameters[name]: numbers for name, numbers in tasks.items()}


@pytest.mark.parametrize("aggregator", [None, Sum()])
def test_the_sum_is_the_plain_backward_pass_and_accumulates(aggregator, problem):
    parameters, losses, users = problem
    for _ in range(2):
        sum(losses()).backward()
    expected = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    for _ in range(2):
        backward(losses(), users, aggregator)
    assert parameters["none"].grad is expected["none"] is None
    for name in ("shared", "pair", "own"):
        torch.testing.assert_close(parameters[name].grad, expected[name])


def test_an_aggregator_sees_the_gradients_of_those_that_share(problem):
    parameters, losses, users = problem
    torch.manual_seed(1)  # PCGrad takes tasks in random order
    backward(losses(), users, PCGrad())
    found = {name: parameter.grad for name, parameter in parameters.items()}
    torch.manual_seed(1)
    jacobians = {
        name: torch.stack([torch.autograd.grad(losses()[task], parameters[name])[0] for task in tasks])
        for name, tasks in (("shared", [0, 1, 2]), ("pair", [0, 1]))
    }
    for name, jacobian in jacobians.items():
        torch.testing.assert_close(found[name], PCGrad()(jacobian))
    torch.testing.assert_close(found["own"], torch.autograd.grad(losses()[2], parameters["own"])[0])


@pytest.mark.parametrize(
    ("users", "passes"),
    [
        ([[0, 2, 3], [1, 4], [5], [0], [1], []], [[0, 1, 5], [2, 4], [3]]),  # groups and their tasks
        ([[0, 1, 2], [0, 2], [1]], [[0], [1], [2]]),  # one level of all tasks
        ([[0], [1], [2]], [[0, 1, 2]]),
        ([[2, 0], [1, 2]], [[0, 1], [2]]),
        ([[]], []),
    ],
)
def test_tasks_that_share_nothing_take_one_backward_pass(users, passes):
    assert backward_passes({nn.Parameter(torch.zeros(1)): tasks for tasks in users}) == passes


GROUPS = [[0, 3, 4], [1, 2], [5]]


@pytest.mark.parametrize(
    ("config", "keeps_global", "chunk", "passes"),
    [
        (CONFIG, False, None, 3),
        (CONFIG, False, 9, 3),
        (CONFIG, True, None, 6),
        (LinearProbeConfig(), None, None, 1),
        (lora_config(init_lora_weights=False), None, None, 6),
    ],
    ids=["groups", "groups, chunks of texts", "global and groups", "linear probe", "lora"],
)
def test_gradients_are_those_of_a_backward_pass_a_task(
    config, keeps_global, chunk, passes, clip, processor, monkeypatch
):
    names = [f"task {number}" for number in range(6)]
    tasks = [Task(name, [f"{word} {name}" for word in ("sun", "cloud", "star")]) for name in names]
    classifier = MultiTaskClassifier(clip, processor, tasks, config, text_chunk=chunk).train()
    if keeps_global is not None:
        grouping = TaskGrouping(names, [[names[number] for number in group] for group in GROUPS])
        classifier.set_grouping(grouping, keep_global=keeps_global)
    users, calls, grad = classifier.tasks_by_parameter(), [], torch.autograd.grad
    generator, expected = torch.Generator().manual_seed(0), {}
    for _ in range(2):  # accumulated
        batch = torch.randn(9, 3, 48, 48, generator=generator), torch.arange(9) % 6, torch.arange(9) % 3
        losses = task_losses(classifier(*batch[:2]).logits, *reversed(batch[1:]), 6)
        for task in range(6):
            own = [parameter for parameter, numbers in users.items() if task in numbers]
            for parameter, gradient in zip(own, grad(losses[task], own, retain_graph=True)):
                expected[parameter, task] = expected.get((parameter, task), 0) + gradient
        monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append(0) or grad(*args, **kwargs))
        add_task_gradients(losses, users)
        monkeypatch.undo()
    assert len(calls) == 2 * passes
    for parameter, numbers in users.items():
        assert len(parameter.jac) == len(numbers) > 0
        for row, task in zip(parameter.jac, numbers):
            assert row.abs().max() > 0
            torch.testing.assert_close(row, expected[parameter, task], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Best", "is none of torchjd's; write one of .*PCGrad"),
        ("CAGrad", r"cannot be made .*write its settings as in 'CAGrad\(c=0.5\)'"),
        ("PCGrad(x=1)", "cannot be made"),
    ],
)
def test_wrong_names_stop_with_a_sentence(name, sentence, arguments):
    with pytest.raises(ValueError, match=sentence):
        arguments(aggregator=name)


def test_settings_are_read():
    matrix = torch.tensor([[1.0, 0.0], [-0.5, 1.0]])
    mean = find_aggregator("CAGrad(c=0)")(matrix)
    torch.testing.assert_close(mean, matrix.mean(dim=0), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(find_aggregator("CAGrad(c=0.5)")(matrix), mean, atol=1e-2)


def train(clip, processor, tasks, args):
    classifier = MultiTaskClassifier(clip, processor, tasks, CONFIG)
    MultiTaskTrainer(model=classifier, args=args).train()
    return classifier, {name: p.detach().clone() for name, p in classifier.named_parameters() if p.requires_grad}


def test_training_with_the_sum_is_plain_training(processor, tasks, arguments, clip_folder):
    found = [
        train(load_clip(clip_folder), processor, tasks, arguments(aggregator=name, output_dir=folder))[1]
        for name, folder in ((None, arguments().output_dir + "-plain"), ("Sum", arguments().output_dir + "-sum"))
    ]
    for name, parameter in found[0].items():
        torch.testing.assert_close(found[1][name], parameter, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sharing", ["all", "none", "groups"])
def test_whose_prompts_a_task_uses(sharing, clip, processor, tasks, arguments, tmp_path):
    args = arguments(sharing=sharing, aggregator="PCGrad")
    classifier, _ = train(clip, processor, tasks, args)
    routes = {
        "all": {"print": ("global",), "clipart": ("global",), "photo": ("global",)},
        "none": {"print": ("print",), "clipart": ("clipart",), "photo": ("photo",)},
    }
    if sharing in routes:
        assert classifier.routes == routes[sharing]
        assert classifier.grouping is None
        assert not (tmp_path / "out" / "grouping").exists()
    else:
        assert all(len(route) == 2 for route in classifier.routes.values())
    classifier.save_pretrained(tmp_path / "saved")
    assert MultiTaskClassifier.from_pretrained(tmp_path / "saved").routes == classifier.routes


def test_an_unknown_way_to_share_stops_with_a_sentence(arguments):
    with pytest.raises(ValueError, match=r"sharing=.some. is no choice; write one of groups, global\+groups, all"):
        arguments(sharing="some")


STEP = {"sharing": "all", "max_steps": 3, "optim": "sgd", "learning_rate": 1.0, "save_strategy": "no"}


@pytest.mark.parametrize(
    "aggregator", ["PCGrad", "UPGrad", "CAGrad(c=0.5)", "MGDA", "AlignedMTL", "GradDrop", "Random"]
)
def test_accumulated_batches_equal_a_large_one(aggregator, processor, tasks, arguments, clip_folder):
    prompts = []
    for size, batches in ((12, 1), (3, 4)):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": batches}
        clip = load_clip(clip_folder)
        prompts.append(train(clip, processor, tasks, arguments(aggregator=aggregator, **batch, **STEP))[1])
    untrained = MultiTaskClassifier(load_clip(clip_folder), processor, tasks, CONFIG)
    start = dict(untrained.named_parameters())
    for name, parameter in prompts[0].items():
        torch.testing.assert_close(prompts[1][name], parameter, atol=1e-5, rtol=0)
        assert not torch.allclose(parameter, start[name], atol=1e-4)


@pytest.mark.parametrize("setting", [{"torch_empty_cache_steps": 1}, {"auto_find_batch_size": True}])
def test_settings_of_a_training_step_hold_with_an_aggregator(setting, processor, tasks, arguments, clip_folder):
    prompts = []
    for aggregator in (None, "Sum"):
        clip = load_clip(clip_folder)
        prompts.append(train(clip, processor, tasks, arguments(aggregator=aggregator, **setting, **STEP))[1])
    for name, parameter in prompts[0].items():
        torch.testing.assert_close(prompts[1][name], parameter, atol=1e-5, rtol=0)


def test_an_interrupted_step_leaves_nothing_for_the_next_training(processor, tasks, arguments, clip_folder):
    prompts = []
    for interrupted in (False, True):
        classifier = MultiTaskClassifier(load_clip(clip_folder), processor, tasks, CONFIG)
        if interrupted:
            for parameter in classifier.tasks_by_parameter():
                parameter.jac = torch.ones(3, *parameter.shape)
        MultiTaskTrainer(model=classifier, args=arguments(aggregator="PCGrad", **STEP)).train()
        prompts.append({name: p.detach().clone() for name, p in classifier.named_parameters() if p.requires_grad})
        assert not any(hasattr(parameter, "jac") for parameter in classifier.parameters())
    assert all(torch.equal(prompts[0][name], prompts[1][name]) for name in prompts[0])


# Every aggregator that torchjd ships, with settings for three tasks.
WORKING = [
    "AlignedMTL", "AlignedMTL(scale_mode='median')", "CAGrad(c=0.5)", "ConFIG", "Constant(weights=[0.5, 0.3, 0.2])",
    "DualProj", "FairGrad(alpha=1.0)", "GradDrop", "IMTLG", "Krum(n_byzantine=0)", "MGDA(max_iters=20)", "Mean",
    "PCGrad", "Random", "Sum", "TrimmedMean(trim_number=1)", "UPGrad", "UPGrad(pref_vector=[0.5, 0.3, 0.2])",
]  # fmt: skip
STATEFUL = ["ExcessMTL", "GradVac", "NashMTL(n_tasks=3)", "PCD"]


def test_every_aggregator_of_torchjd_is_tried():
    names = {
        name
        for name, value in vars(aggregation).items()
        if inspect.isclass(value) and issubclass(value, aggregation.Aggregator) and "Aggregator" not in name
    }
    assert {text.partition("(")[0] for text in WORKING + STATEFUL} == names


@pytest.mark.parametrize("aggregator", WORKING)
def test_it_works(aggregator, clip, processor, tasks, arguments):
    classifier = MultiTaskClassifier(clip, processor, tasks, CONFIG)
    source = classifier.adapter_parameters("global")["source"]
    start = source.detach().clone()
    args = arguments(aggregator=aggregator, **{**STEP, "max_steps": 1})
    MultiTaskTrainer(model=classifier, args=args).train()
    assert torch.isfinite(source).all() and not torch.equal(source, start)


@pytest.mark.parametrize("aggregator", STATEFUL)
def test_an_aggregator_with_a_state_is_refused(aggregator, arguments):
    with pytest.raises(ValueError, match="keeps a state from one step to the next, which checkpoints do not hold"):
        arguments(aggregator=aggregator)


@pytest.mark.parametrize(
    ("aggregator", "sentence"),
    [
        ("Krum(n_byzantine=1)", r"cannot aggregate the gradients of 2 tasks .*with sharing='all'"),
        ("TrimmedMean(trim_number=1)", r"cannot aggregate the gradients of 2 tasks"),
        ("Constant(weights=[1.0, 2.0, 3.0])", r"cannot aggregate the gradients of 2 tasks"),
        ("Krum(n_byzantine=-1)", r"cannot be made .*non-negative"),
        ("GradDrop(f=max)", "cannot be made"),
        ("MGDA(0.1)", r"cannot be made \(settings need names\)"),
        ("MGDA(", "cannot be made"),
        ("PCGrad() or Mean()", "cannot be made .*more than a name with settings"),
        ("PCGrad()+1", "cannot be made .*more than a name with settings"),
        ("CAGrad(c=0.5)(c=1)", "cannot be made .*more than a name with settings"),
        ("WeightedAggregator", "is none of torchjd's"),
        ("PCGradWeighting", "is none of torchjd's"),
    ],
)
def test_what_cannot_work_is_refused_when_the_settings_are_made(aggregator, sentence, arguments):
    with pytest.raises(ValueError, match=sentence):
        arguments(aggregator=aggregator)


def test_too_few_tasks_are_refused_before_training(clip, processor, tasks, arguments):
    args = arguments(aggregator="Krum(n_byzantine=1)", sharing="all")  # needs four
    with pytest.raises(ValueError, match="cannot aggregate the gradients of 3 tasks"):
        MultiTaskTrainer(model=MultiTaskClassifier(clip, processor, tasks, CONFIG), args=args)
