"""A PEFT tuner that checks an adapter before it changes the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from .fitting import check_adapter_name


class CheckedTuner(BaseTuner):
    """A tuner that leaves a model as it was if an adapter does not fit it."""

    target_module_mapping: ClassVar[dict[str, Any]] = {}
    no_merge: ClassVar[str]  # why adapters cannot be merged into the base
    no_rows: ClassVar[str]  # why the rows of a batch cannot have adapters of their own
    no_weighted_sum: ClassVar[str]  # why a weighted sum of adapters cannot be made

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        # PEFT and transformers set both of these before it is known whether the adapter fits.
        configs = getattr(model, "peft_config", None)
        configs_before = dict(configs or {})
        try:
            super().__init__(model, peft_config, adapter_name, **kwargs)
        except Exception:
            if configs is not None:
                configs.clear()
                configs.update(configs_before)
            else:
                model.__dict__.pop("_hf_peft_config_loaded", None)
            raise

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer) and adapter_name in module._all_available_adapter_names():
                raise ValueError(
                    f"The model already holds an adapter with the name {adapter_name!r}: {type(module).__name__} "
                    f"{name!r} has it, and would keep its old parameters. Write another `adapter_name`, or remove the "
                    f"old adapter first, by `unload()` or `delete_adapter({adapter_name!r})`."
                )
        config = self.peft_config[adapter_name]
        config.check_values()  # again: they may have been changed
        check_adapter_name(adapter_name, model, self.tuner_layer_cls.adapter_layer_names)
        self._check(model, adapter_name, config)
        kwargs.pop("state_dict", None)  # its keys name the container, never the modules that are changed
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check(self, model: nn.Module, adapter_name: str, config: PeftConfig) -> object:
        """Raise a `ValueError` if the adapter does not fit the model."""
        raise NotImplementedError

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT's way to give each row of a batch an adapter of its own: model(..., adapter_names=["x", "y"]).
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"{self.no_rows} Run the rows of each adapter as a batch of their own, after `set_adapter`, without "
                "`adapter_names`."
            )
        yield

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(self.no_merge)

    merge_and_unload = unmerge_adapter = merge_adapter

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(self.no_weighted_sum)
