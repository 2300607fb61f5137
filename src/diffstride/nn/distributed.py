"""Keep strides whole where training shards parameters over processes."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from diffstride.nn.strides import learnable_layers


def replicate_strides(model: nn.Module, group: dist.ProcessGroup | None = None) -> set[nn.Parameter]:
    """Keep the strides whole and equal in every process, where a model's other parameters are sharded.

    Strides decide sizes, so every process needs all of them. From now on the gradient of each is averaged over the
    group at each backward pass, as the sharded ones are. Pass the result to `fully_shard`, which then ignores them:

        fully_shard(model, ignored_params=ds.replicate_strides(model))

    `DistributedDataParallel` does not need this, since it keeps all parameters equal.

    Args:
        model: any module, on its device, before it is sharded; rank 0 of the group gives the values.
        group: the processes that have different data; None for all.

    Returns:
        The strides, each once; empty where the model has none.

    Raises:
        ValueError: there is no process group, or a stride is on the meta device or sharded already.
    """
    if not dist.is_initialized():
        raise ValueError("group must be initialized, got none: call torch.distributed.init_process_group first")
    found: dict[str, Tensor] = {
        f"{name}.{i}" if i else name: stride
        for name, layer in learnable_layers(model)
        for i, stride in enumerate(layer.stride_parameters)
    }
    for name, stride in found.items():
        if stride.is_meta:
            raise ValueError(f"the stride of {name} must have values, got none on the meta device: use to_empty first")
        if type(stride.data) is not Tensor:
            raise ValueError(f"the stride of {name} must be whole, got a {type(stride.data).__name__}: shard later")
    size = dist.get_world_size(group)

    def average(stride: Tensor) -> None:
        # Also right for the sum of several passes: an earlier average is equal everywhere, and stays.
        assert stride.grad is not None
        dist.all_reduce(stride.grad, group=group)
        stride.grad.div_(size)

    for stride in found.values():
        dist.broadcast(stride.detach(), group=group, group_src=0)
        if stride.requires_grad:
            stride.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
    return {stride for stride in found.values() if isinstance(stride, nn.Parameter)}
