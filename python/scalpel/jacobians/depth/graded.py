"""A product of matrices whose singular values span any range: kept as logarithms beside well-scaled factors.

After each factor the product is G · diag(e^d) · M: G with orthonormal columns, d falling, M of unit rows and well
conditioned, because every QR pivots on the *scaled* columns (Loh et al. 1992, "Stable numerical simulations of
models of interacting electrons"; Stewart 1995, "On graded QR decompositions of products of matrices"). One-sided
Jacobi on the rows of diag(e^d) M then gives each singular value to a relative error of about eps · cond(M),
however small it is (Demmel and Veselić 1992, "Jacobi's method is more accurate than QR"). No number here is e^d
itself, so nothing overflows.
"""

import numpy as np

_SWEEPS = 60  # Jacobi needs fewer than ten
_ORTHOGONAL = 1e-15  # cosine, per row, at which two rows count as orthogonal


class GradedProduct:
    """The product of the factors given to :meth:`extend`, the first one innermost. float64 throughout."""

    def __init__(self, width: int) -> None:
        self.left = np.eye(width)  # G (rows, rank)
        self.logs = np.zeros(width)  # d (rank,)
        self.rows = np.eye(width)  # M (rank, width)

    def extend(self, factor: np.ndarray, floor: float) -> None:
        """Multiply the product (n, width) by ``factor`` (m, n) from the left.

        What is at most ``floor`` in size counts as zero: those directions leave the product for good.
        """
        block = factor @ self.left
        if not len(self.logs):
            self.left = block
            return
        turn, sizes, right = np.linalg.svd(block, full_matrices=False)
        kept = sizes > floor
        # without a loss the block stays as it is: its own SVD would blur entries that are exact
        before = None if kept.all() and block.shape[0] >= block.shape[1] else turn[:, kept]
        if before is not None:
            block = sizes[kept, None] * right[kept]
        Q, R, order = _pivoted_qr(block, self.logs)
        scale = self.logs[order]
        with np.errstate(divide="ignore"):
            size = np.log(np.abs(R)) + scale  # of the entries of R · diag(e^d)
        count = len(Q.T)
        logs = np.diagonal(size)[:count].copy()
        rows = (np.sign(R) * np.exp(size - logs[:, None])) @ self.rows[order]
        length = np.linalg.norm(rows, axis=1)
        self.rows = rows / length[:, None]
        self.logs = logs + np.log(length)
        self.left = Q if before is None else before @ Q

    def svd(self) -> tuple[np.ndarray, np.ndarray]:
        """The left singular vectors (m, rank) and the logarithms of the singular values (rank,), falling."""
        turn, logs = _orthogonal_rows(self.logs, self.rows)
        order = np.argsort(-logs, kind="stable")
        return (self.left @ turn.T)[:, order], logs[order]


def _pivoted_qr(block: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find Q, R and an order with block[:, order] = Q R, by Householder reflections.

    The pivot is the longest column after the columns are scaled by e^logs; the scaling changes no Householder vector.
    """
    m, n = block.shape
    R, Q, order = block.copy(), np.eye(m), np.arange(n)
    count = min(m, n)
    for k in range(count):
        with np.errstate(divide="ignore"):
            length = np.log(np.linalg.norm(R[k:, k:], axis=0)) + logs[order[k:]]
        j = k + int(np.argmax(length))
        if not length[j - k] > -np.inf:
            count = k
            break
        R[:, [k, j]], order[[k, j]] = R[:, [j, k]], order[[j, k]]
        v = R[k:, k].copy()
        v[0] += np.copysign(np.linalg.norm(v), v[0])
        v /= np.linalg.norm(v)
        R[k:, k:] -= 2 * np.outer(v, v @ R[k:, k:])
        R[k + 1 :, k] = 0
        Q[:, k:] -= 2 * np.outer(Q[:, k:] @ v, v)
    return Q[:, :count], R[:count], order


def _orthogonal_rows(logs: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find an orthogonal X such that the rows of X · diag(e^logs) · rows are orthogonal, and their log lengths.

    ``rows`` have length 1.
    """
    logs, rows = logs.copy(), rows.copy()
    turn = np.eye(len(logs))
    limit = _ORTHOGONAL * max(4, len(logs))
    for _ in range(_SWEEPS):
        worst = 0.0
        for first, second in _rounds(len(logs)):
            longer = logs[first] >= logs[second]
            i, j = np.where(longer, first, second), np.where(longer, second, first)
            cosine = np.einsum("ab,ab->a", rows[i], rows[j])
            worst = max(worst, float(np.abs(cosine).max()))
            # the Jacobi rotation in units of each row's own length: tangent = ratio · lean
            ratio = np.exp(logs[j] - logs[i])
            gap = 1 - ratio**2
            below = gap + np.sqrt(gap**2 + (2 * ratio * cosine) ** 2)
            lean = np.divide(2 * cosine, below, out=np.zeros_like(below), where=below > 0)
            tangent = (ratio * lean)[:, None]
            shrink = 1 / np.sqrt(1 + tangent**2)
            turn[i], turn[j] = shrink * (turn[i] + tangent * turn[j]), shrink * (turn[j] - tangent * turn[i])
            rows[i], rows[j] = (
                shrink * (rows[i] + tangent * ratio[:, None] * rows[j]),
                shrink * (rows[j] - lean[:, None] * rows[i]),
            )
            both = np.concatenate([i, j])
            length = np.linalg.norm(rows[both], axis=1)
            rows[both] /= length[:, None]
            logs[both] += np.log(length)
        if worst <= limit:
            break
    return turn, logs


def _rounds(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every pair of ``count`` once, in rounds of disjoint pairs (the circle method of tournaments)."""
    players = np.arange(count + count % 2)
    rounds = []
    for _ in range(len(players) - 1):
        a, b = players[: len(players) // 2], players[len(players) // 2 :][::-1]
        real = (a < count) & (b < count)
        if real.any():
            rounds.append((a[real], b[real]))
        players = np.concatenate([players[:1], np.roll(players[1:], 1)])
    return rounds
