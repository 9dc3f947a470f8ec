"""SparseVLM: text tokens that look at the image say what of it matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import _checks
from ._choose import floored, keep_best
from .prompt import Prompt
from .types import Attention, Evidence, Positions, Seen

_TABLES = {
    1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


@dataclass(frozen=True, slots=True)
class SparseVLM:
    """Drops the vision tokens that the raters, text tokens related to the image, attend to least in the layer before.

    SparseVLM (arXiv 2410.04417), as a pure choice of tokens. Raters: `select_raters`. A vision token's score is its
    attention from the raters, mean over raters and heads; the release prunes what layers 2, 6 and 15 put out, so at the
    input of layers 3, 7 and 16. How many: as in the paper, `scale (n - rank(P))` of n survivors go, P being the raters'
    attention to the survivors (`rank_counts`); or, as in the release, a fixed number for each layer (`keep`,
    `release`).

    Implemented: raters, scores, both ways to count. Not implemented: recycling (pruned tokens merged into a few cluster
    means, in the paper and version 1; it makes new hidden states, which this package's plans do not), version 2's
    correction of attention by that of constant queries and keys, and its choice of 14 heads. `scale` is not stated in
    the material at hand; the default is ours.

    Deviations: all images of a row compete; at least one vision token stays; with `keep` at or above what exists,
    nothing goes (the release always drops at least one token); positions stay (as in version 2; version 1 counts anew,
    which is "reindex").

    Attributes:
        layers: (3, 7, 16).
        keep: None: rank-adaptive. Else, for each layer, vision tokens left (ints), or shares of the prompt's vision
            tokens (floats in (0, 1]), not growing.
        scale: lambda of the paper, in (0, 1]; only read when rank-adaptive. At 1 as many tokens stay as P has ranks.
        positions: "keep" or "reindex".
    """

    layers: tuple[int, ...] = (3, 7, 16)
    keep: tuple[int | float, ...] | None = None
    scale: float = 0.5
    positions: Positions = "keep"

    evidence: ClassVar[Evidence] = Evidence("previous", embeddings=True)

    def __post_init__(self) -> None:
        layers = _checks.layers("SparseVLM", self.layers)
        if self.keep is not None:
            _checks.store(self, keep=_checks.each("SparseVLM keep", self.keep, _checks.share_or_tokens))
            _checks.falling("SparseVLM keep", self.keep, len(layers))
        _checks.one_of("SparseVLM positions", self.positions, ("keep", "reindex"))
        _checks.store(self, layers=layers, scale=_checks.share("SparseVLM scale", self.scale))

    @classmethod
    def release(cls, tokens: int, version: int = 1) -> SparseVLM:
        """The fixed numbers of the release for an average of 192, 128, 96 or 64 of LLaVA-1.5's 576 tokens, 32 layers.

        The release adds recycled tokens to these in version 1, so that fewer are left here; 2 adds none.
        """
        table = _TABLES.get(version, {}).get(tokens)
        if table is None:
            raise ValueError(f"SparseVLM has tables for 192, 128, 96 and 64, versions 1 and 2, not {tokens}, {version}")
        return cls(keep=table)

    def rows(self, prompt: Prompt, embeddings: Tensor | None = None) -> Tensor:
        """The raters."""
        if embeddings is None:
            raise ValueError("SparseVLM chooses its raters by the embeddings that enter layer 0")
        return select_raters(embeddings, prompt)

    def counts(self, prompt: Prompt) -> Tensor | None:
        """Vision tokens left by each layer, [S, B] int64; None when rank-adaptive."""
        if self.keep is None:
            return None
        return torch.stack([_fixed(prompt.counts, number) for number in self.keep])

    def __call__(self, seen: Seen) -> Tensor:
        """Columns that enter the layer, [B, N] bool."""
        fixed = self.counts(seen.prompt)
        if fixed is None:
            count = rank_counts(seen.asked, seen.survivors, self.scale)
        else:
            count = fixed[self.layers.index(seen.layer)]
        return keep_best(seen, seen.asked.mean(), count)


@torch.no_grad()
def select_raters(embeddings: Tensor, prompt: Prompt) -> Tensor:
    """[B, N] bool, text tokens that the image, on average, takes more after than after the mean text token.

    Paper, "relevant text token selection": softmax over the text of V Tᵀ in the embedding space, mean over the vision
    tokens, in float32; raters are the text tokens above the mean of that. Text is what follows the row's first vision
    token (release: what follows its one image). Deviations where the release has no answer: a prompt without text after
    its images takes all its text; where no text token is above the mean, all of them rate.

    Args:
        embeddings: [B, N, D] floating, what enters layer 0.
        prompt: The prompt; a row without vision tokens has no raters.
    """
    if embeddings.ndim != 3 or embeddings.shape[:2] != prompt.valid.shape:
        raise ValueError(f"embeddings must be [B, N, D] like the prompt, got {list(embeddings.shape)}")
    raters = torch.zeros_like(prompt.valid)
    for row, (vision, text) in enumerate(zip(prompt.vision, _texts(prompt), strict=True)):
        if bool(vision.any()) and bool(text.any()):
            vectors = embeddings[row].float()
            related = (vectors[vision] @ vectors[text].T).softmax(-1).mean(0)
            above = related > related.mean()
            raters[row, text] = above if bool(above.any()) else torch.ones_like(above)
    return raters


def rank_counts(attention: Attention, survivors: Tensor, scale: float) -> Tensor:
    """Vision tokens a layer keeps, [B] int64: n - int(scale (n - rank(P))), at least 1 of what exists.

    The rank is that of the raters' attention to the survivors, [raters, n] in float32, by torch's default tolerance,
    computed on the CPU so that every device gets the same (release: the same call, on the model's device).
    """
    weights, real, alive = attention.weights.float().cpu(), attention.real.cpu(), survivors.cpu()
    counts = []
    for rows, is_real, columns in zip(weights, real, alive, strict=True):
        number = int(columns.sum())
        rated = rows[is_real][:, columns]
        rank = int(torch.linalg.matrix_rank(rated)) if rated.numel() else 0
        counts.append(max(number - int(scale * (number - rank)), min(number, 1)))
    return torch.tensor(counts, dtype=torch.int64, device=survivors.device)


def _texts(prompt: Prompt) -> Tensor:
    text = prompt.valid & ~prompt.vision
    after = text & (prompt.vision.cumsum(-1) > 0)
    return torch.where(after.any(-1, keepdim=True), after, text)


def _fixed(total: Tensor, number: int | float) -> Tensor:
    return total.clamp(max=number) if isinstance(number, int) else floored(total, number)
