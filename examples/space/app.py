"""A page on which to try a model. The Space's variable MODEL is the model's name on the Hub."""

import os

from mmap_peft import MultiTaskClassifier
from mmap_peft.commands.app import make_page


MODEL = os.environ.get("MODEL", "me/clip-mmap-pictures")

make_page(MultiTaskClassifier.from_pretrained(MODEL), MODEL).launch(max_file_size="20mb")
