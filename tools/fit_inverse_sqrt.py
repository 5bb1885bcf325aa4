"""Fit the coefficients in netdeconv/functional/polynomials.py: python tools/fit_inverse_sqrt.py

The target is the map of k coupled Newton-Schulz steps from the eigenvalue a in (0, 1] to its gain
``z(a) = s_k / sqrt(a)``, ``s_0 = sqrt(a)``, ``s <- s (3 - s^2) / 2``.

- `chebyshev` fits one polynomial in ``2 a - 1``, minimax in relative error, by Lawson's reweighting, and divides it
  into pieces, times powers of T_s, which is how it is evaluated. For 2 steps it is the map itself, which has degree 4.
- `quintics` fits a chain of odd quintic steps ``s <- s (c0 + c1 s^2 + c2 s^4)`` by reweighted least squares of the
  relative error of the gain, from minimax steps of the same slope at zero.

Prints the tables as Python source, with the largest relative error of the gain on a fine grid. Needs numpy and scipy.
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial import chebyshev as cheb
from scipy.optimize import least_squares


def gain(a: np.ndarray, num_iters: int) -> np.ndarray:
    """Gain of an eigenvalue of relative size a after the Newton-Schulz steps."""
    s = np.sqrt(a)
    for _ in range(num_iters):
        s = s * (3 - s * s) / 2
    return s / np.sqrt(a)


def grid(points: int = 20_001) -> np.ndarray:
    """Relative eigenvalues, dense towards zero in the way of the Chebyshev points and logarithmically besides."""
    return np.unique(np.r_[np.logspace(-12, 0, points), (1 - np.cos(np.linspace(0, np.pi, points))[1:]) / 2])


def chebyshev(num_iters: int, degree: int, size: int) -> tuple[list[list[float]], float]:
    """Pieces of degree below ``size``, low powers of T_size first, of the minimax polynomial, and its error."""
    a = grid(4001)
    target = gain(a, num_iters)
    basis = cheb.chebvander(2 * a - 1, degree) / target[:, None]
    weight = np.full(a.size, 1 / a.size)
    best, smallest = None, np.inf
    for _ in range(2000):
        root = np.sqrt(weight)
        coefficients = np.linalg.lstsq(basis * root[:, None], root, rcond=None)[0]
        error = np.abs(basis @ coefficients - 1)
        if error.max() < smallest:
            best, smallest = coefficients, error.max()
        weight *= error**0.5  # slower than Lawson's first power, but it does not starve points of weight
        weight /= weight.sum()
    pieces, divisor = [], np.r_[np.zeros(size), 1]
    while len(best) > size:
        best, rest = cheb.chebdiv(best, divisor)
        pieces.append(rest)
    pieces.append(best)
    return [list(map(float, piece)) for piece in pieces], chebyshev_error(pieces, num_iters, size)


def chebyshev_error(pieces: list, num_iters: int, size: int) -> float:
    a = grid()
    x = 2 * a - 1
    value = np.zeros_like(a)
    for piece in reversed(pieces):
        value = value * np.cos(size * np.arccos(x.clip(-1, 1))) + cheb.chebval(x, piece)
    return float(np.abs(value / gain(a, num_iters) - 1).max())


def quintic_gain(a: np.ndarray, steps: np.ndarray) -> np.ndarray:
    s = np.sqrt(a)
    for c0, c1, c2 in steps:
        s = s * (c0 + c1 * s**2 + c2 * s**4)
    return s / np.sqrt(a)


def minimax_quintics(lower: float, count: int) -> np.ndarray:
    """Odd quintics that bring [lower, 1] nearest to one step by step (equioscillation, by Newton's method)."""
    steps, upper = [], 1.0
    for _ in range(count):
        s = np.linspace(lower, upper, 4001)
        basis = np.stack([s, s**3, s**5], 1)
        weight = np.full(s.size, 1 / s.size)
        for _ in range(3000):
            root = np.sqrt(weight)
            c = np.linalg.lstsq(basis * root[:, None], root, rcond=None)[0]
            error = np.abs(basis @ c - 1)
            weight *= error**0.5
            weight /= weight.sum()
        steps.append(c)
        lower, upper = 1 - error.max(), 1 + error.max()
    return np.array(steps)


def quintics(num_iters: int, count: int) -> tuple[np.ndarray, float]:
    """Steps of the chain, and the largest relative error of its gain."""
    a = grid(2001)
    target = gain(a, num_iters)
    steps = minimax_quintics(2 / 1.5**num_iters, count)
    steps[0] *= 1.5**num_iters / np.prod(steps[:, 0])  # the slope at zero is the largest gain
    weight = np.ones_like(a)
    best, smallest = steps, np.inf
    for _ in range(40):
        steps = least_squares(
            lambda c, w=weight: w * (quintic_gain(a, c.reshape(-1, 3)) / target - 1), steps.ravel(), method="lm"
        ).x.reshape(-1, 3)
        error = np.abs(quintic_gain(a, steps) / target - 1)
        if error.max() < smallest:
            best, smallest = steps, error.max()
        weight *= (error / error.max() + 1e-3) ** 0.25  # Lawson's reweighting, slowed down
        weight /= weight.mean()
    fine = grid()
    return best, float(np.abs(quintic_gain(fine, best) / gain(fine, num_iters) - 1).max())


def main() -> None:
    for num_iters, degree, size in ((2, 4, 2), (3, 6, 3), (4, 9, 3), (5, 15, 4)):
        pieces, error = chebyshev(num_iters, degree, size)
        print(f"# {num_iters} steps, degree {degree}: largest relative error of the gain {error:.1e}")
        for piece in pieces:
            print("    (" + ", ".join(f"{value:.15g}" for value in piece) + "),")
    steps, error = quintics(15, 5)
    print(f"# 15 steps, 5 quintics: largest relative error of the gain {error:.1e}")
    for step in steps:
        print("    (" + ", ".join(f"{value:.15g}" for value in step) + "),")


if __name__ == "__main__":
    main()
