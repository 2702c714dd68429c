"""MiniDomainNet: 126 classes of DomainNet in four of its six domains.

Source: Zhou et al., *Domain Adaptive Ensemble Learning*, IEEE TIP 2021, with the classes of Saito et al.,
*Semi-supervised Domain Adaptation via Minimax Entropy*, ICCV 2019. The images are DomainNet's: Peng et al., *Moment
Matching for Multi-Source Domain Adaptation*, ICCV 2019.
"""

from __future__ import annotations

import os
from pathlib import Path

from datasets import Dataset

from .domains import read_domains
from .splits import Split, split_of_lists


DOMAINS = ["clipart", "painting", "real", "sketch"]
# fmt: off
CLASS_NAMES = [
    "aircraft_carrier", "alarm_clock", "ant", "anvil", "asparagus", "axe", "banana", "basket", "bathtub", "bear",
    "bee", "bird", "blackberry", "blueberry", "bottlecap", "broccoli", "bus", "butterfly", "cactus", "cake",
    "calculator", "camel", "camera", "candle", "cannon", "canoe", "carrot", "castle", "cat", "ceiling_fan", "cello",
    "cell_phone", "chair", "chandelier", "coffee_cup", "compass", "computer", "cow", "crab", "crocodile",
    "cruise_ship", "dog", "dolphin", "dragon", "drums", "duck", "dumbbell", "elephant", "eyeglasses", "feather",
    "fence", "fish", "flamingo", "flower", "foot", "fork", "frog", "giraffe", "goatee", "grapes", "guitar", "hammer",
    "helicopter", "helmet", "horse", "kangaroo", "lantern", "laptop", "leaf", "lion", "lipstick", "lobster",
    "microphone", "monkey", "mosquito", "mouse", "mug", "mushroom", "onion", "panda", "peanut", "pear", "peas",
    "pencil", "penguin", "pig", "pillow", "pineapple", "potato", "power_outlet", "purse", "rabbit", "raccoon",
    "rhinoceros", "rifle", "saxophone", "screwdriver", "sea_turtle", "see_saw", "sheep", "shoe", "skateboard", "snake",
    "speedboat", "spider", "squirrel", "strawberry", "streetlight", "string_bean", "submarine", "swan", "table",
    "teapot", "teddy-bear", "television", "The_Eiffel_Tower", "The_Great_Wall_of_China", "tiger", "toe", "train",
    "truck", "umbrella", "vase", "watermelon", "whale", "zebra",
]
# fmt: on


def read_mini_domainnet(data: str) -> dict[str, Dataset]:
    """MiniDomainNet's domains and classes of DomainNet.

    Args:
        data: DomainNet's folder as downloaded (`data/clipart/aircraft_carrier/clipart_001_000001.jpg`), or the name
            on the Hub of a data set with the columns `image`, `domain` and `label`, such as `"wltjr1007/DomainNet"`.
            What else it holds is left out.

    Returns:
        What `read_domains` returns; labels number `CLASS_NAMES`.

    Raises:
        ValueError: a domain or a class is missing.
    """
    return read_domains(data, DOMAINS, CLASS_NAMES)


def read_mini_lists(folder: str | os.PathLike) -> Split:
    """The lists that come with MiniDomainNet: `folder/clipart_train.txt`, `folder/clipart_test.txt` and so on for each
    domain, with lines `clipart/aircraft_carrier/clipart_001_000001.jpg 0`.

    Labels come from the classes' names in the paths. How the lists number the classes makes no difference, as long as
    they agree.

    Args:
        folder: `splits_mini` as the Dassl toolbox ships it.

    Raises:
        ValueError: a list is missing, a line is not of this form, a class is not one of `CLASS_NAMES`, or lines
            number the classes differently.
    """
    lists = [{name: Path(folder) / f"{name}_{part}.txt" for name in DOMAINS} for part in ("train", "test")]
    for path in [*lists[0].values(), *lists[1].values()]:
        if not path.is_file():
            raise ValueError(f"{folder} has no {path.name}; give the folder of MiniDomainNet's lists, splits_mini.")
    split = split_of_lists(*lists, {"lists": "MiniDomainNet"})
    for files in [*split.train.values(), *split.eval.values()]:
        for file in files:
            if file.split("/")[1] not in CLASS_NAMES:
                raise ValueError(
                    f"The lists in {folder} name {file!r}, whose class is not one of MiniDomainNet's "
                    f"{len(CLASS_NAMES)}; give its own lists, not those of all of DomainNet."
                )
    return split
