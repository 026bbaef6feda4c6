"""How good a score is: ranking and calibration, on scikit-learn and scipy. None where it is not defined."""

import numpy


def auroc(score, label):
    """Score [n], label [n] of 0 and 1 -> the probability that a 1 has a greater score than a 0 (equal: half)."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(label, score)) if len(set(map(int, label))) == 2 else None


def average_precision(score, label):
    """The same -> the area under precision over recall, as scikit-learn sums it; the share of 1 is what chance has."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(label, score)) if len(set(map(int, label))) == 2 else None


def reliability(chance, label, bins=10):
    """Chance [n] in [0, 1], label [n] -> [(mean chance, share of 1, n) of each bin of equal width that has some]."""
    chance, label = numpy.asarray(chance, float), numpy.asarray(label, float)
    where = numpy.minimum((chance * bins).astype(int), bins - 1)
    of = [(chance[where == b], label[where == b]) for b in range(bins)]
    return [(float(c.mean()), float(y.mean()), len(c)) for c, y in of if len(c)]


def ece(chance, label, bins=10):
    """Expected calibration error: how far chance and share of 1 are apart in a bin, meant over all."""
    return sum(abs(c - y) * n for c, y, n in reliability(chance, label, bins)) / len(chance)


def interval(of, *arrays, resamples=1000, seed=0):
    """95% bootstrap interval (percentile, rows resampled together) of the number that of(*arrays) gives; (None, None) where a
    resample has none, and of fewer than two rows."""
    from scipy import stats

    if len(arrays[0]) < 2:
        return None, None

    def number(*parts):
        found = of(*parts)
        return float("nan") if found is None else found

    made = dict(paired=True, vectorized=False, method="percentile", n_resamples=resamples, rng=seed)
    low, high = stats.bootstrap(tuple(map(numpy.asarray, arrays)), number, **made).confidence_interval
    return (None, None) if numpy.isnan([low, high]).any() else (float(low), float(high))
