"""The claims about a class of tokens, and the lists, rows and variables on which every model is scored.

A *group* is a claim about one class of tokens: "update" (this token is of the class), "mean" (the share of the class
among the tokens so far) or "threshold" (that share is above θ, for a few values of θ). The class is "[", or a *wrong*
class of tokens drawn at random among those without brackets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...models.circuitgpt.model import CircuitGPT
from ..brackets.critical import Curve, tells_depths
from .measure import Prompts, Rows, difference, head_rows, question_rows, share

__all__ = ["BAR", "CLAIMS", "LEVELS", "READABLE", "RIVALS", "Setup"]

CLAIMS = ("update", "mean", "threshold")
BAR = 0.5  # the least partial R² of a channel that is mapped to a claim
# Variables for which a mean or a threshold could be mistaken: k itself, whether two lists are open, and the share of
# brackets that close rows. The last grows with k in these lists, so of all wrong variables it is the nearest.
RIVALS = ("count", "depth", "closers")
LEVELS = (0.25, 0.5, 0.75)  # quantiles of m at which a threshold is tried; the fourth threshold is the model's own
READABLE = ("closes", "comma", "element")  # token classes of which the law predicts nothing


@dataclass(frozen=True)
class Setup:
    """Prompts, rows and variables, the same for every model that is compared.

    Attributes:
        prompts: The lists.
        asked: Rows at questions.
        single: Rows at any token.
        at_asked: Residual variables on the rows ``asked``. Its columns are the mean, the thresholds and the rivals, and
            then mean and thresholds of each wrong class.
        at_single: Residual variables on the rows ``single``: "[", the readable classes, the wrong classes.
        membership: Weight of each token in the class "[" and in the wrong classes, (classes, vocabulary).
        null: Mean and thresholds of many more wrong classes, (fitted and scored rows, draws * (1 + thresholds)).
        thetas: The thresholds.
        level: The quantile of m at which the model's own threshold lies.
        right: Whether the model answers each question right, (prompts, questions).
        seed: Seed of the setup.
    """

    prompts: Prompts
    asked: Rows
    single: Rows
    at_asked: np.ndarray
    at_single: np.ndarray
    membership: np.ndarray
    null: np.ndarray
    thetas: tuple[float, ...]
    level: float
    right: np.ndarray
    seed: int

    @property
    def wrong(self) -> int:
        """How many wrong classes go through the whole analysis."""
        return len(self.membership) - 1

    @property
    def groups(self) -> dict[str, tuple[str, slice]]:
        """The rows ("single" or "asked") and columns of each group; groups of wrong classes are named "mean~0" etc."""
        wide = 1 + len(self.thetas)
        groups = {}
        for i in range(1 + self.wrong):
            suffix = f"~{i - 1}" if i else ""
            start = wide + len(RIVALS) + wide * (i - 1) if i else 0
            column = 1 + len(READABLE) + i - 1 if i else 0
            groups[f"update{suffix}"] = ("single", slice(column, column + 1))
            groups[f"mean{suffix}"] = ("asked", slice(start, start + 1))
            groups[f"threshold{suffix}"] = ("asked", slice(start + 1, start + wide))
        return groups

    def able(self) -> float:
        """The best balanced accuracy over both depths at any one length, on these lists.

        NaN if the lists have only one depth.
        """
        k, x = self.prompts.k, self.prompts.asked + 1
        curves = {int(amount): Curve(x[k == amount], self.right[k == amount]) for amount in np.unique(k)}
        nested = {amount: curve for amount, curve in curves.items() if amount > 1}
        return tells_depths(nested, curves[1]) if 1 in curves and nested else float("nan")

    @classmethod
    def make(
        cls, model: CircuitGPT, amounts: Sequence[int], count: int, length: int, *, draws: int, wrong: int, seed: int
    ) -> "Setup":
        """Make lists, rows and variables. ``model`` gives the tokenizer and the threshold of its own.

        Args:
            model: A CircuitGPT with a tokenizer.
            amounts: Amounts of evidence; 1 stands for a list of depth 1.
            count: Lists of each amount to fit on, and as many to score on.
            length: Tokens in a list.
            draws: Wrong classes of which only the largest score is used.
            wrong: Wrong classes that go through the whole analysis.
            seed: Seed of lists, rows and classes.
        """
        prompts = Prompts.make(model, amounts, count, length, seed)
        asked, single = question_rows(prompts, 24), head_rows(prompts, 24, seed)
        m = asked.pick(share(prompts.evidence))
        preferred = difference(model, prompts.ids, prompts.positions).numpy()
        own = _own_threshold(m[asked.fit], asked.pick(preferred)[asked.fit] > 0)
        level = float((m[asked.fit] <= own).mean())
        rng = np.random.default_rng([seed, 11])
        # Two generators, so that the classes analysed don't depend on how many others they are compared with.
        vocabulary = model.config.vocab_size
        tried = _random_classes(prompts, vocabulary, wrong, np.random.default_rng([seed, 12]))
        classes = np.concatenate([tried, _random_classes(prompts, vocabulary, draws, rng)])
        membership = np.concatenate([_evidence(prompts, model)[None], classes[:wrong]])
        k = prompts.k[asked.prompt]
        closers = asked.pick(share(_kinds(prompts)[0]))
        true, others = _running(prompts, asked, membership[:1], level), np.stack([k, k > 1, closers], 1)
        columns = [true, others, _running(prompts, asked, membership[1:], level)]
        kinds = [prompts.evidence > 0, *_kinds(prompts), *((row[prompts.ids.numpy()] > 0) for row in membership[1:])]
        chosen = asked.fit | asked.score
        null = [
            asked.design.residuals(_running(prompts, asked, classes[i : i + 100], level))[chosen].astype(np.float32)
            for i in range(wrong, len(classes), 100)
        ]
        right = (np.take_along_axis(preferred, prompts.asked, 1) > 0) == (prompts.k > 1)[:, None]
        return cls(
            prompts=prompts,
            asked=asked,
            single=single,
            at_asked=asked.design.residuals(np.concatenate(columns, 1).astype(float)).astype(np.float32),
            at_single=single.design.residuals(np.stack([single.pick(kind) for kind in kinds], 1) * 1.0).astype(
                np.float32
            ),
            membership=membership,
            null=np.concatenate(null, 1) if null else np.zeros((int(chosen.sum()), 0), np.float32),
            thetas=(*(float(np.quantile(m[asked.fit], q)) for q in LEVELS), own),
            level=level,
            right=right,
            seed=seed,
        )


def _evidence(prompts: Prompts, model: CircuitGPT) -> np.ndarray:
    row = np.zeros(model.config.vocab_size, np.float32)
    row[list(prompts.texts)] = [text.count("[") for text in prompts.texts.values()]
    return row


def _kinds(prompts: Prompts) -> list[np.ndarray]:
    """Which tokens close a row, which are commas and which are elements: three bool (prompts, length)."""
    ids = prompts.ids.numpy()
    elements = np.unique(np.take_along_axis(ids, prompts.asked, 1))
    closing = [token for token, text in prompts.texts.items() if "]" in text]
    comma = [token for token, text in prompts.texts.items() if text.strip() == ","]
    return [np.isin(ids, closing), np.isin(ids, comma), np.isin(ids, elements)]


def _random_classes(prompts: Prompts, vocabulary: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random classes of tokens without brackets, from one token up to most of them: (count, vocabulary).

    Every second class holds only tokens that occur before a list's first bracket. Their count is settled early and then
    diluted, like that of the evidence.
    """
    allowed = [token for token, text in prompts.texts.items() if "[" not in text and "]" not in text]
    before = np.unique(prompts.ids.numpy()[np.cumsum(prompts.evidence, 1) == 0])
    early = [token for token in allowed if token in before]
    members = np.zeros((count, vocabulary), np.float32)
    for start, tokens in ((0, allowed), (1, early)):
        part = members[start::2]
        size = np.exp(rng.uniform(0, np.log(0.9 * len(tokens)), (len(part), 1))).astype(int)
        part[:, tokens] = rng.permuted(np.tile(np.arange(len(tokens)), (len(part), 1)), axis=1) < size
    return members


def _running(prompts: Prompts, rows: Rows, membership: np.ndarray, level: float) -> np.ndarray:
    """Each class's share of the tokens so far, and its thresholds: float32 (rows, classes * (1 + thresholds))."""
    columns = []
    for row in membership:
        m = rows.pick(share(row[prompts.ids.numpy()]))
        cuts = np.quantile(m[rows.fit], [*LEVELS, level])
        columns += [m, *(m > cut for cut in cuts)]
    return np.stack(columns, 1).astype(np.float32) if columns else np.zeros((len(rows.n), 0), np.float32)


def _own_threshold(m: np.ndarray, says_two: np.ndarray) -> float:
    """The θ for which 1[m > θ] agrees best with the model's answers, with both answers weighted equally.

    It is the median of m if the model gives only one answer.
    """
    if says_two.all() or not says_two.any():
        return float(np.median(m))
    cuts = np.quantile(m, np.linspace(0.02, 0.98, 97))
    above = m[:, None] > cuts
    return float(cuts[np.argmax(above[says_two].mean(0) - above[~says_two].mean(0))])
