"""Where full fine-tuning and BitFit keep copies of a model's parameters, and put them in the place of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


Place = tuple[nn.Module, str]  # where a parameter is: its module, and its name there


class TunedParameters(nn.ParameterDict):
    """One adapter's copies of parameters. Its `forward` returns them: hooks that move parameters run before it."""

    __call__ = nn.Module.__call__  # which that of a ParameterDict refuses

    def forward(self) -> dict[str, nn.Parameter]:
        return {name.replace("/", "."): parameter for name, parameter in self.items()}


class ParameterContainer(nn.Module, BaseTunerLayer):
    """Child `tuned` of a model: holds each adapter's copies of parameters; modules use the active one's.

    An attribute of an instance goes before a parameter of the same name. So the copies are set as attributes of the
    modules, whose parameters, and with them the base's state, stay what they were. This is done when an adapter is
    activated, disabled or deleted. A forward pass only looks whether it is still so, and writes nothing, so that
    threads may share a model.

    Args:
        model (`nn.Module`): the base.
    """

    adapter_layer_names = ("tuned_parameters",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tuned_parameters = nn.ModuleDict()
        self.places: dict[str, Place] = {}
        self._active_adapter = []
        self._base = (model,)  # a tuple: as a child it would be saved a second time
        # Copies may be replaced (by loading, by moving), and a CLIP's towers may be run without the CLIP.
        self._hooks = [module.register_forward_pre_hook(self.refresh) for module in (model, *model.children())]

    def get_base_layer(self) -> nn.Module:
        """The base, which has no `weight` whose device and type all copies would have to take."""
        return self._base[0]

    def add(self, adapter_name: str, places: dict[str, Place]) -> None:
        """Add an adapter that starts as a copy of these parameters, given by their names."""
        # A dot would make a key's last part look like the parameter's name in a module.
        self.tuned_parameters[adapter_name] = TunedParameters(
            {name.replace(".", "/"): nn.Parameter(module._parameters[attribute].detach().clone())
             for name, (module, attribute) in places.items()}
        )  # fmt: skip
        self.places.update(places)

    def copies(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters, by the names of those whose place they take."""
        return self.tuned_parameters[adapter_name]()

    @property
    def current(self) -> dict[str, nn.Parameter]:
        """The active adapter's parameters, by the names of those whose place they take."""
        if self.disable_adapters:
            return {}
        # An active adapter of another method, which stands beside this one, has no parameters here.
        active = [name for name in self.active_adapters if name in self.tuned_parameters]
        return self.copies(active[0]) if active else {}

    def refresh(self, *_: Any) -> None:
        """Put the current parameters before the base's, and take those of others away, where it is not so yet."""
        current = self.current
        for name, (module, attribute) in self.places.items():
            if name not in current:
                module.__dict__.pop(attribute, None)
            elif module.__dict__.get(attribute) is not current[name]:
                module.__dict__[attribute] = current[name]

    def detach(self) -> None:
        """Leave the base as it was."""
        for module, attribute in self.places.values():
            module.__dict__.pop(attribute, None)
        for hook in self._hooks:
            hook.remove()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """As PEFT's, for one adapter at a time.

        Raises:
            ValueError: more than one.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_single([name for name in names if name in self.tuned_parameters])
        super().set_adapter(names, inference_mode)
        self.refresh()

    @staticmethod
    def check_single(adapter_names: Sequence[str]) -> None:
        """Raise a `ValueError` if these are several adapters."""
        if len(adapter_names) > 1:
            raise ValueError(
                f"Adapters {', '.join(adapter_names)} would each take the place of the base's parameters; activate "
                "one of them."
            )

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.refresh()  # before the places are forgotten
        used = {name for adapter in self.tuned_parameters for name in self.copies(adapter)}
        self.places = {name: place for name, place in self.places.items() if name in used}

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Adapters are merged as the base is returned, and not before.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "A tuned parameter replaces the base's, and cannot be taken out again; write model.merge_and_unload(), or "
            "keep the adapter."
        )

    def unmerge(self) -> NoReturn:
        """As `merge`."""
        self.merge()
