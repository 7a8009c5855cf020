"""Does a distance between features find foreign images that the uncertainty of an ensemble does not?

    python -m benchmarks.decisions.novelty NAME [--foreign digits noise imagefolder:PATH …]      writes results/novelty.md

NAME is a published ensemble. Features are the input of the last matrix product of its first member, read from its ONNX file; their statistics come
from 5000 training images. Mahalanobis: distance to the nearest class mean under the covariance within classes (Lee et al. 2018). kNN: distance to the
tenth nearest normalised training feature (Sun et al. 2022). Found: the share of foreign images above the 99th percentile of 3000 validation images.
`noise` is uniform noise, `inverted` the test images with dark and light exchanged.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from tabulate import tabulate

from models_store.graphs.runtime import EnsembleSession, in_batches
from models_store.store import Store
from models_store.uncertainty import UNCERTAINTY_MEASURES, softmax
from training import data
from training.config import data_options
from training.evaluate import fit_images
from training.members import metrics

RESULT = Path(__file__).parents[1] / "results/novelty.md"


class Features:
    """The penultimate features of a member, (batch, features)."""

    def __init__(self, file: Path):
        model = onnx.load(file)
        made = {name: node for node in model.graph.node for name in node.output}
        node = made[model.graph.output[0].name]
        while node.op_type not in ("Gemm", "MatMul"):
            node = made[next(name for name in node.input if name in made)]
        name = next(name for name in node.input if name in made)
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        self._name, self._session = (
            name,
            onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]),
        )

    def of(self, images: np.ndarray) -> np.ndarray:
        """(batch, C, H, W) in [0, 1] -> (batch, features)."""
        parts = [
            self._session.run([self._name], {"images": images[i : i + 256]})[0] for i in range(0, len(images), 256)
        ]
        return np.vstack([part.reshape(len(part), -1) for part in parts]).astype(np.float64)


class Distances:
    """Scores of features; large values are far from the training images."""

    def __init__(self, features: np.ndarray, labels: np.ndarray):
        self._means = np.stack([features[labels == label].mean(axis=0) for label in np.unique(labels)])
        within = features - self._means[np.searchsorted(np.unique(labels), labels)]
        covariance = np.cov(within.T) + 1e-6 * np.trace(within.T @ within) / within.size * np.eye(features.shape[1])
        self._precision = np.linalg.inv(covariance)
        self._training = features / np.linalg.norm(features, axis=1, keepdims=True)

    def mahalanobis(self, features: np.ndarray) -> np.ndarray:
        """Squared distance to the nearest class mean, (batch,)."""
        apart = features[:, None] - self._means
        return np.einsum("ncf,fg,ncg->nc", apart, self._precision, apart).min(axis=1)

    def knn(self, features: np.ndarray) -> np.ndarray:
        """Negative cosine with the tenth nearest training image, (batch,)."""
        normal = features / np.linalg.norm(features, axis=1, keepdims=True)
        nearest = np.empty(len(normal))
        for i in range(0, len(normal), 500):
            nearest[i : i + 500] = np.partition(normal[i : i + 500] @ self._training.T, -10, axis=1)[:, -10]
        return -nearest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--foreign", nargs="+", default=["digits", "noise", "inverted"])
    args = parser.parse_args()
    version = Store().resolve(args.name)
    options = data_options(version.manifest.provenance.config)
    splits = data.load(options)
    session = EnsembleSession(version.folder, version.manifest)
    features = Features(version.folder / version.manifest.members[0].file)
    images, labels = data.as_arrays(splits.train, 5000)
    distances = Distances(features.of(images), labels)

    def scores(images: np.ndarray) -> dict[str, np.ndarray]:
        probs = session.probs(in_batches(session, images))
        answers = session.combine(probs)
        own = features.of(images)
        alone = softmax(in_batches(session, images)[0], version.manifest.members[0].temperature)
        return {
            **{
                f"ensemble: {name.replace('_', ' ')}": sign * getattr(answers, name)
                for name, sign in UNCERTAINTY_MEASURES.items()
            },
            "one network: confidence": -alone.max(axis=1),
            "one network: Mahalanobis": distances.mahalanobis(own),
            "one network: kNN": distances.knn(own),
        }

    known, test = scores(data.as_arrays(splits.validation, 3000)[0]), data.as_arrays(splits.test, 3000)[0]
    of_test = scores(test)
    limits = {name: np.quantile(values, 0.99) for name, values in known.items()}
    table: dict[str, list[str]] = {name: [f"{(of_test[name] > limits[name]).mean():.3f}"] for name in limits}
    for name in args.foreign:
        if name == "noise":
            outside = np.random.default_rng(0).random(test.shape, np.float32)
        elif name == "inverted":
            outside = 1 - test
        else:
            outside = fit_images(
                data.foreign(dataclasses.replace(options, dataset=name, mean=None, std=None, limit=None), 2000)[0],
                version.manifest.input.shape,
            )
        found = scores(outside)
        is_foreign = np.repeat([False, True], [len(test), len(outside)])
        for measure, cells in table.items():
            area = metrics.auroc(np.concatenate([of_test[measure], found[measure]]), is_foreign)
            cells.append(f"{area:.3f}, {(found[measure] > limits[measure]).mean():.3f}")
    headers = ["score", "false alarms on test", *(f"{name.partition(':')[0]}: AUROC, found" for name in args.foreign)]
    text = "\n".join(
        [
            "# Foreign images by uncertainty and by features", "",
            f"`python -m benchmarks.decisions.novelty {args.name} --foreign {' '.join('imagefolder:…' if name.startswith('imagefolder:') else name for name in args.foreign)}`: {len(version.manifest.members)} members of "
            f"{version.manifest.network.factory}, {options.dataset}.", "",
            tabulate([[name, *cells] for name, cells in table.items()], headers, tablefmt="github", disable_numparse=True), "",
        ]
    )  # fmt: skip
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
