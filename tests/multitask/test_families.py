"""The classifier with models of other families than CLIP."""

import pytest
import torch

from mmap_peft import MmAPConfig, MultiTaskClassifier, use_routes
from mmap_peft.tuner.texts import shared_text_features

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


def test_texts_that_share_words_end_where_metaclip_2_says(processor, tasks):
    """Its end of text may have the id 2, by which old configs of CLIP mean the highest id."""
    tokenizer, highest = processor.tokenizer, len(processor.tokenizer) - 1
    model = build("metaclip_2", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=2, pad_token_id=1)
    classifier = MultiTaskClassifier(model, processor, tasks, CONFIG).eval()
    ids = [[0, 9, 9, highest, 30, 2], [0, 9, 9, 31, 2], [0, 9, 9, 31, 32, 2]]
    padded = torch.tensor([row + [1] * (6 - len(row)) for row in ids])
    prompts = classifier.adapter_set.prompts("text", [("global",)])
    expected = classifier.clip.get_text_features(padded, prompts=prompts).pooler_output
    found = shared_text_features(classifier.clip, padded, prompts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_images_of_any_size_are_refused(processor, tasks):
    with pytest.raises(ValueError, match="SigLIP 2 with a fixed resolution, which is a SiglipModel"):
        MultiTaskClassifier(build("siglip2"), processor, tasks, CONFIG)
