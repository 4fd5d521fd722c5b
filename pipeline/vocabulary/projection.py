"""A teacher's logits to log-probabilities over a student's vocabulary.

At a border between the student's tokens each cover gives its probability to the student's first token of what is left
of it. The token of the text gets the exact ratio C(e) / C(b) of ``covers``; the others are scaled to the rest.

Of a large vocabulary most tokens are the beginning of no token of the teacher, and of no rest of one: they have no
probability unless they are the text's. The others are *reached*, and the only ones that are computed.

Legend: n labelled positions, R rows of the teacher, V its vocabulary, U the student's, C tokens of it that are reached,
E entries of covers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcask.cache.labels import IntArray
from logitcask.pipeline.vocabulary.bridge import NONE, Bridge
from logitcask.pipeline.vocabulary.covers import Border, Position
from logitcask.pipeline.vocabulary.spread import Spread, spread_alone

Float64 = NDArray[np.float64]
COPIES = 6  # of a slice of logits, or of what becomes of it, in a CPU's memory at a time
LEAST_ALONE = 1e-6  # by projection alone a token of the text may have none
LEAST = 1e-45  # the mass of covers, at least: below it float32 has none


@dataclass(frozen=True)
class Piece:
    """Positions that are projected together, and the rows that they need."""

    positions: Sequence[Position]
    first: int
    stop: int


def pieces(positions: Sequence[Position], most: int) -> Iterator[Piece]:
    """Yield positions, in order, with at most ``most`` rows and positions each, unless one alone needs more."""
    begin, low, high = 0, 0, 0
    for index, position in enumerate(positions):
        borders = [position.start] if position.end is None else [position.start, position.end]
        lowest = min(border.lowest for border in borders)
        stop = max(position.start.row + 1, borders[-1].row, *(c.row + 1 for border in borders for c in border.covers))
        stop = max(stop, position.start.like + 1)
        if index > begin and (max(high, stop) - min(low, lowest) > most or index - begin >= most):
            yield Piece(positions[begin:index], low, high)
            begin = index
        low, high = (lowest, stop) if index == begin else (min(low, lowest), max(high, stop))
    if positions:
        yield Piece(positions[begin:], low, high)


class Projector:
    """Projects for one pair of vocabularies, on one device."""

    def __init__(self, bridge: Bridge, device: torch.device, spread: Spread | None = None) -> None:
        self._spread = spread or spread_alone(bridge)
        self.reached = np.unique(np.concatenate([self._spread.firsts, bridge.firsts[bridge.firsts != NONE]]))
        self._whole, self._is_reached = bridge.whole, np.zeros(len(bridge.student), dtype=bool)
        self._is_reached[self.reached] = True
        self._place = np.cumsum(self._is_reached) - 1  # of the reached among themselves
        self._begins = np.searchsorted(self._spread.firsts, self.reached)
        self._lengths = np.array([len(text or b"") for text in bridge.student])
        arrays = self._spread.tokens, self._spread.weights
        self._order, self._weights = (torch.from_numpy(each).to(device) for each in arrays)
        self._keys = self._spread.firsts * len(self._whole) + self._spread.tokens

    def __call__(self, logits_RV: Tensor, tokens_R: IntArray, piece: Piece) -> tuple[Tensor, IntArray, Float64]:
        """Return log-probabilities (n, C) of a piece, which tokens they are of, (C,), and sums over it, (3,).

        ``tokens_R`` are the teacher's tokens of the text at its rows. The sums are the bytes of the text's tokens,
        their nats, and their nats before they were set: by projection alone.
        """
        z_RV = logits_RV.float()
        own_R1, p_RV = torch.from_numpy(tokens_R).to(z_RV.device)[:, None], z_RV.softmax(1)
        best_R1, at_R1 = z_RV.max(1, keepdim=True)
        lp_R1 = z_RV.gather(1, own_R1) - best_R1 + p_RV.gather(1, at_R1).log_()
        lp_R = lp_R1.squeeze(1).cpu().numpy().astype(np.float64)
        path = _Path.of(piece, lp_R, tokens_R, p_RV)
        log_gold, shares = path.golds()
        gold_n = _integers([position.gold for position in piece.positions])
        others = np.unique(gold_n[~self._is_reached[gold_n]])
        tokens_C = np.insert(self.reached, np.searchsorted(self.reached, others), others)
        begins_C = np.insert(
            self._begins, np.searchsorted(self.reached, others), np.searchsorted(self._spread.firsts, others)
        )
        q_nC = self._full(p_RV, own_R1, path, shares, begins_C)
        place_U = self._place.copy()
        for other in others:
            place_U[other:] += 1
        own_n = _add_covers(q_nC, path, shares, self._whole, place_U)
        at = torch.from_numpy(np.stack([np.arange(len(gold_n)), place_U[gold_n]])).to(q_nC.device)
        rows = path.rows[path.at]
        taken_n = np.exp(path.before_R[rows] + path.lp_R[rows] - path.log_c[path.at]) * shares
        starts_n = np.array([path.borders[border].starts for border in path.at])
        taken_n *= np.where(starts_n, self._given(tokens_R[rows], gold_n), own_n == gold_n)
        alone_n = q_nC[at[0], at[1]].cpu().numpy() + taken_n
        nats = -log_gold.sum(), -np.log(np.clip(alone_n, LEAST_ALONE, 1.0)).sum()
        return _with_golds(q_nC, at, log_gold), tokens_C, np.array([self._lengths[gold_n].sum(), *nats])

    def _given(self, tokens_n: IntArray, firsts_n: IntArray) -> Float64:
        """Return what tokens of the teacher give to tokens of the student, (n,)."""
        wanted = firsts_n * len(self._whole) + tokens_n
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, self._spread.weights[at], 0.0).astype(np.float64)

    def _full(self, p_RV: Tensor, own_R1: Tensor, path: "_Path", shares: Float64, begins_C: IntArray) -> Tensor:
        """Return the part of whole tokens, (n, C): those that start at a position's border, or stand for unknown ones.

        Their weight is their row's probability over C, or that of covers that end at the border.
        """
        starts = np.array([border.starts for border in path.borders])
        like = np.array([border.like - path.first for border in path.borders])
        places = np.flatnonzero((starts | (like >= 0))[path.at])
        at = path.at[places]
        rows = np.where(starts, path.rows, like)[at]
        log_weights = np.where(starts, path.before_R[path.rows], path.log_unknown)[at] - path.log_c[at]
        kept = np.where(starts[at], 1.0 - shares[places], 1.0)
        rows_a = torch.from_numpy(rows).to(p_RV.device)
        p_aV, own_a1 = p_RV.index_select(0, rows_a), own_R1[rows_a]
        p_aV.scatter_(1, own_a1, p_aV.gather(1, own_a1) * _column(kept, p_RV))
        p_Va = torch.mul(p_aV.T, _column(np.exp(log_weights), p_RV).T, out=p_RV.new_empty(p_aV.T.shape))
        begins = torch.from_numpy(begins_C).to(p_RV.device)
        # a sum over bags, since adding at indices has no fixed order on an accelerator
        sums_Ca = torch.nn.functional.embedding_bag(
            self._order, p_Va, begins, mode="sum", per_sample_weights=self._weights
        )
        if len(places) == len(path.at):
            return sums_Ca.T.contiguous()
        q_nC = p_RV.new_zeros(len(path.at), len(begins_C))
        return q_nC.index_copy_(0, torch.from_numpy(places).to(p_RV.device), sums_Ca.T)


def whole_vocabulary(log_q_nC: Tensor, tokens_C: IntArray, size: int) -> Tensor:
    """Return log-probabilities (n, U) of all ``size`` tokens: those that are not reached have none."""
    if len(tokens_C) == size:
        return log_q_nC
    log_q_nU = log_q_nC.new_full((len(log_q_nC), size), -torch.inf)
    return log_q_nU.index_copy_(1, torch.from_numpy(tokens_C).to(log_q_nC.device), log_q_nC)


def _column(values: Float64, like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like)[:, None]


@dataclass(frozen=True)
class _Path:
    """The numbers of a piece: its B borders, each once, and their covers one after another, E entries in lists."""

    first: int
    tokens_R: IntArray
    lp_R: Float64  # log-probabilities of the teacher's own tokens
    before_R: Float64  # (R + 1,) those of all rows before
    borders: Sequence[Border]
    rows: IntArray  # (B,) in the piece
    at: IntArray  # (n,) the border that each position starts at
    ends: IntArray  # (n,) the one it ends at, -1 before a special token
    border: IntArray  # (lists,)
    row: IntArray  # (lists,) in the piece
    sizes: IntArray  # (lists,)
    ids: IntArray  # (E,)
    firsts: IntArray  # (E,)
    p: Float64  # (E,)
    mass: Float64  # (lists,) the sum of p
    log_c: Float64  # (B,) log C
    log_unknown: Float64  # (B,) the part of covers of which is not known what comes after them

    @staticmethod
    def of(piece: Piece, lp_R: Float64, tokens_R: IntArray, p_RV: Tensor) -> "_Path":
        borders, known = list[Border](), dict[int, int]()
        for position in piece.positions:
            for border in (position.start, position.end):
                if border is not None and id(border) not in known:
                    known[id(border)] = len(borders)
                    borders.append(border)
        lists = [(index, covers) for index, border in enumerate(borders) for covers in border.covers]
        sizes = _integers([len(covers.ids) for _, covers in lists])
        row = _integers([covers.row - piece.first for _, covers in lists])
        rows = _integers([border.row - piece.first for border in borders])
        ids = np.concatenate([covers.ids for _, covers in lists] or [_integers([])])
        places = torch.from_numpy(np.repeat(row, sizes) * p_RV.shape[1] + ids).to(p_RV.device)
        p = p_RV.flatten()[places].cpu().numpy().astype(np.float64)
        mass = np.maximum(np.add.reduceat(p, np.cumsum([0, *sizes])[:-1]), LEAST) if lists else np.zeros(0)
        before_R = np.concatenate([[0.0], np.cumsum(lp_R)])
        log_c = np.where([border.starts for border in borders], before_R[rows], -np.inf)
        border_of = _integers([index for index, _ in lists])
        np.logaddexp.at(log_c, border_of, before_R[row] + np.log(mass))
        firsts = np.concatenate([covers.firsts for _, covers in lists] or [_integers([])])
        log_unknown, open_ended = np.full(len(borders), -np.inf), firsts == NONE
        in_list = np.repeat(np.arange(len(lists)), sizes)[open_ended]
        log_open = before_R[row[in_list]] + np.log(np.maximum(p[open_ended], LEAST))
        np.logaddexp.at(log_unknown, border_of[in_list], log_open)
        return _Path(
            first=piece.first,
            tokens_R=tokens_R,
            lp_R=lp_R,
            before_R=before_R,
            borders=borders,
            rows=rows,
            at=_integers([known[id(position.start)] for position in piece.positions]),
            ends=_integers([known.get(id(position.end), -1) for position in piece.positions]),
            border=border_of,
            row=row,
            sizes=sizes,
            ids=ids,
            firsts=firsts,
            p=p,
            mass=mass,
            log_c=log_c,
            log_unknown=log_unknown,
        )

    def golds(self) -> tuple[Float64, Float64]:
        """Return the log-probability of each position's token, (n,), and its share of the teacher's own token, (n,).

        The teacher's own token is the one that holds the byte at the position's border. What of it becomes the text's
        token is not given to another one by projection.
        """
        rows, special = self.rows[self.at], self.ends < 0
        log_gold = np.where(special, self.before_R[rows] + self.lp_R[rows], self.log_c[self.ends]) - self.log_c[self.at]
        shares = np.ones(len(rows))
        for index in np.flatnonzero(~special):
            row, end = int(rows[index]), int(self.ends[index])
            starts, last = self.borders[end].starts, int(self.rows[end])
            if last > row + starts:  # the own token ends before the student's
                lists = np.flatnonzero((self.border == end) & (self.row > row))
                later = self.before_R[self.row[lists]] + np.log(self.mass[lists])
                later = np.append(later, self.before_R[last]) if starts else later
                log_share = np.logaddexp.reduce(later) - self.before_R[row] - self.lp_R[row]
                shares[index] = np.exp(min(float(log_share), 0.0))
        return np.minimum(log_gold, 0.0), shares


def _integers(values: Sequence[int]) -> IntArray:
    return np.array(values, dtype=np.int64)


def _add_covers(q_nC: Tensor, path: _Path, shares: Float64, whole: NDArray[np.int32], place_U: IntArray) -> IntArray:
    """Add what the covers that start before each position's border give to the student's tokens.

    Return the student's first token of what is left of the teacher's own token, (n,).
    """
    own_n = whole[path.tokens_R[path.rows[path.at]]].astype(np.int64)
    position_of = np.full(len(path.borders), -1)
    position_of[path.at] = np.arange(len(path.at))
    lists = np.repeat(np.arange(len(path.sizes)), path.sizes)
    kept = (position_of[path.border[lists]] >= 0) & (path.firsts != NONE)
    lists, firsts, ids = lists[kept], path.firsts[kept], path.ids[kept]
    place = position_of[path.border[lists]]
    weights = np.exp(path.before_R[path.row] - path.log_c[path.border])[lists] * path.p[kept]
    own = (path.row == path.rows[path.border])[lists] & (ids == path.tokens_R[path.row[lists]])
    weights *= np.where(own, 1.0 - shares[place], 1.0)
    own_n[place[own]] = firsts[own]
    cells, inverse = np.unique(place * q_nC.shape[1] + place_U[firsts], return_inverse=True)
    sums = np.bincount(inverse, weights, minlength=len(cells)).astype(np.float32)
    flat, where = q_nC.view(-1), torch.from_numpy(cells).to(q_nC.device)
    flat[where] = flat[where] + torch.from_numpy(sums).to(q_nC)
    return own_n


def _with_golds(q_nC: Tensor, at: Tensor, log_gold: Float64) -> Tensor:
    """Return log q with the probabilities of the text's tokens, at ``at``, set and the others scaled to the rest."""
    gold_n1 = at[1][:, None]
    q_nC.scatter_(1, gold_n1, 0.0)
    rest_n1 = q_nC.sum(1, keepdim=True)
    rest = _column(np.log(-np.expm1(np.minimum(log_gold, -1e-12))), q_nC)
    none_nC = q_nC == 0
    log_q_nC = q_nC.clamp_min_(torch.finfo(torch.float32).tiny).log_()  # that of 0 takes a CPU ten times as long
    log_q_nC.masked_fill_(none_nC, -torch.inf)
    log_q_nC += torch.where(rest_n1 > 0, rest - rest_n1.log(), 0.0)
    log_q_nC.scatter_(1, gold_n1, _column(log_gold, q_nC))
    return log_q_nC
