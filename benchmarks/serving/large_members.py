"""Publishes members of the size of ResNet-50, calibrated, to measure what a cascade of large members costs.

    python -m benchmarks.serving.large_members NAME FILE.npz [--members 5] [--images 200]
    python -m benchmarks.serving.cascade NAME --images FILE.npz --output benchmarks/results/cascade_large.md

No pre-trained weights are at hand here, so the members are one ResNet-50 with random weights and small perturbations of them: they agree on almost
every image. That is the case in which a cascade saves most; what it costs where members disagree is the price of `average` and of its groups.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
import torchvision
from onnx import numpy_helper

from models_store.decisions import calibrating
from models_store.graphs.runtime import MemberSession, in_batches
from models_store.importing import ImportOptions, import_members
from models_store.store import Store

NOISE = 0.01  # of each weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("file", type=Path)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--images", type=int, default=130)
    args = parser.parse_args()
    torch.manual_seed(0)
    network = torchvision.models.resnet50(num_classes=10).eval()
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((args.images, 3, 7, 7), np.float32))
    images = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bilinear").clamp(0, 1).numpy()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.onnx"
        exported = torch.onnx.export(
            network,
            (torch.zeros(2, 3, 224, 224),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        exported.save(str(base))
        files = []
        for number in range(args.members):
            model = onnx.load(base)
            for tensor in model.graph.initializer:
                values = numpy_helper.to_array(tensor)
                if values.dtype == np.float32 and values.ndim > 1:
                    noisy = values * (1 + NOISE * rng.standard_normal(values.shape, np.float32))
                    tensor.CopyFrom(numpy_helper.from_array(noisy.astype(np.float32), tensor.name))
            files.append(Path(folder) / f"{number}.onnx")
            onnx.save(model, files[-1])
        version = import_members(Store(), args.name, files, ImportOptions())
    first = MemberSession(version.folder / version.manifest.members[0].file)
    np.savez(args.file, x=images, y=in_batches(first, images, 8).argmax(axis=1))
    calibrated = calibrating.calibrate(Store(), version, calibrating.from_npz(args.file))
    print(calibrated.name, calibrated.manifest.calibration)


if __name__ == "__main__":
    main()
