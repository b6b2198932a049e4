"""Prints tanh_table.h: ``python csrc/cpu/base/tanh_table.py > csrc/cpu/base/tanh_table.h``.

tanh(x), x >= 0, in 32 segments, four to an octave from 1/16 on; the first one begins at 0. In a segment it is
y + t (c[1] + t (c[2] + ...)), t = x - centre. A centre is the number near the middle of its segment whose tanh a
float32 holds best, so that y adds no error of its own; c minimises the relative error at Chebyshev nodes, each
coefficient rounded before the next ones are fitted.
"""

import numpy as np

DEGREE, LOWEST, HIGHEST = 5, 2.0**-4, 15.5
Exact = np.longdouble


def centre_of(low: float, high: float) -> np.float32:
    middle = np.float32((low + high) / 2)
    near = (middle.view(np.int32) + np.arange(-4096, 4096, dtype=np.int32)).view(np.float32)
    exact = np.tanh(near.astype(Exact))
    error = np.abs(exact - exact.astype(np.float32)) / np.spacing(exact.astype(np.float32))
    return near[np.argmin(error)]


def segment(low: float, high: float) -> list[np.float32]:
    """Centre, y, c[1], ..., c[DEGREE]."""
    centre = np.float32(0) if low == 0 else centre_of(low, high)
    y = np.tanh(Exact(centre)).astype(np.float32)
    nodes = 0.5 - 0.5 * np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    t = low + (high - low) * nodes.astype(Exact) - Exact(centre)
    value = np.tanh(Exact(centre) + t)
    left = value - Exact(y)
    found = []
    for power in range(1, DEGREE + 1):
        columns = np.stack([t**p / value for p in range(power, DEGREE + 1)], 1).astype(np.float64)
        solution = np.linalg.lstsq(columns, (left / value).astype(np.float64), rcond=None)[0]
        c = np.float32(solution[0])
        if low == 0 and (power == 1 or power % 2 == 0):  # tanh is odd, and x itself at 0
            c = np.float32(power == 1)
        found.append(c)
        left -= Exact(c) * t**power
    return [centre, y, *found]


def table() -> np.ndarray:
    """[2 + DEGREE, 32], a segment at the last five bits of its exponent and first two digits behind the point."""
    values = np.zeros((2 + DEGREE, 32), np.float32)
    for octave in range(-4, 4):
        for quarter in range(4):
            low, high = (2.0**octave * (1 + q / 4) for q in (quarter, quarter + 1))
            at = (octave + 127) * 4 + quarter & 31
            values[:, at] = segment(0 if low == LOWEST else low, high)
    return values


if __name__ == "__main__":
    print("// Written by tanh_table.py, which says what it is.")
    print("#pragma once\n\nnamespace seqaccel {\n")
    print(f"constexpr float kTanhLowest = {LOWEST}f, kTanhHighest = {HIGHEST}f;")
    print(f"constexpr int kTanhDegree = {DEGREE};")
    print("// clang-format off\n// Centre, y, c[1], ... of every segment.")
    print("alignas(64) constexpr float kTanhTable[kTanhDegree + 2][32] = {")
    for row in table():
        numbers = [f"{np.format_float_scientific(value, trim='0')}f" for value in row]
        lines = [", ".join(numbers[i : i + 8]) for i in range(0, 32, 8)]
        print("    {" + ",\n     ".join(lines) + "},")
    print("};\n\n}  // namespace seqaccel")
