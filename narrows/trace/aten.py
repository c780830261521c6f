"""Op class, operations and touched elements of the kernels of torch (needs torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from narrows.core.tensor import Codec, Number

FREE = frozenset({
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh",
    "_local_scalar_dense", "set_", "resize_", "is_same_size", "_nested_tensor_size",
    "_version", "sym_size", "device", "_reshape_alias", "record_stream", "_assert_async",
})  # fmt: skip
"""Calls that launch no kernel (views are told by their storage)."""

CLASSES: Mapping[str, tuple[str, ...]] = {
    "matmul": ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm", "addmv", "mv", "dot",
               "addbmm"),
    "conv": ("convolution", "convolution_backward"),
    "softmax": ("_softmax", "_safe_softmax", "_log_softmax", "_softmax_backward_data",
                "_log_softmax_backward_data", "logsumexp"),
    "norm": ("native_layer_norm", "native_layer_norm_backward", "native_group_norm",
             "native_group_norm_backward", "native_batch_norm", "native_batch_norm_backward",
             "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
             "cudnn_batch_norm", "batch_norm_backward", "_batch_norm_with_update",
             "_batch_norm_no_update", "_fused_rms_norm", "_fused_rms_norm_backward"),
    "gather": ("embedding", "index", "index_select", "gather", "take", "index_put", "index_put_",
               "_index_put_impl_", "scatter", "scatter_", "scatter_add", "scatter_add_",
               "index_add", "index_add_", "embedding_dense_backward", "masked_select",
               "_embedding_bag", "_embedding_bag_forward_only", "index_copy", "index_copy_"),
    "copy": ("clone", "_to_copy", "copy_", "copy", "cat", "stack", "constant_pad_nd",
             "select_backward", "slice_backward", "slice_scatter", "select_scatter", "roll",
             "flip", "repeat", "as_strided_scatter", "unfold_backward", "im2col", "col2im",
             "pixel_shuffle", "split_with_sizes_copy", "tril", "triu", "zeros", "zeros_like",
             "ones", "ones_like", "full", "full_like", "new_zeros", "new_ones", "new_full",
             "scalar_tensor", "arange", "fill_", "zero_", "fill", "eye", "linspace",
             "repeat_interleave"),
    "reduce": ("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all",
               "var", "var_mean", "std", "prod", "cumsum", "cumprod", "norm", "linalg_vector_norm",
               "topk", "sort", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d",
               "max_pool2d_with_indices_backward", "avg_pool2d_backward",
               "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d", "nll_loss_forward",
               "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward", "mse_loss"),
    "optimizer": ("_fused_adamw_", "_fused_adam_", "_fused_sgd_"),
}  # fmt: skip
"""Op classes by kernel; what is not named is pointwise."""

_CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names}

PARTIAL = frozenset({
    "embedding", "index", "index_select", "gather", "take", "_embedding_bag",
    "_embedding_bag_forward_only",
})  # fmt: skip
"""Kernels that read of their first tensor only as much as they write."""

SCATTER = frozenset({
    "index_put_", "_index_put_impl_", "scatter_", "scatter_add_", "index_add_", "index_copy_",
})  # fmt: skip
"""Kernels that change of their first tensor only as much as their values hold."""

OVERWRITE = frozenset({"copy_", "fill_", "zero_", "index_copy_", "index_put_", "scatter_"})
"""In-place kernels that do not read what they replace."""

SOFTMAX, NORM = 5.0, 5.0
"""Operations an element: maximum, difference, exponent, sum, quotient; mean, variance, scale."""

_PLAIN = {
    torch.float64: ("fp64", 64), torch.float32: ("fp32", 32), torch.bfloat16: ("bf16", 16),
    torch.float16: ("fp16", 16), torch.int64: ("int64", 64), torch.int32: ("int32", 32),
    torch.int16: ("int16", 16), torch.int8: ("int8", 8), torch.uint8: ("int8", 8),
    torch.bool: ("bool", 8), torch.complex64: ("complex64", 64),
    torch.complex128: ("complex128", 128), torch.float8_e4m3fn: ("fp8", 8),
    torch.float8_e5m2: ("fp8", 8),
}  # fmt: skip

_CODECS = {dtype: Codec(name, bits) for dtype, (name, bits) in _PLAIN.items()}


def codec(dtype: torch.dtype) -> Codec:
    """How torch stores an element of a number format."""
    found = _CODECS.get(dtype)
    return found or Codec(str(dtype).removeprefix("torch."), dtype.itemsize * 8)


def precision(kind: str, dtype: torch.dtype) -> str:
    """The unit that computes: products in their own format, all else in fp32."""
    if dtype == torch.float64:
        return "fp64"
    if kind in ("matmul", "conv") and dtype in _CODECS and dtype.is_floating_point:
        return _CODECS[dtype].name
    if kind in ("matmul", "conv") and dtype in (torch.int8, torch.uint8):
        return "int8"
    return "fp32"


def kind_of(name: str) -> str:
    """Op class of a kernel by its base name (`add_`, `mm`, `native_layer_norm`)."""
    return _CLASS_OF.get(name) or _CLASS_OF.get(name.rstrip("_")) or "pointwise"


def touched(tensor: torch.Tensor) -> int:
    """Different elements a view reaches: a dimension of stride 0 repeats what it holds."""
    total = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        total *= 1 if stride == 0 and size else size
    return total


def flops(
    packet: Any, kind: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any,
    read: int, written: int,
) -> float:  # fmt: skip
    """Operations of one call; `read` and `written` are elements of its tensors.

    Products and convolutions by torch's own table, 2 for a multiply-add; others by element.
    """
    formula = flop_registry.get(packet)
    if formula is not None:
        return float(formula(*args, **kwargs, out_val=out))
    if packet is torch.ops.aten._grouped_mm:
        return 2.0 * out.numel() * args[0].shape[-1]
    if kind == "matmul":  # a vector on one side: not in torch's table
        sizes = [t.numel() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        return 2.0 * max(sizes, default=0)
    if kind in ("copy", "gather"):
        return 0.0
    if kind == "softmax":
        return SOFTMAX * written
    if kind == "norm":
        return NORM * max(read, written)
    return float(max(read, written) if kind == "reduce" else written)


def product_shape(kind: str, args: Sequence[Any], out: Any) -> dict[str, Number]:
    """Rows, columns, depth and batch of a product or a convolution, for the pricing of tiles."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if kind == "matmul" and isinstance(out, torch.Tensor) and out.dim() >= 2:
        left = next((t for t in tensors if t.dim() == out.dim() and t.shape[-2] == out.shape[-2]
                     and t is not out), None)  # fmt: skip
        if left is None:
            return {}
        if len(tensors) > 2 and tensors[0].shape == out.shape and left is tensors[0]:
            left = tensors[1]
        shape: dict[str, Number] = {"m": out.shape[-2], "n": out.shape[-1], "k": left.shape[-1]}
        if out.dim() > 2:
            shape["batch"] = math.prod(out.shape[:-2])
        return shape
    if kind == "conv" and isinstance(out, torch.Tensor) and len(tensors) > 1:
        weight = tensors[1]
        return {
            "m": out.shape[0] * math.prod(out.shape[2:]), "n": out.shape[1],
            "k": math.prod(weight.shape[1:]),
        }  # fmt: skip
    return {}
