"""Which kernels multiply matrices."""

from __future__ import annotations

from typing import Literal

Kernels = Literal["float32", "fast"]

# between the error of float32 sums (below 1e-6) and of bfloat16 factors (above 1e-3)
_EXACT = 1e-5


def product_error(precision: str, device: str = "cpu") -> float:
    """Return the largest error of a product of 512 x 256 by 256 x 256 normal numbers, relative to its largest entry.

    Args:
        precision: ``highest``, ``high`` or ``medium``, see ``torch.set_float32_matmul_precision``.
        device: that multiplies.
    """
    import torch  # here, so that a configuration can name its kernels without loading it

    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(n, 256, generator=generator, dtype=torch.float32) for n in (512, 256))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = (one.to(device) @ two.to(device)).double().cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    exact = one.double() @ two.double()
    return float((found - exact).abs().max() / exact.abs().max())


def set_kernels(kind: Kernels, device: str = "cpu") -> str:
    """Choose the kernels of this process; return the name of PyTorch's setting.

    ``medium`` lets PyTorch round factors to bfloat16. Processors that gain nothing from that keep float32 and take
    other kernels, which on AMD's with AVX-512 are twice as fast as the default ones and as exact; Intel's with AMX
    round, and so do GPUs with TF32. So ``fast`` multiplies once and looks.

    Args:
        kind: ``float32``: the default kernels; ``fast``: those of ``medium``, unless they round.
        device: that computes, ``cpu`` or ``cuda``.
    """
    import torch

    chosen = "medium" if kind == "fast" and product_error("medium", device) < _EXACT else "highest"
    torch.set_float32_matmul_precision(chosen)
    return chosen
