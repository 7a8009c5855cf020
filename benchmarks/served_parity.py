"""What is served against what was published: probabilities over HTTP and the mean over the ONNX files, in plain onnxruntime.

    python -m benchmarks.served_parity NAME [--url http://127.0.0.1:3000] [--images 1000]

Asks a running service for the test images of the data set that NAME was trained on. Nothing of ours computes the expectation.
"""

from __future__ import annotations

import argparse
import json
import urllib.request

import numpy as np
import onnxruntime
from scipy.special import softmax

from models_store.store import Store
from training import data
from training.config import data_options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--dataset")
    args = parser.parse_args()
    version = Store().resolve(args.name)
    config = {**version.manifest.provenance.config, **({"dataset": args.dataset} if args.dataset else {})}
    found = data.load(data_options(config), lambda line: None)
    # Test images first; where there are fewer than asked for, validation and training images follow.
    parts = [data.as_arrays(split)[0] for split in (found.test, found.validation, found.train)]
    images = np.concatenate(parts)[: args.images]
    expected = np.zeros((len(images), len(found.classes)))
    for member in version.manifest.members:
        session = onnxruntime.InferenceSession(version.folder / member.file, providers=["CPUExecutionProvider"])
        logits = session.run(["logits"], {"images": images})[0].astype(np.float64)
        expected += member.weight * softmax(logits / version.manifest.temperature, axis=1)
    served = []
    for start in range(0, len(images), 50):
        body = json.dumps({"inputs": images[start : start + 50].tolist(), "ensemble": version.manifest.name}).encode()
        request = urllib.request.Request(f"{args.url}/predict", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            served += [row["probs"] for row in json.load(answer)["predictions"]]
    difference = np.abs(np.array(served) - expected).max()
    print(
        f"{version.name}: {len(images)} images, {len(version.manifest.members)} members, maximum difference {difference:.2e}"
    )


if __name__ == "__main__":
    main()
