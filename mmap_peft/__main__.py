"""The command `mmap-peft` as `python -m mmap_peft`, and for several processes `accelerate launch -m mmap_peft`."""

import sys

from mmap_peft_cli import main


if __name__ == "__main__":
    sys.exit(main())
