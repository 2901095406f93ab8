"""What a channel tells of a variable beyond nuisance variables: regression designs, partial R², and moving a channel.

Rows are tokens of long lists. A channel y and a claimed variable v are both regressed by least squares on the nuisance
variables (n, position and, for running statistics, the current token), on some cells of the (k, n) plane. With r_y and
r_v the residuals, and b the slope of r_y on r_v in those cells, the partial R² is

    1 - |r_y - b r_v|² / |r_y|²

over other prompts in other cells (Frisch & Waugh 1933, Lovell 1963: b is the slope of the full regression). Since it is
scored where it was not fitted, it falls below 0 if the variable is of no use. All channels of a hook, and all
variables, take one matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg
from scipy.interpolate import BSpline
from torch import Tensor

from ...models.circuitgpt.model import CircuitGPT
from ...tasks.brackets import closers, long_lists
from ...tasks.refused import Refused

__all__ = ["Design", "Prompts", "Rows", "Scores", "directions_moved", "head_rows", "question_rows", "record", "share"]

BUDGET = 256 * 2**20  # the most bytes of recorded values at a time
LIVE = 1e-5  # a channel is live if its spread exceeds this share of the largest spread at its hook
HEAD = 48  # the rows of single tokens are drawn from so many tokens at the beginning of a list
_KNOTS = 8


@dataclass(frozen=True)
class Prompts:
    """Long lists of several amounts of evidence.

    Attributes:
        ids: Token ids (prompts, length).
        positions: Their positions, of the same shape.
        k: Evidence in each prompt, (prompts,).
        fits: True for a prompt to fit on, False for one to score on, (prompts,).
        asked: The questions as token indices, (prompts, questions).
        evidence: How many "[" each token holds, (prompts, length).
        texts: The text of each token id that occurs.
    """

    ids: Tensor
    positions: Tensor
    k: np.ndarray
    fits: np.ndarray
    asked: np.ndarray
    evidence: np.ndarray
    texts: dict[int, str]

    @classmethod
    def make(cls, model: CircuitGPT, amounts: Sequence[int], count: int, length: int, seed: int) -> "Prompts":
        """Make ``count`` lists of each amount to fit on and as many to score on. Amount 1 is a list of depth 1.

        Raises:
            Refused: The model has no tokenizer, or one that splits an answer.
        """
        if model.tokenizer is None:
            raise Refused("the model has no tokenizer; lists of brackets are made of text")
        block = model.config.block_size
        parts = [
            (
                fits,
                long_lists(model.tokenizer, k, length, count, block_size=block, depth=min(k, 2), seed=2 * seed + fits),
            )
            for k in amounts
            for fits in (0, 1)
        ]
        questions = min(part.asked.shape[1] for _, part in parts)
        ids = torch.cat([part.ids for _, part in parts])
        texts = {token: model.tokenizer.decode([token]) for token in ids.unique().tolist()}
        brackets = np.zeros(model.config.vocab_size)
        brackets[list(texts)] = [text.count("[") for text in texts.values()]
        return cls(
            ids=ids,
            positions=torch.cat([part.positions for _, part in parts]),
            k=np.repeat([part.k for _, part in parts], count),
            fits=np.repeat([bool(fits) for fits, _ in parts], count),
            asked=torch.cat([part.asked[:, :questions] for _, part in parts]).numpy(),
            evidence=brackets[ids.numpy()],
            texts=texts,
        )

    def __len__(self) -> int:
        return len(self.ids)


def share(counts: np.ndarray) -> np.ndarray:
    """The running mean of ``counts`` (prompts, length) over the tokens so far: s/n at every token."""
    return np.asarray(np.cumsum(counts, 1) / np.arange(1, counts.shape[1] + 1))


class Design:
    """Least squares on ``nuisance`` (rows, columns), fitted once on the rows ``fit`` (bool) for all later use."""

    def __init__(self, nuisance: np.ndarray, fit: np.ndarray) -> None:
        self.fit = fit
        q, r, order = linalg.qr(nuisance[fit], mode="economic", pivoting=True)
        size = np.abs(np.diag(r))
        rank = int((size > 1e-9 * size[0]).sum())
        # A column without rank (such as a token seen in no fitted row) is left out of every prediction.
        self._q = q[:, :rank]
        self._all = linalg.solve_triangular(r[:rank, :rank], nuisance[:, order[:rank]].T, trans="T").T

    def residuals(self, y: np.ndarray) -> np.ndarray:
        """The residuals of ``y`` (rows, columns) on every row, computed and returned in the dtype of y."""
        moved = y - y[self.fit].mean(0)
        return np.asarray(moved - self._all.astype(y.dtype) @ (self._q.astype(y.dtype).T @ moved[self.fit]))


@dataclass(frozen=True)
class Rows:
    """The tokens that are rows of a regression, with the same number from every prompt.

    Attributes:
        at: Index of each token in its prompt, (prompts, tokens).
        prompt: Number of the row's prompt, (rows,) with rows = prompts * tokens; so are all that follow.
        n: Context length at the row's token.
        token: The token's id.
        fit: Whether the regression is fitted on the row.
        score: Whether it is scored on the row.
        design: The nuisance variables.
    """

    at: np.ndarray
    prompt: np.ndarray
    n: np.ndarray
    token: np.ndarray
    fit: np.ndarray
    score: np.ndarray
    design: Design

    def pick(self, values: np.ndarray) -> np.ndarray:
        """Values by token (prompts, length) as a column with one entry for each row."""
        return np.asarray(np.take_along_axis(values, self.at, 1).reshape(-1))


def question_rows(prompts: Prompts, per_prompt: int) -> Rows:
    """Rows at ``per_prompt`` evenly spread questions of every prompt. The current token is a nuisance variable."""
    chosen = np.unique(np.linspace(0, prompts.asked.shape[1] - 1, per_prompt).round().astype(int))
    return _rows(prompts, prompts.asked[:, chosen], token_too=True)


def head_rows(prompts: Prompts, per_prompt: int, seed: int) -> Rows:
    """Rows at ``per_prompt`` tokens of any kind, drawn from the beginning of every prompt, where the brackets are."""
    rng = np.random.default_rng([seed, 7])
    most = min(HEAD, prompts.ids.shape[1])
    at = np.sort(rng.permuted(np.tile(np.arange(1, most), (len(prompts), 1)), axis=1)[:, :per_prompt], axis=1)
    return _rows(prompts, at, token_too=False)


def _rows(prompts: Prompts, at: np.ndarray, token_too: bool) -> Rows:
    per_prompt = at.shape[1]
    prompt = np.repeat(np.arange(len(prompts)), per_prompt)
    n = (at + 1).reshape(-1)
    token = np.take_along_axis(prompts.ids.numpy(), at, 1).reshape(-1)
    position = np.take_along_axis(prompts.positions.numpy(), at, 1).reshape(-1)
    columns = [_smooth(np.log(n)), _smooth(position.astype(float))]
    if token_too:
        columns.append((token[:, None] == np.unique(token)).astype(float))
    # Every third cell of the (k, n) plane along both axes is scored, so that scored cells lie between fitted ones.
    edges = np.quantile(n, np.linspace(0, 1, 10)[1:-1])
    amount = np.searchsorted(np.unique(prompts.k), prompts.k)[prompt]
    unseen = (amount + np.digitize(n, edges)) % 3 == 0
    fits = prompts.fits[prompt]
    return Rows(
        at, prompt, n, token, fits & ~unseen, ~fits & unseen, Design(np.concatenate(columns, 1), fits & ~unseen)
    )


def _smooth(x: np.ndarray) -> np.ndarray:
    """Cubic B-splines in x with knots at its quantiles, about 11 columns: (rows, columns)."""
    inner = np.unique(np.quantile(x, np.linspace(0, 1, _KNOTS + 2)))
    knots = np.concatenate([np.repeat(inner[0], 3), inner, np.repeat(inner[-1], 3)])
    return np.asarray(BSpline.design_matrix(x, knots, 3).toarray())


@dataclass(frozen=True)
class Scores:
    """How well variables are told by channels. A dead channel or a constant variable has the score NaN.

    Attributes:
        r2: Partial R², (variables, channels).
        beta: Slope of the channel on the variable, of the same shape.
        live: Which channels are live, bool (channels,).
        spread: Standard deviation of each channel, (channels,).
    """

    r2: np.ndarray
    beta: np.ndarray
    live: np.ndarray
    spread: np.ndarray
    _scored: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(cls, rows: Rows, variables: np.ndarray, values: np.ndarray) -> "Scores":
        """Score ``variables`` (rows, variables), which are residuals, by ``values`` (rows, channels) as recorded."""
        spread = values[rows.fit].std(0)
        live = (spread > LIVE * max(spread.max(), 1e-30)) & (spread > 1e-6 * np.abs(values[rows.fit]).max())
        left = rows.design.residuals(values)
        v_fit, v_score = variables[rows.fit], variables[rows.score]
        y_score = left[rows.score]
        norm = np.square(v_fit).sum(0)
        usable = norm > 1e-9 * len(v_fit)
        beta = (v_fit.T @ left[rows.fit]) / np.where(usable, norm, 1.0)[:, None]
        captured = 2 * beta * (v_score.T @ y_score) - np.square(beta) * np.square(v_score).sum(0)[:, None]
        total = np.square(y_score).sum(0)
        known = usable[:, None] & live & (total > 0)
        r2 = np.minimum(np.divide(captured, total, out=np.full(captured.shape, np.nan), where=known), 1.0)
        # A bootstrap by prompt needs only sums by prompt; the rows of a prompt are adjacent.
        starts = np.flatnonzero(np.diff(rows.prompt[rows.score], prepend=-1))
        return cls(r2, beta, live, spread, (y_score, v_score, starts, np.add.reduceat(y_score**2, starts)))

    @property
    def prompts(self) -> int:
        """How many prompts are scored on."""
        return len(self._scored[2])

    def best(self, variables: slice | Sequence[int]) -> np.ndarray:
        """Each channel's largest R² over some variables; -inf for a channel without a score."""
        return np.asarray(np.fmax(np.nan_to_num(self.r2[variables], nan=-np.inf).max(0), -np.inf))

    def reweighted(self, weights: np.ndarray, variable: int, channels: np.ndarray | None = None) -> np.ndarray:
        """R² with every scored prompt counted ``weights`` (draws, prompts) times: (draws, channels); NaN as in r2."""
        chosen = np.arange(self.r2.shape[1]) if channels is None else channels
        y, v, starts, squares = self._scored
        beta, column = self.beta[variable, chosen], v[:, variable]
        cross = weights @ np.add.reduceat(column[:, None] * y[:, chosen], starts)
        captured = 2 * beta * cross - beta**2 * (weights @ np.add.reduceat(column**2, starts))[:, None]
        total = weights @ squares[:, chosen]
        known = np.isfinite(self.r2[variable, chosen]) & (total > 0)
        return np.minimum(np.divide(captured, total, out=np.full(captured.shape, np.nan), where=known), 1.0)


def groups_of(model: CircuitGPT, rows: int) -> list[list[str]]:
    """The hooks in groups whose recorded values fit into BUDGET."""
    from ...models.circuitgpt.recording import hook_width

    groups: list[list[str]] = []
    left = 0
    for hook in model.hook_names:
        size = 4 * rows * hook_width(model, hook)
        if size > left:
            groups.append([])
            left = BUDGET
        groups[-1].append(hook)
        left -= size
    return groups


@torch.no_grad()
def record(model: CircuitGPT, prompts: Prompts, hooks: Sequence[str], at: np.ndarray) -> dict[str, np.ndarray]:
    """Record the values at ``hooks`` of the tokens ``at`` (prompts, tokens), by hook.

    Each is float32 (prompts * tokens, channels).
    """
    by_hook: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    index = torch.from_numpy(at)
    last = max(hooks, key=model.hook_names.index)
    for i in range(0, len(prompts), 32):
        part = slice(i, i + 32)
        rows, columns = torch.arange(len(index[part]), device="cpu")[:, None], index[part]
        _, kept = model.run_with_cache(prompts.ids[part], hooks, last, position_ids=prompts.positions[part])
        for hook, value in kept.items():
            by_hook[hook].append(value[rows, columns].float().flatten(0, 1))
    return {hook: torch.cat(values).cpu().numpy() for hook, values in by_hook.items()}


@torch.no_grad()
def difference(model: CircuitGPT, ids: Tensor, positions: Tensor, hooks: Sequence[tuple[str, object]] = ()) -> Tensor:
    """logit("]]\\n") - logit("]\\n") at every token, float32 (rows, length)."""
    assert model.tokenizer is not None
    ends = closers(model.tokenizer)
    logits = model.run_with_hooks(ids, list(hooks), position_ids=positions)  # type: ignore[arg-type]
    return (logits[..., ends.two] - logits[..., ends.one]).float()


def directions_moved(
    model: CircuitGPT, prompts: Prompts, chosen: np.ndarray, hook: str, directions: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Change of the logit difference when the values at ``hook`` are moved along each of ``directions``.

    Args:
        model: A CircuitGPT with a tokenizer.
        prompts: The lists.
        chosen: Indices of the prompts to use.
        hook: Where the values are moved.
        directions: (directions, channels).
        shift: How far each token's value is moved along each direction, (directions, chosen, length).

    Returns:
        float64 (directions, chosen, length).
    """
    length = shift.shape[2]
    ids, positions = prompts.ids[chosen, :length], prompts.positions[chosen, :length]
    before = difference(model, ids, positions)
    at_once = max(1, 192 // len(chosen))
    out = []
    for i in range(0, len(directions), at_once):
        part = slice(i, i + at_once)
        along = torch.from_numpy(directions[part]).to(model.device, model.dtype)
        by = torch.from_numpy(shift[part]).to(model.device, model.dtype)
        add = (by[..., None] * along[:, None, None, :]).flatten(0, 1)
        after = difference(
            model,
            ids.repeat(len(along), 1),
            positions.repeat(len(along), 1),
            [(hook, lambda value, name, add=add: value + add)],
        )
        out.append((after - before.repeat(len(along), 1)).unflatten(0, (len(along), len(chosen))))
    return torch.cat(out).double().cpu().numpy()
