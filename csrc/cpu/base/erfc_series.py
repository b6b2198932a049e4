"""Writes erfc_series.h: the Chebyshev series that erfc_vec sums.

With t = 2 / (2 + z), z >= 0, erfc(z) = t exp(-z^2 + S(t)) where S is smooth on (0, 1]. The series of S in 2 t - 1, cut
where its terms fall below a tenth of a rounding error of each type, is the header. Needs mpmath.

    python csrc/cpu/base/erfc_series.py > csrc/cpu/base/erfc_series.h
"""

import mpmath as mp

NODES = 200
mp.mp.dps = 50


def smooth(t: mp.mpf) -> mp.mpf:
    z = 2 / t - 2
    return mp.log(mp.erfc(z)) + z * z - mp.log(t)


def series(terms: int) -> list[mp.mpf]:
    nodes = [mp.cos(mp.pi * (k + mp.mpf(1) / 2) / NODES) for k in range(NODES)]
    values = [smooth((x + 1) / 2) for x in nodes]
    pairs = list(zip(values, nodes, strict=True))
    sums = [mp.fsum(value * mp.cos(j * mp.acos(x)) for value, x in pairs) for j in range(terms)]
    return [(2 if j else 1) / mp.mpf(NODES) * total for j, total in enumerate(sums)]


def main() -> None:
    print("// Written by erfc_series.py.\n// clang-format off: a line each\n#pragma once\n")
    print("namespace seqaccel::inline base {\n")
    every = series(40)
    for kind, suffix, least, digits in (("float", "f", 6e-9, 10), ("double", "", 1e-17, 20)):
        kept = [c for j, c in enumerate(every) if any(abs(later) > least for later in every[j:])]
        print(f"constexpr {kind} kErfcSeries{kind.capitalize()}[] = {{")
        for coefficient in kept:
            print(f"    {mp.nstr(coefficient, digits)}{suffix},")
        print("};\n")
    print("}  // namespace seqaccel::inline base")


if __name__ == "__main__":
    main()
