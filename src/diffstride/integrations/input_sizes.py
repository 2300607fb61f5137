"""The sizes that reach the learnable layers of a model, observed from outside of the layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffstride.nn.strides import learnable_layers


class InputSizes:
    """An observer of the spatial sizes that reach each learnable layer of a model, until it is closed.

    While the strides of another layer are scaled, a layer may see another size than without. Such a size is kept only
    until a better one is known. The sizes are kept in hooks, because the layers' `forward` changes no state.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sizes: dict[str, tuple[int, ...]] = {}
        self._unscaled: set[str] = set()
        self._layers = dict(learnable_layers(model))
        self._handles = [
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, layer in self._layers.items()
        ]

    def _hook(self, name: str) -> Any:
        ndim = self._layers[name].ndim

        def remember(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            (x,) = args or kwargs.values()
            sizes = tuple(x.shape[-ndim:])
            if not all(type(n) is int for n in sizes):  # a trace runs the model with symbols
                return
            unscaled = not any(layer.is_scaled for layer in self._layers.values() if layer is not module)
            if unscaled or name not in self._unscaled:
                self.sizes[name] = sizes
            if unscaled:
                self._unscaled.add(name)

        return remember

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
