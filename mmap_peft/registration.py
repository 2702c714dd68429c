"""Registers the methods of this library with PEFT. No other file changes PEFT's registries.

PEFT's own `register_peft_method` accepts members of its enum only, so its three mappings are filled here.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, TypeVar

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from . import methods, prompts
from .checking import shortened
from .methods.peft_configs import OTHER_PEFT_TYPES, PEFT_METHODS
from .prompts.base import PromptConfig
from .prompts.method import Method
from .tuner.model import PromptTuner


Config = TypeVar("Config", bound=type[PeftConfig])


def register_method(config_class: Config) -> Config:
    """Register a method with PEFT, so that PEFT and transformers load its adapters. Returns `config_class`.

    The methods of this library are registered on import. Use this function, for example as a class decorator, to
    register a method of your own. Its file must be imported before its adapters are loaded.

    Args:
        config_class (`type[PeftConfig]`): the method's config, with a class attribute `method`, a [`Method`]. A config
            that is not a `PromptConfig` also needs `tuner_class`, the `BaseTuner` that adds the method to a model.

    Raises:
        ValueError: the config has no `method`, or another method has the same `peft_type`.
    """
    method = getattr(config_class, "method", None)
    if not isinstance(method, Method):
        raise ValueError(
            f"{config_class.__name__} does not say which method it is for; give it a class attribute "
            "`method: ClassVar[Method] = Method(peft_type, name, learning_rate, source)`."
        )
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(method.peft_type, config_class)
    if (registered.__module__, registered.__qualname__) != (config_class.__module__, config_class.__qualname__):
        raise ValueError(
            f"peft_type={method.peft_type!r} of {config_class.__name__} is that of {registered.__name__}; write "
            "another one."
        )
    tuner_class = PromptTuner if issubclass(config_class, PromptConfig) else config_class.tuner_class
    PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[method.peft_type] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[method.peft_type] = tuner_class.prefix
    return config_class


def register_methods() -> None:
    """Register every method of this library: each config class in `prompts` and `methods` that defines `method`."""
    for package in (prompts, methods):
        for file in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for value in list(vars(importlib.import_module(file.name)).values()):
                if isinstance(value, type) and "method" in vars(value):
                    register_method(value)


def known_methods() -> dict[str, Method]:
    """All registered methods, and the methods of PEFT that this library has configs for, by `peft_type`."""
    registered = (getattr(config_class, "method", None) for config_class in PEFT_TYPE_TO_CONFIG_MAPPING.values())
    return {method.peft_type: method for method in (*registered, *PEFT_METHODS) if isinstance(method, Method)}


def check_peft_type(peft_type: Any) -> None:
    """Raise a `ValueError` if a classifier cannot train adapters of this `peft_type`."""
    known = sorted({*known_methods(), *OTHER_PEFT_TYPES} & set(PEFT_TYPE_TO_CONFIG_MAPPING))
    if not isinstance(peft_type, str) or peft_type not in known:
        raise ValueError(
            f"peft_type={shortened(peft_type)} is no method that a MultiTaskClassifier can train; those that it can "
            f"are {', '.join(known)}."
        )


def starting_learning_rate(config: PeftConfig) -> float:
    """A first learning rate for a method, of the usual order of magnitude. Tune it on validation images.

    Args:
        config (`PeftConfig`): the method's config.

    Raises:
        ValueError: this library has no learning rate for the method.
    """
    known = known_methods()
    if config.peft_type not in known:
        raise ValueError(
            f"There is no starting learning rate for {type(config).__name__}; methods with one are "
            f"{', '.join(sorted(known, key=lambda peft_type: (peft_type != 'MMAP', peft_type)))}."
        )
    return known[config.peft_type].learning_rate
