import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image

from mmap_peft import MultiTaskClassifier


ARRAY = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), np.uint8)


@pytest.fixture
def classifier(clip, processor, tasks):
    return MultiTaskClassifier(clip, processor, tasks)


def test_all_forms_of_images_give_the_same(classifier, tmp_path):
    expected = classifier.predict([Image.fromarray(each) for each in ARRAY], "photo")
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, array in zip(paths, ARRAY):
        Image.fromarray(array).save(path)
    data = Dataset.from_dict({"image": list(map(str, paths))}, Features({"image": ImageColumn()}))
    several = [paths, tuple(map(str, paths)), [path.read_bytes() for path in paths], ARRAY, torch.tensor(ARRAY)]
    several += [torch.tensor(ARRAY).movedim(-1, 1) / 255, (Image.open(path) for path in paths), data["image"]]
    several += [data.cast_column("image", ImageColumn(decode=False))["image"], np.array(list(map(str, paths)))]
    for images in several:
        found = classifier.predict(images, "photo")
        assert found.labels == expected.labels
        assert torch.equal(found.probabilities, expected.probabilities)
    for image in (paths[0], str(paths[0]), paths[0].read_bytes(), ARRAY[0], io.BytesIO(paths[0].read_bytes())):
        torch.testing.assert_close(classifier.predict(image, "photo").probabilities, expected.probabilities[:1])


@pytest.mark.parametrize(("task", "classes"), [("photo", 4), ([], 5)])
def test_nothing_is_predicted_of_no_images(task, classes, classifier):
    for images in ([], (), np.zeros((0, 8, 8, 3)), iter(())):
        found = classifier.predict(images, task)
        assert found.labels == []
        assert found.probabilities.shape == (0, classes)


@pytest.mark.parametrize(
    ("images", "task", "sentence"),
    [
        ([ARRAY[0], "missing.png"], "photo", r"Picture 1 of `images`, missing.png, cannot be read \(No such file"),
        ([ARRAY[0], b"text"], "photo", "Picture 1 of `images` cannot be read"),
        (None, "photo", "expected a picture, or a list of them"),
        ([], "sketch", "'sketch' is none of the tasks"),
        ([], ["photo"], "1 tasks were given for 0 images"),
        (ARRAY[0], 5, "`task`: expected"),
        (ARRAY[0], [["photo"]], r"`task\[0\]`: expected"),
    ],
)
def test_wrong_images_and_tasks_stop_with_a_sentence(images, task, sentence, classifier):
    with pytest.raises(ValueError, match=sentence):
        classifier.predict(images, task)
