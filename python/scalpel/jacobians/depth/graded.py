"""A product of matrices whose singular values may span any range, kept as logarithms and well-scaled factors.

After each factor the product is G · diag(e^d) · M. G has orthonormal columns, d descends, and the rows of M have length
1. M is well conditioned, because every QR factorisation pivots on the *scaled* columns (Loh et al. 1992, "Stable
numerical simulations of models of interacting electrons"; Stewart 1995, "On graded QR decompositions of products of
matrices"). One-sided Jacobi rotations of the rows of diag(e^d) M then give each singular value to a relative error of
about eps · cond(M), however small it is (Demmel and Veselić 1992, "Jacobi's method is more accurate than QR"). e^d
itself is never computed, so nothing overflows.
"""

import numpy as np

_SWEEPS = 60  # the most sweeps of Jacobi rotations; fewer than ten are needed
_ORTHOGONAL = 1e-15  # times the number of rows: the cosine up to which two rows count as orthogonal


class GradedProduct:
    """The product, in float64, of the factors given to :meth:`extend`; each new factor multiplies from the left."""

    def __init__(self, width: int) -> None:
        self.left = np.eye(width)  # G (rows, rank)
        self.logs = np.zeros(width)  # d (rank,)
        self.rows = np.eye(width)  # M (rank, width)

    def extend(self, factor: np.ndarray, floor: float) -> None:
        """Multiply the product (n, width) by ``factor`` (m, n) from the left.

        Singular values of up to ``floor`` of ``factor`` times G count as zero, and the product loses their directions
        for good.
        """
        block = factor @ self.left
        if not len(self.logs):
            self.left = block
            return
        rotation, sizes, right = np.linalg.svd(block, full_matrices=False)
        kept = sizes > floor
        # where nothing is lost, the block is not replaced by its SVD, which would blur exact entries
        basis = None if kept.all() and block.shape[0] >= block.shape[1] else rotation[:, kept]
        if basis is not None:
            block = sizes[kept, None] * right[kept]
        Q, R, order = _pivoted_qr(block, self.logs)
        scale = self.logs[order]
        with np.errstate(divide="ignore"):
            log_sizes = np.log(np.abs(R)) + scale  # logarithms of the entries of R · diag(e^d)
        count = len(Q.T)
        logs = np.diagonal(log_sizes)[:count].copy()
        rows = (np.sign(R) * np.exp(log_sizes - logs[:, None])) @ self.rows[order]
        lengths = np.linalg.norm(rows, axis=1)
        self.rows = rows / lengths[:, None]
        self.logs = logs + np.log(lengths)
        self.left = Q if basis is None else basis @ Q

    def svd(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the left singular vectors (m, rank) and the logarithms of the singular values (rank,), descending."""
        rotation, logs = _orthogonal_rows(self.logs, self.rows)
        order = np.argsort(-logs, kind="stable")
        return (self.left @ rotation.T)[:, order], logs[order]


def _pivoted_qr(block: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find Q, R and an order of the columns with block[:, order] = Q R, by Householder reflections.

    The pivot is the longest of the columns scaled by e^logs. The scaling doesn't change the Householder vectors.
    """
    m, n = block.shape
    R, Q, order = block.copy(), np.eye(m), np.arange(n)
    count = min(m, n)
    for k in range(count):
        with np.errstate(divide="ignore"):
            log_lengths = np.log(np.linalg.norm(R[k:, k:], axis=0)) + logs[order[k:]]
        pivot = k + int(np.argmax(log_lengths))
        if not log_lengths[pivot - k] > -np.inf:
            count = k
            break
        R[:, [k, pivot]], order[[k, pivot]] = R[:, [pivot, k]], order[[pivot, k]]
        reflector = R[k:, k].copy()
        reflector[0] += np.copysign(np.linalg.norm(reflector), reflector[0])
        reflector /= np.linalg.norm(reflector)
        R[k:, k:] -= 2 * np.outer(reflector, reflector @ R[k:, k:])
        R[k + 1 :, k] = 0
        Q[:, k:] -= 2 * np.outer(Q[:, k:] @ reflector, reflector)
    return Q[:, :count], R[:count], order


def _orthogonal_rows(logs: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find an orthogonal X such that the rows of X · diag(e^logs) · rows are orthogonal to each other.

    Returns X and the logarithms of the lengths of those rows. ``rows`` must have length 1.
    """
    logs, rows = logs.copy(), rows.copy()
    rotation = np.eye(len(logs))
    limit = _ORTHOGONAL * max(4, len(logs))
    for _ in range(_SWEEPS):
        worst = 0.0
        for first, second in _rounds(len(logs)):
            longer = logs[first] >= logs[second]
            long, short = np.where(longer, first, second), np.where(longer, second, first)
            cosine = np.einsum("ab,ab->a", rows[long], rows[short])
            worst = max(worst, float(np.abs(cosine).max()))
            # the Jacobi rotation in units of each row's own length, so that its tangent is ratio · scaled_tangent
            ratio = np.exp(logs[short] - logs[long])
            gap = 1 - ratio**2
            denominator = gap + np.sqrt(gap**2 + (2 * ratio * cosine) ** 2)
            scaled_tangent = np.divide(2 * cosine, denominator, out=np.zeros_like(denominator), where=denominator > 0)
            tangent = (ratio * scaled_tangent)[:, None]
            cosine_of_rotation = 1 / np.sqrt(1 + tangent**2)
            rotation[long], rotation[short] = (
                cosine_of_rotation * (rotation[long] + tangent * rotation[short]),
                cosine_of_rotation * (rotation[short] - tangent * rotation[long]),
            )
            rows[long], rows[short] = (
                cosine_of_rotation * (rows[long] + tangent * ratio[:, None] * rows[short]),
                cosine_of_rotation * (rows[short] - scaled_tangent[:, None] * rows[long]),
            )
            both = np.concatenate([long, short])
            lengths = np.linalg.norm(rows[both], axis=1)
            rows[both] /= lengths[:, None]
            logs[both] += np.log(lengths)
        if worst <= limit:
            break
    return rotation, logs


def _rounds(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """List every pair of ``count`` rows once, in rounds whose pairs are disjoint.

    This is the circle method of round-robin tournaments.
    """
    players = np.arange(count + count % 2)
    rounds = []
    for _ in range(len(players) - 1):
        upper, lower = players[: len(players) // 2], players[len(players) // 2 :][::-1]
        real = (upper < count) & (lower < count)
        if real.any():
            rounds.append((upper[real], lower[real]))
        players = np.concatenate([players[:1], np.roll(players[1:], 1)])
    return rounds
