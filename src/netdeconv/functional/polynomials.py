"""The map of the Newton-Schulz steps from covariance to root, step by step and with fewer matrix products.

The coefficients are printed by ``tools/fit_inverse_sqrt.py``; a test compares the maps in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from netdeconv.functional.tracing import cached_constant, caching_is_unsafe

__all__ = [
    "CHEBYSHEV",
    "QUINTICS",
    "chebyshev",
    "chebyshev_gradient",
    "chebyshev_stages",
    "newton_schulz",
    "quintics",
]

# For a number of Newton-Schulz steps: a polynomial in 2 a - 1 as pieces in T_0..T_(s - 1), times powers of T_s, lowest
# first. Largest relative error of the gain over all a in (0, 1]: rounding for 1 and 2 steps, 1.6e-4 for 3, 3.9e-4 for
# 4, 1.9e-4 for 5.
CHEBYSHEV: dict[int, tuple[tuple[float, ...], ...]] = {
    1: ((1.25, -0.25),),
    2: (
        (1.5048828125, -0.59765625),
        (0.119140625, -0.02734375),
        (0.0009765625,),
    ),
    3: (
        (1.76088636497921, -1.03858955526717, 0.347402145168415),
        (-0.130519732299248, 0.0757685319633937, -0.0180462669018896),
        (0.00325602214526453,),
    ),
    4: (
        (1.9792898741112204, -1.4162021577518207, 0.564520731222359),
        (-0.3875238233301311, 0.3789751911167981, -0.1512103500616851),
        (0.08193720195364343, -0.06746879067695051, 0.025334913137741798),
        (-0.008046183636771202,),
    ),
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


def newton_schulz(a: Tensor, eye: Tensor, num_iters: int) -> Tensor:
    """The coupled iteration, without the products whose factor is the identity or whose result is unused.

    Like the other maps it takes a of Frobenius norm one, and the identity: matrices ``(n, n)``, or equally many of them
    ``(batch, n, n)``.
    """
    (step,) = _combined(((1.5, -0.5),), (eye, a))
    y, z = a, step
    for _ in range(num_iters - 1):
        y = y @ step
        step = _product(-0.5, z, y, 1.5, eye)
        z = step @ z
    return z


def chebyshev(a: Tensor, eye: Tensor, num_iters: int) -> Tensor:
    """The map of 1 to 5 steps, in 0, 2, 3, 4 or 6 products in place of 0, 3, 6, 9 or 12.

    Paterson and Stockmeyer's scheme in the Chebyshev basis: products for T_2 to T_s, then Horner's rule in T_s.
    """
    return chebyshev_stages(a, eye, num_iters)[1][-1]


def chebyshev_stages(a: Tensor, eye: Tensor, num_iters: int) -> tuple[list[Tensor], list[Tensor]]:
    """T_0 to T_s, and what Horner's rule has after each of its steps, of which the last is the root."""
    pieces = CHEBYSHEV[num_iters]
    size = len(pieces[0])
    (t1,) = _combined(((-1.0, 2.0),), (eye, a))
    if len(pieces) == 1:
        return [eye, t1], [_sum(pieces[0], (eye, t1))]
    basis = [eye, t1]
    for degree in range(2, size + 1):  # T_(m + n) = 2 T_m T_n - T_|m - n|
        low, high = degree // 2, degree - degree // 2
        basis.append(_product(2.0, basis[low], basis[high], -1.0, basis[high - low]))
    *terms, power = basis
    whole = [piece for piece in pieces if len(piece) == size]
    *lower, root = _combined(tuple(whole), tuple(terms))
    if len(whole) < len(pieces):  # a last piece that is a number needs no product
        root = torch.add(root, power, alpha=pieces[-1][0])
    stages = [root]
    for piece in reversed(lower):
        stages.append(_product(1.0, stages[-1], power, 1.0, piece))
    return basis, stages


def chebyshev_gradient(grad: Tensor, basis: list[Tensor], stages: list[Tensor], num_iters: int) -> Tensor:
    """The gradient of a, symmetric, from a symmetric one of the root: :func:`chebyshev_stages` backwards.

    All are polynomials of the symmetric a, so that nothing but the symmetric part of any gradient counts.
    """
    pieces = CHEBYSHEV[num_iters]
    size = len(pieces[0])
    whole = [piece for piece in pieces if len(piece) == size]
    of_basis: list[Tensor | None] = [None] * (size + 1)

    def add(degree: int, value: Tensor, alpha: float) -> None:
        before = of_basis[degree]
        of_basis[degree] = value * alpha if before is None else torch.add(before, value, alpha=alpha)

    for place, piece in enumerate(whole):
        for degree, coefficient in enumerate(piece[1:], 1):
            add(degree, grad, coefficient)
        if place < len(whole) - 1:  # the stage before this one, times the power, plus the piece
            add(size, stages[-2 - place] @ grad, 1.0)
            grad = _symmetric(grad @ basis[size])
    if len(whole) < len(pieces):
        add(size, grad, pieces[-1][0])
    for degree in range(size, 1, -1):
        high, low = degree - degree // 2, degree // 2
        found = of_basis[degree]
        if found is None:
            continue
        found = _symmetric(found)
        add(low, found @ basis[high], 2.0)
        add(high, found @ basis[low], 2.0)
        if high > low:
            add(high - low, found, -1.0)
    first = of_basis[1]
    assert first is not None
    return _symmetric(first).mul_(2)


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT).mul_(0.5)


def quintics(a: Tensor, eye: Tensor, num_iters: int) -> Tensor:
    """The map of 15 steps, in 17 products in place of 42; coupled as Newton-Schulz is."""
    y, z = a, None
    steps = QUINTICS[num_iters]
    for last, (c0, c1, c2) in enumerate(steps, 1 - len(steps)):
        m = y if z is None else z @ y
        (low,) = _combined(((c0, c1),), (eye, m))
        step = _product(c2, m, m, 1.0, low)
        z = step if z is None else step @ z
        if last:
            y = y @ step
    assert z is not None
    return z


def _product(factor: float, x: Tensor, y: Tensor, share: float, plus: Tensor) -> Tensor:
    """``factor * x @ y + share * plus``, in one operator."""
    return (torch.addmm if x.dim() == 2 else torch.baddbmm)(plus, x, y, beta=share, alpha=factor)


def _combined(table: tuple[tuple[float, ...], ...], terms: tuple[Tensor, ...]) -> list[Tensor]:
    """For every row of the table the sum of the terms with these coefficients."""
    # Term by term where a compiler makes one pass of it, or a CUDA graph would not bear the table coming from the CPU.
    if len(table) == 1 or caching_is_unsafe():
        return [_sum(coefficients, terms) for coefficients in table]
    together = torch.stack(terms)  # one pass over all of them
    sums = _matrix(table, together.dtype, together.device) @ together.reshape(len(terms), -1)
    return list(sums.reshape(len(table), *terms[0].shape))


def _sum(coefficients: tuple[float, ...], terms: tuple[Tensor, ...]) -> Tensor:
    total = coefficients[0] * terms[0]
    for coefficient, term in zip(coefficients[1:], terms[1:], strict=True):
        total = torch.add(total, term, alpha=coefficient)
    return total


@cached_constant
def _matrix(table: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(table, dtype=dtype, device=device)
