from types import SimpleNamespace

import numpy as np
import pytest

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, MultiTaskTrainingArguments
from mmap_peft.multitask.images import IGNORE_INDEX
from mmap_peft.multitask.processes import set_up, shard_rows


@pytest.mark.parametrize(("rows", "size", "world"), [(12, 4, 1), (13, 3, 2), (5, 3, 4), (2, 4, 5), (9, 4, 2)])
def test_shares_hold_every_row_once_in_as_many_batches_everywhere(rows, size, world):
    shares = [shard_rows(np.arange(rows), size, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in shares}) == 1
    assert max(len(batch) for batches in shares for batch in batches) <= size
    assert sorted(np.concatenate([batch for batches in shares for batch in batches])) == list(range(rows))


@pytest.mark.parametrize(
    ("count", "batches", "images"), [(1, 1, [1, 1, 1, 0, 0]), (5, 1, [3] * 5), (6, 2, [4, 4, 4, 3, 3])]
)
def test_every_process_takes_a_snapshot_in_as_many_batches(
    count, batches, images, clip, processor, tasks, arguments, monkeypatch
):
    classifier = MultiTaskClassifier(clip, processor, tasks, MmAPConfig(source_shape=(2, 4)))
    args = arguments(snapshot_images=count, per_device_train_batch_size=3)
    stage = MultiTaskTrainer(model=classifier, args=args).shared_adapter_trainer()
    monkeypatch.setattr(MultiTaskTrainingArguments, "world_size", property(lambda args: 5))
    found = []
    for rank in range(5):
        monkeypatch.setattr(MultiTaskTrainingArguments, "process_index", property(lambda args, rank=rank: rank))
        found.append(list(stage._batches(np.concatenate(stage._chosen_images()))))
    assert {len(own) for own in found} == {batches}
    counts = [sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in own) for own in found]
    assert counts == images


def test_processes_that_know_nothing_of_each_other_are_refused(clip, processor, tasks, arguments, monkeypatch):
    args = arguments()
    monkeypatch.setenv("WORLD_SIZE", "2")
    classifier = MultiTaskClassifier(clip, processor, tasks, MmAPConfig(source_shape=(2, 4)))
    with pytest.raises(ValueError, match=r"2 processes were launched, but each would train alone.*--use_cpu"):
        MultiTaskTrainer(model=classifier, args=args)


@pytest.mark.parametrize(
    ("fsdp", "state", "sentence"),
    [
        (True, {"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "write fsdp_version: 2, or use DDP"),
        (True, {"fsdp_plugin": SimpleNamespace(fsdp_version=2)}, "text_chunk=8 was given together with FSDP"),
        (False, {"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "write zero_stage: 2, or shard"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(fsdp, state, sentence):
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(state=SimpleNamespace(**state)),
        model=SimpleNamespace(text_chunk=8),
        args=SimpleNamespace(world_size=1),
        is_fsdp_enabled=fsdp,
        is_deepspeed_enabled=not fsdp,
    )
    with pytest.raises(ValueError, match=sentence):
        set_up(trainer)
