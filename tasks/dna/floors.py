"""The simple models that a network has to beat, fitted to the very windows that evaluation sees.

- k-mers, binary: which 6-mers occur, linear SVM
- k-mers, tf-idf: how often each 3- to 6-mer occurs, weighed down if common, linear SVM
- one-hot: a column a base and place, SVM with a Gaussian kernel; for sequences of one short length

Source: counts as features are Leslie et al. 2002, "The spectrum kernel"; the settings are those of scikit-learn, C from
{1, 3} chosen once on fly_splice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mambaverse.tasks.dna.encoders import kmers, one_hot
from mambaverse.tasks.dna.sequences import DnaSamples

BINARY, COUNTED = (6,), (3, 4, 5, 6)
SHORT = 100  # bases; a kernel on one-hot columns means something where places do
MOST = 20_000  # training sequences of the kernel machine, whose time grows with their square
Floor = Callable[[], np.ndarray]


def floors(train: DnaSamples, reported: DnaSamples) -> dict[str, Floor]:
    """Return the floors by name; each fits `train` and returns class numbers (N,) for `reported`."""
    found: dict[str, Floor] = {
        "6-mers, linear SVM": lambda: _kmer_svm(train, reported, BINARY, binary=True),
        "3- to 6-mers tf-idf, linear SVM": lambda: _kmer_svm(train, reported, COUNTED, binary=False),
    }
    sizes = {len(window) for samples in (train, reported) for window in samples.windows()}
    if len(sizes) == 1 and max(sizes) <= SHORT and len(train) <= MOST:
        found["one-hot, RBF SVM"] = lambda: _one_hot_svm(train, reported)
    return found


def _kmer_svm(train: DnaSamples, reported: DnaSamples, sizes: tuple[int, ...], *, binary: bool) -> np.ndarray:
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.svm import LinearSVC

    x, x_new = (kmers(samples.windows(), sizes, binary=binary) for samples in (train, reported))
    if not binary:
        weigh = TfidfTransformer(sublinear_tf=True).fit(x)
        x, x_new = weigh.transform(x), weigh.transform(x_new)
    return LinearSVC(random_state=0).fit(x, train.sequences.labels).predict(x_new)


def _one_hot_svm(train: DnaSamples, reported: DnaSamples) -> np.ndarray:
    from sklearn.svm import SVC

    x, x_new = (one_hot(np.stack(s.windows())).reshape(len(s), -1) for s in (train, reported))
    return SVC(C=3.0).fit(x, train.sequences.labels).predict(x_new)
