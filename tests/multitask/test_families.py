"""The classifier with models of other families than CLIP."""

import pytest
import torch

from mmap_peft import MmAPConfig, MultiTaskClassifier, use_routes

from ..tuner.test_families import build


CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5)


@pytest.mark.parametrize("family", ["siglip", "metaclip_2", "clipseg"])
def test_the_classifier_is_softmax_over_the_models_own_logits(family, processor, tasks, tmp_path):
    tokenizer = processor.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = build(family, vocab_size=len(tokenizer), **special)
    classifier = MultiTaskClassifier(model, processor, tasks, CONFIG).eval()
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = classifier(pixels, torch.tensor([2, 2])).logits
        texts = [texts[0] for texts in classifier.tasks["photo"].texts]
        # SigLIP was trained on texts of full length.
        padding = {"padding": "max_length", "max_length": 12} if family == "siglip" else {"padding": True}
        ids = tokenizer(texts, return_tensors="pt", **padding)["input_ids"]
        with use_routes(classifier.model, ("global",)):
            expected = classifier.model(input_ids=ids, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(found[:, :4].softmax(-1), expected.softmax(-1), atol=1e-5, rtol=1e-4)
    classifier.save_pretrained(tmp_path)
    again = MultiTaskClassifier.from_pretrained(tmp_path, model=classifier.model.unload(), processor=processor)
    with torch.no_grad():
        assert torch.equal(again(pixels, torch.tensor([2, 2])).logits, found)


def test_images_of_any_size_are_refused(processor, tasks):
    with pytest.raises(ValueError, match="SigLIP 2 with a fixed resolution, which is a SiglipModel"):
        MultiTaskClassifier(build("siglip2"), processor, tasks, CONFIG)
