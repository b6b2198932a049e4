"""Scalar functions of tiles, each once: float32, and float64 for the scans.

The error is at most 4 eps of the value. NaN stays NaN, and the limits are exact.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    # e^-x may overflow: 1 / inf is 0, the limit.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # (1 - e) / (1 + e) loses relative accuracy near 0, where 1 - e cancels.
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    y = x * x
    if x.dtype == tl.float64:
        # The Pade approximant [7/6] has an error below 1e-17 for |x| < 0.25.
        near = x * (135135.0 + y * (17325.0 + y * (378.0 + y))) / (135135.0 + y * (62370.0 + y * (3150.0 + y * 28.0)))
        return tl.where(tl.abs(x) < 0.25, near, far)
    # The series to x^9 is exact to rounding for |x| < 0.2.
    near = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.2, near, far)


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def normal_below(x):
    """The distribution function of the standard normal distribution; its error is absolute."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
