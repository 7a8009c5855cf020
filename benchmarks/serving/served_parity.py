"""What is served against what was published: probabilities over HTTP and the mean over the ONNX files, in plain onnxruntime.

    python -m benchmarks.serving.served_parity NAME [--url http://127.0.0.1:3000] [--images 1000]

Asks a running service for the test images of the data set that NAME was trained on, in every form they can be sent in: JSON lists, an
array, and, where the pixels are whole bytes, PNG files alone and in base64. Nothing of ours computes the expectation.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import urllib.request

import numpy as np
import onnxruntime
from PIL import Image
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
    found = data.load(data_options(config))
    # Test images first; where there are fewer than asked for, validation and training images follow.
    parts = [data.as_arrays(split)[0] for split in (found.test, found.validation, found.train)]
    images = np.concatenate(parts)[: args.images]
    expected = np.zeros((len(images), len(found.classes)))
    for member in version.manifest.members:
        session = onnxruntime.InferenceSession(version.folder / member.file, providers=["CPUExecutionProvider"])
        logits = session.run(["logits"], {"images": images})[0].astype(np.float64)
        expected += member.weight * softmax(logits / version.manifest.temperature, axis=1)
    answers = {form: ask(args.url, version.manifest.name, requests) for form, requests in forms(images).items()}
    print(f"{version.name}: {len(images)} images, {len(version.manifest.members)} members; maximum difference")
    for form, served in answers.items():
        print(
            f"  {form}: from the ONNX files {np.abs(served - expected).max():.2e}, from the lists {np.abs(served - answers['lists']).max():.2e}"
        )


def forms(images: np.ndarray) -> dict[str, list[tuple[str, bytes]]]:
    """Media types and bodies that together hold all images, by form."""
    json_type = "application/json"
    parts = [images[start : start + 50] for start in range(0, len(images), 50)]
    found = {
        "lists": [(json_type, json.dumps({"inputs": part.tolist()}).encode()) for part in parts],
        "arrays": [("application/x-npy", npy(part)) for part in parts],
    }
    pixels = images * np.float32(255)
    if images.shape[1] in (1, 3) and np.abs(pixels - pixels.round()).max() < 1e-3:
        files = [png(image) for image in pixels.round().astype(np.uint8)]
        found["PNG files"] = [("image/png", file) for file in files]
        encoded = [base64.b64encode(file).decode() for file in files]
        found["base64"] = [
            (json_type, json.dumps({"images": encoded[start : start + 50]}).encode())
            for start in range(0, len(files), 50)
        ]
    return found


def npy(images: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, images)
    return stream.getvalue()


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


def ask(url: str, name: str, requests: list[tuple[str, bytes]]) -> np.ndarray:
    probs = []
    for media_type, body in requests:
        if media_type == "application/json":
            address, body = f"{url}/predict", json.dumps({**json.loads(body), "ensemble": name}).encode()
        else:
            address = f"{url}/predict?ensemble={name}"
        request = urllib.request.Request(address, body, {"Content-Type": media_type})
        with urllib.request.urlopen(request) as answer:
            probs += [row["probs"] for row in json.load(answer)["predictions"]]
    return np.array(probs)


if __name__ == "__main__":
    main()
