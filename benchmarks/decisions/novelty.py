"""Does a distance between features find foreign images that the uncertainty of an ensemble does not?

    python -m benchmarks.decisions.novelty NAME [--foreign digits noise imagefolder:PATH …]      writes results/novelty.md, or --output

NAME is a published ensemble. Features are the input of the last matrix product of its first member; their statistics come from 5000 training images.
Mahalanobis: squared distance to the nearest class mean under the shrunk covariance within classes (Lee et al. 2018), the score that versions get. kNN:
distance to the tenth nearest normalised training feature (Sun et al. 2022). Found: the share of foreign images above the 99th percentile of 3000
validation images. `held-out`: test images of classes that were held out of the training (--hold-out). `noise` and `textures`: see
training/data/generated.py. `inverted`: the test images with dark and light exchanged.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from tabulate import tabulate

from models_store.decisions import novelty
from models_store.graphs.novelty import Detector, cut_at, features_of
from models_store.graphs.runtime import EnsembleSession, MemberSession, Part, in_batches
from models_store.store import Store
from models_store.uncertainty import UNCERTAINTY_MEASURES, softmax
from training import data
from training.config import data_options
from training.data import generated
from training.measurement.foreign import fit_images
from training.members import metrics

RESULT = Path(__file__).parents[1] / "results/novelty.md"


def features_of_member(file: Path) -> Callable[[np.ndarray], np.ndarray]:
    """(images, C, H, W) in [0, 1] -> the penultimate features of a member, (images, features)."""
    model = onnx.load_from_string(file.read_bytes())
    tensor = features_of(model)
    assert tensor is not None, "the logits come from a matrix product"
    session = MemberSession(cut_at(model, tensor))
    return lambda images: in_batches(session, images).astype(np.float64)


def nearest(features: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Negative cosine with the tenth nearest training image, (images,)."""
    normal, others = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (features, training))
    found = [np.partition(normal[i : i + 500] @ others.T, -10, axis=1)[:, -10] for i in range(0, len(normal), 500)]
    return -np.concatenate(found)


def cost(detector: Detector, file: Path, images: np.ndarray, rounds: int = 31) -> float:
    """Time of the member with the second output over that without it: the median of pairs, batches of 32, one thread."""
    parts = [Part(model, str(file), "cpu", 1) for model in (detector.attached_to(file), file)]
    ratios: list[float] = []
    for number in range(rounds + 3):
        seconds: list[float] = []
        for part in parts if number % 2 else parts[::-1]:
            began = time.perf_counter()
            part.run(images[:32])
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1] if number % 2 else seconds[1] / seconds[0])
    return float(np.median(ratios[3:]))  # the first runs allocate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--foreign", nargs="+", default=["digits", "noise", "textures", "inverted"])
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    version = Store().resolve(args.name)
    options = data_options(version.manifest.provenance.config)
    splits = data.load(options)
    session = EnsembleSession(version.folder, version.manifest)
    file = version.folder / version.manifest.members[0].file
    features = features_of_member(file)
    images, labels, _ = data.seen_images(splits, options.dataset)
    training = features(images)
    detector = novelty.fit(file, 0, images, labels)
    assert detector is not None, "the member has features"

    def scores(images: np.ndarray) -> dict[str, np.ndarray]:
        probs = session.probs(in_batches(session, images))
        answers = session.combine(probs)
        alone = softmax(in_batches(session, images)[0], version.manifest.members[0].temperature)
        return {
            **{
                f"ensemble: {name.replace('_', ' ')}": sign * getattr(answers, name)
                for name, sign in UNCERTAINTY_MEASURES.items()
            },
            "one network: confidence": -alone.max(axis=1),
            "one network: Mahalanobis": novelty.scores(detector, file, images).astype(np.float64),
            "one network: kNN": nearest(features(images), training),
        }

    known, test = scores(data.as_arrays(splits.validation, 3000)[0]), data.as_arrays(splits.test, 3000)[0]
    of_test = scores(test)
    limits = {name: np.quantile(values, 0.99) for name, values in known.items()}
    table: dict[str, list[str]] = {name: [f"{(of_test[name] > limits[name]).mean():.3f}"] for name in limits}
    for name in args.foreign:
        if name == "held-out":
            outside = data.foreign(options, 2000)[0]
        elif name in generated.SETS:
            outside = generated.SETS[name](version.manifest.input.shape)
        elif name == "inverted":
            outside = 1 - test
        else:
            own = dataclasses.replace(options, dataset=name, mean=None, std=None, limit=None, hold_out=())
            outside = fit_images(data.foreign(own, 2000)[0], version.manifest.input.shape)
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
            f"The second output takes {100 * (cost(detector, file, images) - 1):.1f} % of the time of its member.", "",
            tabulate([[name, *cells] for name, cells in table.items()], headers, tablefmt="github", disable_numparse=True), "",
        ]
    )  # fmt: skip
    args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
