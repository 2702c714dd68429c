import numpy as np
import pytest
import torch

from mmap_peft import MmAPConfig, MultiTaskClassifier
from mmap_peft.multitask.affinity import cosine_similarity, task_gradients
from mmap_peft.multitask.images import TaskImages, collate


@pytest.fixture
def classifier(clip, processor, tasks):
    return MultiTaskClassifier(clip, processor, tasks, MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5))


def batches(classifier, size):
    images = TaskImages(classifier.tasks.values(), "train", classifier.processor.image_processor)
    for task, count in enumerate(images.sizes):
        rows = list(range(images.starts[task], images.starts[task] + count))
        for start in range(0, count, size):
            yield collate([images[row] for row in rows[start : start + size]])


def test_gradients_equal_a_backward_pass_a_task(classifier):
    named = classifier.adapter_parameters("global")
    found = task_gradients(classifier, list(named.values()), batches(classifier, 100))
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert classifier.training
    for task, batch in enumerate(batches(classifier, 100)):
        classifier.zero_grad()
        output = classifier(**batch)
        (torch.nn.functional.cross_entropy(output.logits, batch["labels"], reduction="sum")).backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in named.values()])
        torch.testing.assert_close(found[task].float(), expected, atol=1e-5, rtol=1e-4)


def test_small_batches_give_the_same_gradients(classifier):
    parameters = list(classifier.adapter_parameters("global").values())
    whole = task_gradients(classifier, parameters, batches(classifier, 100))
    torch.testing.assert_close(
        task_gradients(classifier, parameters, batches(classifier, 3)), whole, atol=1e-5, rtol=1e-4
    )


def test_similarity_is_that_of_directions():
    gradients = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names = list("wxyz")
    found = cosine_similarity(gradients, names)
    assert np.array_equal(found, found.T)
    assert np.array_equal(np.diag(found), np.ones(4))
    # scaling a task's loss scales its gradient: nothing changes
    scaled = gradients * torch.tensor([1e-3, 1.0, 7.0, 1e4], dtype=torch.float64)[:, None]
    np.testing.assert_allclose(cosine_similarity(scaled, names), found, atol=1e-12)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(cosine_similarity(gradients[order], names), found[np.ix_(order, order)], atol=1e-12)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_task_without_a_direction_stops_with_its_name(value):
    gradients = torch.ones(2, 3, dtype=torch.float64)
    gradients[1] = value
    with pytest.raises(ValueError, match="gradient of task 'y' has the norm"):
        cosine_similarity(gradients, ["x", "y"])


def test_no_random_number_is_drawn(classifier):
    state = torch.get_rng_state()
    task_gradients(classifier, list(classifier.adapter_parameters("global").values()), batches(classifier, 100))
    assert torch.equal(torch.get_rng_state(), state)
