"""The map of the Newton-Schulz steps from covariance to root, step by step and with fewer matrix products.

The coefficients are printed by ``tools/fit_inverse_sqrt.py``; a test compares the maps in float64.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CHEBYSHEV", "QUINTICS", "chebyshev", "newton_schulz", "quintics"]

# For a number of Newton-Schulz steps: a polynomial in 2 a - 1 as pieces in T_0..T_3, times powers of T_4, lowest
# first. Largest relative error of the gain over all a in (0, 1]: 1.9e-4.
CHEBYSHEV = {
    5: (
        (2.20542060069384, -1.86077337070112, 0.996153550557659, -0.447584431534503),
        (0.475951740227891, -0.592667498680933, 0.342042032276589, -0.155695527881047),
        (0.145614537789611, -0.166673247568528, 0.0891134651429813, -0.0384159917491643),
        (0.0280063737702507, -0.0285892040248508, 0.0137395718168928, -0.00583655350905381),
    ),
}

# For a number of Newton-Schulz steps: odd quintic steps s <- s (c0 + c1 s^2 + c2 s^4) on s = sqrt(a). Largest
# relative error of the gain over all a in (0, 1]: 1.03e-2.
QUINTICS = {
    15: (
        (8.56619852803429, -25.2260355724214, 18.6811001912134),
        (3.89570759562297, -2.73248774389556, 0.491323073284283),
        (3.14575295552699, -2.2532635652539, 0.448398807941487),
        (2.22080808304747, -1.57623237076302, 0.403152653661639),
        (1.86070695825709, -1.26879264520149, 0.404324373228034),
    ),
}


def newton_schulz(a: Any, eye: Any, num_iters: int) -> Any:
    """The coupled iteration, without the products whose factor is the identity or whose result is unused.

    Like the other maps it takes a of Frobenius norm one, and the identity, of any kind that has sums, products, and
    multiples by a number: matrices, or what stands for them.
    """
    step = 1.5 * eye - 0.5 * a
    y, z = a, step
    for _ in range(num_iters - 1):
        y = y @ step
        step = 1.5 * eye - 0.5 * (z @ y)
        z = step @ z
    return z


def chebyshev(a: Any, eye: Any, num_iters: int) -> Any:
    """The map of 5 steps, in 6 products in place of 12.

    Paterson and Stockmeyer's scheme in the Chebyshev basis: three products for T_2 to T_4, three for Horner's rule.
    """
    pieces = CHEBYSHEV[num_iters]
    t1 = 2.0 * a - eye
    t2 = 2.0 * (t1 @ t1) - eye
    t3 = 2.0 * (t1 @ t2) - t1
    t4 = 2.0 * (t2 @ t2) - eye
    root = None
    for c0, c1, c2, c3 in reversed(pieces):
        piece = c0 * eye + c1 * t1 + c2 * t2 + c3 * t3
        root = piece if root is None else root @ t4 + piece
    return root


def quintics(a: Any, eye: Any, num_iters: int) -> Any:
    """The map of 15 steps, in 17 products in place of 42; coupled as Newton-Schulz is."""
    y, z = a, None
    steps = QUINTICS[num_iters]
    for last, (c0, c1, c2) in enumerate(steps, 1 - len(steps)):
        m = y if z is None else z @ y
        step = c0 * eye + c1 * m + c2 * (m @ m)
        z = step if z is None else step @ z
        if last:
            y = y @ step
    return z
