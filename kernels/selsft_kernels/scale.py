"""Multiplying a finished gradient by the incoming scalar.

The scalar is on the device, and often 1: where the weights of the tokens hold the normalisation already, there is
nothing to do, and a pass over the gradient of a large head costs as much as a tenth of its product.
"""

import torch
from torch import Tensor


def scale_in_place(grad: Tensor, factor: Tensor) -> None:
    """`grad *= factor`; grad of any shape, contiguous; factor [1] fp32.

    A factor of shape [1] takes part in type promotion where a scalar does not, so that `1 / N` is not rounded to bf16
    before the product.
    """
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return
    torch.mul(grad, factor, out=grad)


def scale_into(out: Tensor, rows: Tensor, grad: Tensor, factor: Tensor) -> None:
    """`out[rows] = factor * grad`; out [N, H], rows [M] int64, grad [M, H], both contiguous, factor [1] fp32.

    No matrix product writes through an index. This pass does, which the multiplication needs anyway.
    """
    out.index_copy_(0, rows, (grad * factor).to(out.dtype))
