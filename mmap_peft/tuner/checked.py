"""A PEFT tuner that looks before it changes anything."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn


class CheckedTuner(BaseTuner):
    """A tuner whose adapters live in a container, and whose settings are checked before a model is touched."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check that the adapter fits before anything is changed, then add it."""
        try:
            self._check(model, adapter_name, self.peft_config[adapter_name])
        except ValueError:
            if len(self.peft_config) > 1:  # several adapters: the others go on as if nothing had been tried
                del self.peft_config[adapter_name]
            raise
        kwargs.pop("state_dict", None)  # its keys name the container, never the modules that are changed
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check(self, model: nn.Module, adapter_name: str, config: PeftConfig) -> None:
        """Raise a `ValueError` if the adapter does not fit the model."""
        raise NotImplementedError
