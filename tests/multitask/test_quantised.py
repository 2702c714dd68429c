"""A classifier on a base of 4 bits."""

import pytest
import torch
from transformers import BitsAndBytesConfig, CLIPModel

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer
from mmap_peft.data.pictograms import draw


@pytest.mark.usefixtures("unpacked")
def test_it_trains_and_loads_and_is_exported_once_it_is_float(clip_folder, processor, tasks, arguments, tmp_path):
    def base():
        return CLIPModel.from_pretrained(clip_folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))

    def predicted(classifier):
        return classifier.predict([draw("print", "sun", 0)], task="photo").probabilities

    classifier = MultiTaskClassifier(base(), processor, tasks, MmAPConfig(source_shape=(2, 4)))
    before = predicted(classifier)
    MultiTaskTrainer(model=classifier, args=arguments()).train()
    assert (predicted(classifier) - before).abs().max() > 1e-4
    classifier.save_pretrained(tmp_path / "saved")
    loaded = MultiTaskClassifier.from_pretrained(tmp_path / "saved", model=base(), processor=processor)
    assert torch.equal(predicted(loaded), predicted(classifier))
    with pytest.raises(ValueError, match=r"quantised, .* model=base.dequantize\(\)"):
        classifier.export("photo")
    loaded = MultiTaskClassifier.from_pretrained(tmp_path / "saved", model=base().dequantize(), processor=processor)
    pixels = processor.image_processor(draw("print", "sun", 0), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(loaded.export("photo")(pixels), predicted(classifier), atol=1e-5, rtol=0)
