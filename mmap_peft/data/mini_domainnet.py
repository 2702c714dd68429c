"""MiniDomainNet: 126 classes of DomainNet in four of its six domains.

Source: Zhou et al., *Domain Adaptive Ensemble Learning*, IEEE TIP 2021, with the classes of Saito et al.,
*Semi-supervised Domain Adaptation via Minimax Entropy*, ICCV 2019. The images are DomainNet's: Peng et al., *Moment
Matching for Multi-Source Domain Adaptation*, ICCV 2019.
"""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

from datasets import Dataset

from .domains import read_domains
from .folders import short
from .splits import Split, split_of_lists


DOMAINS = ["clipart", "painting", "real", "sketch"]
CLASS_NAMES = Path(__file__).with_name("mini_domainnet_classes.txt").read_text().split()


def read_mini_domainnet(data: str) -> dict[str, Dataset]:
    """Read MiniDomainNet's domains and classes from DomainNet, as `read_domains` does. Labels count `CLASS_NAMES`.

    Args:
        data: DomainNet's folder as downloaded (`data/clipart/aircraft_carrier/clipart_001_000001.jpg`), or the name
            on the Hub of a data set with the columns `image`, `domain` and `label`, such as `"wltjr1007/DomainNet"`.

    Raises:
        ValueError: a domain or a class is missing.
    """
    return read_domains(data, DOMAINS, CLASS_NAMES)


def read_mini_lists(folder: str | os.PathLike) -> Split:
    """Read the lists that come with MiniDomainNet, by `split_of_lists`: `clipart_train.txt`, `clipart_test.txt` and so
    on for each domain, with lines `clipart/aircraft_carrier/clipart_001_000001.jpg 0`.

    Args:
        folder: `splits_mini` as the Dassl toolbox ships it.

    Raises:
        ValueError: as for `split_of_lists`; or a list is missing, or a class is not one of `CLASS_NAMES`.
    """
    train, test = (
        {name: Path(folder).expanduser() / f"{name}_{part}.txt" for name in DOMAINS} for part in ("train", "test")
    )
    for path in [*train.values(), *test.values()]:
        if not path.exists():
            raise ValueError(
                f"{short(folder)} has no {path.name}; give the folder of MiniDomainNet's lists, splits_mini."
            )
    split = split_of_lists(train, test, {"lists": "MiniDomainNet"})
    for file in chain(*split.train.values(), *split.eval.values()):
        if file.split("/")[1] not in CLASS_NAMES:
            raise ValueError(
                f"The lists name {short(file)}, whose class is not in MiniDomainNet; give the lists of MiniDomainNet."
            )
    return split
