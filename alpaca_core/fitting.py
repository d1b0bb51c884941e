"""Fit a calibration: on content-free inputs, on a reference set, on the bare base, or on labelled rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy
from numpy.typing import NDArray

from alpaca_core.asking import Asking, Question, averaged
from alpaca_core.calibration import Calibration, CalibrationMethod, log_probabilities
from alpaca_core.errors import InvalidRequest
from alpaca_core.model import LanguageModel, RowError
from alpaca_core.rows import Progress, check_rows
from alpaca_core.spec import YES_NO, Label

CONTENT_FREE = ("N/A", "[MASK]", "")
"""Inputs that say nothing: Zhao et al. 2021, arXiv 2102.09690, section 5."""

FOLDS = 5
FEWEST_ROWS = 10
"""Rows, with labels or without, that a calibration is fitted on at least."""
PRIDE_ROWS = 64
"""Rows that ``pride`` reads in every rotation, at most."""

Matrix = NDArray[numpy.float64]
Vector = NDArray[numpy.float64]


def fit_calibration(
    model: LanguageModel,
    texts: Sequence[str | RowError],
    labels: Sequence[str | Label] = YES_NO,
    gold: Sequence[str] | None = None,
    *,
    method: CalibrationMethod | None = None,
    progress: Progress | None = None,
    **question: Unpack[Question],
) -> Calibration:
    """Fit a calibration of a question, for `judge` to apply to other texts.

    The methods, each a scale and a bias for each label (`Calibration`):

    - ``contextual``: the bias takes away what the question alone favours, asked about `CONTENT_FREE`
      inputs (Zhao et al. 2021, arXiv 2102.09690).
    - ``batch``: the bias takes away the mean log-probability over the texts (arXiv 2309.17249), which
      assumes that they hold the labels in about equal shares.
    - ``pride``: the bias takes away what each place among the labels that the prompt names is favoured by,
      whatever label stands there: read from at most `PRIDE_ROWS` texts in every rotation of the labels (PriDe,
      Zheng et al. 2024, arXiv 2309.03882, section 4).
    - ``base``: one scale, a temperature, at which the probabilities are as near as they can be (in
      cross-entropy) to those of the bare base model, which is the better calibrated of the two (BaseCal);
      the adapter is switched off for it, and no second model is loaded.
    - ``temperature``: one scale, by likelihood of the gold labels (Guo et al. 2017, arXiv 1706.04599).
    - ``vector``: a scale and a bias for each label, likewise, drawn towards ``batch`` where rows are few.

    Args:
        model: From `load_model`.
        texts: A reference set: like those that will be judged. Rows that fail are left out.
        labels: As `judge`.
        gold: The name of the right label of each text, where it is known.
        method: One of the above; None picks: with `gold` the one with the lowest cross-validated negative
            log-likelihood among those whose accuracy is not lower than without calibration; without it
            ``batch``. The result's `reason` says why.
        progress: Called with the number of texts just read.
        question: As `judge`: `instruction`, `show_labels`, `letters`, `rotate_labels`, `all_segmentations`,
            `template`, `adapter`.

    Returns:
        The calibration, bound by digest to model, adapter, question and labels.

    Raises:
        InvalidLabels: As `judge`.
        InvalidRequest: As `judge`; for fewer than `FEWEST_ROWS` usable rows; for gold labels that are none;
            for a method that needs gold labels or an adapter where there is none.
    """
    check_rows("texts", texts)
    asking = Asking(model, labels, **question)
    bound, adapter = asking.binding(), asking.adapter
    places = _check_gold(gold, texts, asking.names)
    ordered = asking.shows_labels and not asking.rotates
    _check_method(method, gold is not None, bound.adapter is not None, ordered)
    masses = asking.read(texts, adapter, progress)
    kept = [place for place, mass in enumerate(masses) if not isinstance(mass, RowError)]
    if len(kept) < FEWEST_ROWS:
        raise InvalidRequest(
            f"a calibration is fitted on {FEWEST_ROWS} rows at least, but {len(kept)} of {len(texts)} could be read. "
            "Give more rows."
        )
    wanted = method == "pride" or (method is None and gold is not None)
    rows = _Rows(
        z=_matrix([masses[place] for place in kept]),
        gold=None if places is None else numpy.array([places[place] for place in kept]),
        free=_content_free(asking),
        base=None if bound.adapter is None else _matrix(asking.read([texts[place] for place in kept], None)),
        turned=_turned(asking, texts, kept) if ordered and wanted else None,
    )
    chosen, nll, reason = (method, None, "as asked") if method else _pick(rows)
    scale, bias = _FITS[chosen](rows)
    if gold is not None and nll is None:
        nll = _cross_validated(rows, chosen)[0]
    return Calibration(
        method=chosen,
        scale=tuple(scale.tolist()),
        bias=tuple(bias.tolist()),
        bound=bound,
        rows=len(kept),
        nll=nll,
        reason=reason,
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """What is fitted on: log-probabilities of the labels, ``(rows, labels)``, in nats.

    `turned` are those of some rows in every rotation, ``(rows, turns, labels)``.
    """

    z: Matrix
    gold: NDArray[numpy.intp] | None
    free: Matrix
    base: Matrix | None
    turned: Matrix | None = None

    def part(self, rows: NDArray[numpy.bool_]) -> "_Rows":
        gold = None if self.gold is None else self.gold[rows]
        return _Rows(self.z[rows], gold, self.free, None if self.base is None else self.base[rows], self.turned)


_Fit = tuple[Vector, Vector]


def _none(rows: _Rows) -> _Fit:
    labels = rows.z.shape[1]
    return numpy.ones(labels), numpy.zeros(labels)


def _contextual(rows: _Rows) -> _Fit:
    favoured = numpy.exp(rows.free).mean(0)
    return numpy.ones(len(favoured)), -numpy.log(favoured)


def _batch(rows: _Rows) -> _Fit:
    return numpy.ones(rows.z.shape[1]), -rows.z.mean(0)


def _pride(rows: _Rows) -> _Fit:
    """The prior of each place, averaged over what stood there; in the order given, label i stands at place i."""
    assert rows.turned is not None
    turns = range(rows.turned.shape[1])
    by_place = numpy.stack([numpy.roll(rows.turned[:, turn], -turn, axis=1) for turn in turns], axis=1)
    prior = numpy.exp(_normalised(by_place.mean(1))).mean(0)
    return numpy.ones(len(prior)), -numpy.log(prior)


def _base(rows: _Rows) -> _Fit:
    assert rows.base is not None
    return _tempered(rows.z, numpy.exp(rows.base))


def _temperature(rows: _Rows) -> _Fit:
    return _tempered(rows.z, _one_hot(rows))


def _vector(rows: _Rows) -> _Fit:
    """Maximum a posteriori: scales drawn to 1 and biases to those of ``batch``, each with a deviation of 1."""
    from scipy.optimize import minimize

    labels = rows.z.shape[1]
    centre = numpy.concatenate(_batch(rows))
    targets = _one_hot(rows)

    def loss(point: Vector) -> tuple[float, Vector]:
        scale, bias = point[:labels], point[labels:]
        log_p = _normalised(scale * rows.z + bias)
        off = numpy.exp(log_p) - targets  # gradient of each row's loss by its scores
        away = point - centre
        gradient = numpy.concatenate([(off * rows.z).sum(0), off.sum(0)]) + away
        return float(-(targets * log_p).sum() + away @ away / 2), gradient

    bounds = [(0.0, None)] * labels + [(None, None)] * labels
    point = minimize(loss, centre, jac=True, method="L-BFGS-B", bounds=bounds).x
    return point[:labels], point[labels:]


_FITS: dict[CalibrationMethod, Callable[[_Rows], _Fit]] = {
    "none": _none,
    "contextual": _contextual,
    "batch": _batch,
    "pride": _pride,
    "base": _base,
    "temperature": _temperature,
    "vector": _vector,
}


def _tempered(z: Matrix, targets: Matrix) -> _Fit:
    """One scale for all labels, by the least cross-entropy to `targets`; the loss is convex in it."""
    from scipy.optimize import minimize_scalar

    def loss(log_scale: float) -> float:
        return float(-(targets * _normalised(numpy.exp(log_scale) * z)).sum())

    scale = float(numpy.exp(minimize_scalar(loss, bounds=(-7.0, 7.0), method="bounded").x))
    return numpy.full(z.shape[1], scale), numpy.zeros(z.shape[1])


def _pick(rows: _Rows) -> tuple[CalibrationMethod, float | None, str]:
    """Choose a method, and say why."""
    if rows.gold is None:
        return "batch", None, f"no gold labels, so the mean of {len(rows.z)} texts is taken away"
    raw, least = _cross_validated(rows, "none")
    lacking = {name for name, needed in (("base", rows.base), ("pride", rows.turned)) if needed is None}
    scores = {name: _cross_validated(rows, name) for name in _FITS if name not in lacking}
    chosen = min((name for name in scores if scores[name][1] >= least), key=lambda name: scores[name][0])
    nll, accuracy = scores[chosen]
    return (
        chosen,
        nll,
        (
            f"of {', '.join(scores)} it has the lowest negative log-likelihood in {FOLDS}-fold cross-validation on "
            f"{len(rows.z)} rows with labels: {nll:.3f} nats (raw {raw:.3f}), accuracy {accuracy:.3f} (raw {least:.3f})"
        ),
    )


def _cross_validated(rows: _Rows, method: CalibrationMethod) -> tuple[float, float]:
    """Mean negative log-likelihood and accuracy on rows that each fit has not seen."""
    assert rows.gold is not None
    fold = numpy.random.default_rng(0).permutation(len(rows.z)) % FOLDS
    log_p = numpy.empty_like(rows.z)
    for each in range(FOLDS):
        scale, bias = _FITS[method](rows.part(fold != each))
        log_p[fold == each] = _normalised(scale * rows.z[fold == each] + bias)
    right = log_p[numpy.arange(len(log_p)), rows.gold]
    return float(-right.mean()), float((log_p.argmax(1) == rows.gold).mean())


def _normalised(scores: Matrix) -> Matrix:
    top = scores.max(1, keepdims=True)
    normalised: Matrix = scores - top - numpy.log(numpy.exp(scores - top).sum(1, keepdims=True))
    return normalised


def _one_hot(rows: _Rows) -> Matrix:
    assert rows.gold is not None
    hot: Matrix = numpy.eye(rows.z.shape[1])[rows.gold]
    return hot


def _matrix(masses: Sequence[Sequence[float] | RowError]) -> Matrix:
    return numpy.array([log_probabilities(mass) for mass in masses if not isinstance(mass, RowError)])


def _content_free(asking: Asking) -> Matrix:
    turns = range(len(asking.labels)) if asking.rotates else range(1)
    found = [asking.log_masses([asking.about(text, turn) for turn in turns], asking.adapter) for text in CONTENT_FREE]
    good = [[turn for turn in text if not isinstance(turn, RowError)] for text in found]
    return _matrix([averaged(text) for text in good if text])


def _turned(asking: Asking, texts: Sequence[str | RowError], kept: Sequence[int]) -> Matrix:
    """Read some texts in every rotation, spread over all that could be read."""
    some = [texts[place] for place in kept[:: -(-len(kept) // PRIDE_ROWS)]]
    found = asking.turned_log_masses(some, asking.adapter)
    return numpy.stack([_matrix(turns) for turns in found if not isinstance(turns, RowError)])


def _check_gold(gold: Sequence[str] | None, texts: Sequence[object], names: tuple[str, ...]) -> list[int] | None:
    if gold is None:
        return None
    check_rows("gold", gold)
    if len(gold) != len(texts):
        raise InvalidRequest(f"gold holds a label for each of {len(texts):,} texts, but got {len(gold):,}.")
    strange = [label for label in gold if label not in names]
    if strange:
        raise InvalidRequest(
            f"gold holds names of labels, but {strange[0]!r:.80} is none of {', '.join(names)!r:.200}."
        )
    return [names.index(label) for label in gold]


def _check_method(method: object, labelled: bool, adapted: bool, ordered: bool) -> None:
    if method is not None and method not in _FITS:
        raise InvalidRequest(f"method is one of {', '.join(_FITS)}, or None, but got {method!r:.80}. Name one of them.")
    if method in ("temperature", "vector") and not labelled:
        raise InvalidRequest(
            f"method={method!r} is fitted on gold labels, but there are none. Give gold, or use 'batch'."
        )
    if method == "pride" and not ordered:
        raise InvalidRequest(
            "method='pride' takes away what the places of the labels in the prompt are favoured by, but this question "
            "names none, or rotates them. Use show_labels=True, or another method."
        )
    if method == "base" and not adapted:
        raise InvalidRequest(
            "method='base' compares with the bare base, but this question uses no adapter. Use another method."
        )
