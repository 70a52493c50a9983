"""GPTQ of one matrix (Frantar et al. 2022, arXiv:2210.17323), in float64 on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

_DAMPING, _LEAST_DAMPING = 0.01, 1e-10
_BLOCK = 128


def gptq(
    w: Matrix, gram: Matrix, scales: Matrix, *, least: int = -8, most: int = 7, damping: float = _DAMPING
) -> npt.NDArray[np.int64]:
    """Codes c with a small error of the products, tr(D^T G D) for D = w - c scales.

    Inputs are rounded one after the other, those with the largest activations first (act-order), and what each rounding
    does wrong is made up for, as well as it can be, by the inputs that are not rounded yet: the second-order update of
    the paper's equation 2, in its Cholesky form (section 3.3, steps 2 and 3), in blocks of 128. The scales stay as they
    are ("static groups"), so that no order of inputs has to be kept. Of each output the better of this and plain
    rounding is taken: GPTQ is greedy and can lose.

    Args:
        w: [I, O].
        gram: [I, I], the sum of x x^T over the calibration tokens.
        scales: [I, O], of each number.
        least, most: codes.
        damping: part of the diagonal's mean that is added to the diagonal; more is taken where the matrix is still
            not positive definite in float64.

    Returns:
        [I, O].
    """
    steps: Matrix = np.where(scales == 0, 1, scales)

    def nearest(rows: Matrix, at: Any) -> Matrix:
        return np.clip(np.round(rows / steps[at]), least, most)

    order = np.argsort(-np.diag(gram), kind="stable")
    upper = _inverse_root(gram[np.ix_(order, order)], damping)
    rest, codes = w[order], np.empty(w.shape)
    for begin in range(0, len(w), _BLOCK):
        end = min(begin + _BLOCK, len(w))
        errors = np.empty((end - begin, w.shape[1]))
        for i in range(begin, end):
            codes[order[i]] = nearest(rest[i], order[i])
            errors[i - begin] = (rest[i] - codes[order[i]] * scales[order[i]]) / upper[i, i]
            rest[i + 1 : end] -= np.outer(upper[i, i + 1 : end], errors[i - begin])
        rest[end:] -= upper[begin:end, end:].T @ errors
    plain = nearest(w, slice(None))
    better = product_errors(w - codes * scales, gram) <= product_errors(w - plain * scales, gram)
    return np.where(better, codes, plain).astype(np.int64)


def product_errors(difference: Matrix, gram: Matrix) -> Matrix:
    """d^T G d for each column d of [I, O]: the squared error of an output, summed over tokens."""
    return np.einsum("io,io->o", difference, gram @ difference)


def _inverse_root(gram: Matrix, damping: float) -> Matrix:
    """Upper triangular U with U^T U the inverse of the damped Gram matrix."""
    mean = np.diag(gram).mean() or 1.0
    while True:
        damped = gram + damping * mean * np.eye(len(gram))
        try:
            root = np.linalg.cholesky(damped)
            inverse_root = np.linalg.solve(root, np.eye(len(gram)))
            return np.linalg.cholesky(inverse_root.T @ inverse_root).T
        except np.linalg.LinAlgError:
            damping = max(10 * damping, _LEAST_DAMPING)
