"""A random forest on catalogue columns, written as ONNX: the baseline that a network has to beat. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from batchproc.errors import ModelError, UsageError
from batchproc.io.atomic import write_bytes
from batchproc.io.cards import InputCard
from batchproc.training.examples import Examples
from batchproc.training.settings import TrainSettings
from batchproc.training.terms import IR, OPSET, TERMS, columns_of, compute, to_onnx
from batchproc.training.train import Learnt

__all__ = ["Forest", "ForestConfig", "fit_forest", "learn"]

FILE = "model.onnx"


@dataclass(frozen=True)
class ForestConfig:
    """How to grow a forest."""

    trees: int = 200
    leaves: int = 256
    """Of a tree, at most: the file has some 40 bytes for each of twice as many nodes."""
    smallest_leaf: int = 5
    """Candidates in it."""
    terms: tuple[str, ...] = TERMS
    """See `batchproc.training.terms`."""
    balanced: bool = True
    """Each class is weighted alike, whatever its number; otherwise each candidate."""
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Forest:
    """A fitted forest.

    Attributes
    ----------
    estimator : sklearn.ensemble.RandomForestClassifier
    terms : tuple of str
    classes : tuple of str
        What it answers, in this order: the probability of each; of two classes "real" and "bogus", of "real" alone.
    """

    estimator: Any
    terms: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def features(self) -> tuple[str, ...]:
        """Catalogue columns that the ONNX file takes, in its order."""
        return columns_of(self.terms)

    @property
    def importance(self) -> dict[str, float]:
        """Share of each term in what the splits gained (mean decrease of impurity), largest first."""
        found = dict(zip(self.terms, map(float, self.estimator.feature_importances_), strict=True))
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def predict(self, table: pd.DataFrame | Mapping[str, NDArray]) -> NDArray[np.float64]:
        """Probabilities ``(n, len(classes))`` by scikit-learn; columns must be finite."""
        found = self.estimator.predict_proba(compute(self.terms, table))
        return np.asarray(found)[:, self._places()]

    def to_onnx(self) -> bytes:
        """A file from ``features`` ``(n, k)`` float32 to ``score`` ``(n, len(classes))``.

        Raises
        ------
        ModelError
            ``skl2onnx`` is not installed.
        """
        try:
            import onnx
            from skl2onnx import convert_sklearn
            from skl2onnx.common.data_types import FloatTensorType
        except ImportError as error:
            raise _not_installed(error) from None
        grown = convert_sklearn(
            self.estimator,
            name="forest",  # otherwise a random one: the same forest shall be the same bytes
            initial_types=[("terms", FloatTensorType([None, len(self.terms)]))],
            options={id(self.estimator): {"zipmap": False}},
            target_opset={"": OPSET, "ai.onnx.ml": 3},
        )
        grown = onnx.utils.Extractor(grown).extract_model(["terms"], ["probabilities"])  # without the label
        grown.ir_version = IR
        whole = onnx.compose.merge_models(to_onnx(self.terms, self.features), grown, io_map=[("terms", "terms")])
        graph = whole.graph
        graph.name = "forest"
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(self._places(), np.int64), "places"))
        graph.node.append(onnx.helper.make_node("Gather", ["probabilities", "places"], ["score"], axis=1))
        del graph.output[:]
        value = onnx.TensorProto.FLOAT
        graph.output.append(onnx.helper.make_tensor_value_info("score", value, ["n", len(self.classes)]))
        onnx.checker.check_model(whole)
        data: bytes = whole.SerializeToString()
        return data

    def _places(self) -> list[int]:
        return [list(self.estimator.classes_).index(name) for name in self.classes]


def fit_forest(
    table: pd.DataFrame | Mapping[str, NDArray],
    label: ArrayLike,
    *,
    config: ForestConfig | None = None,
    classes: Sequence[str] | None = None,
) -> Forest:
    """Grow a forest on candidates of known kind.

    Parameters
    ----------
    table : DataFrame or mapping of (n,) arrays
        With the columns that the terms are made of. Rows that lack one of them are left out.
    label : array_like (n,) of str
    config : ForestConfig, optional
    classes : sequence of str, optional
        In the order of the answer. By default "real" alone where the labels are "real" and "bogus", otherwise the
        labels in the order of the alphabet.

    Raises
    ------
    UsageError
        A column that is missing, one class only, or classes that are not the labels.
    ModelError
        scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError as error:
        raise _not_installed(error) from None
    config = ForestConfig() if config is None else config
    names = np.asarray(label, dtype=np.str_)
    complete = np.all([np.isfinite(np.asarray(table[c], np.float64)) for c in columns_of(config.terms)], axis=0)
    there = sorted(set(names[complete].tolist()))
    if len(there) < 2:
        raise UsageError(
            f"found {', '.join(there) or 'nothing'} among {complete.sum()} of {len(names)} candidates that have all of "
            f"{', '.join(columns_of(config.terms))}; expected two classes or more"
        )
    if classes is None:
        classes = ("real",) if there == ["bogus", "real"] else there
    if not set(classes) <= set(there):
        raise UsageError(f"classes {', '.join(classes)}, but the labels are {', '.join(there)}")
    estimator = RandomForestClassifier(
        n_estimators=config.trees,
        max_leaf_nodes=config.leaves,
        min_samples_leaf=config.smallest_leaf,
        class_weight="balanced" if config.balanced else None,
        random_state=config.seed,
        n_jobs=config.threads,
    )
    estimator.fit(compute(config.terms, table)[complete], names[complete])
    return Forest(estimator, tuple(config.terms), tuple(classes))


def learn(
    train: Examples, valid: Examples, *, classes: Sequence[str], folder: Path, settings: TrainSettings, quiet: bool
) -> Learnt:
    """A `batchproc.training.train.Learner`: no stamps are looked at, and `valid` is left to choose the threshold by."""
    config = ForestConfig(
        trees=settings.trees,
        leaves=settings.leaves,
        smallest_leaf=settings.smallest_leaf,
        terms=settings.features or TERMS,
        balanced=settings.balance != "none",
        seed=settings.seed,
        threads=settings.threads,
    )
    forest = fit_forest(train.table, train.label, config=config, classes=classes)
    write_bytes(folder / FILE, forest.to_onnx())
    notes = {
        **{key: value for key, value in asdict(config).items() if key not in ("terms", "threads", "seed")},
        "importance": {term: round(share, 4) for term, share in forest.importance.items()},
    }
    return Learnt(
        files={"float": FILE},
        input=InputCard(size=0, normalisation="none", channels=(), features=forest.features),
        notes=notes,
    )


def _not_installed(error: ImportError) -> ModelError:
    return ModelError(f"to train a forest, install what that needs: pip install 'batchproc[forest]' ({error})")
