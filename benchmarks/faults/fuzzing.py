"""Coverage-guided fuzzing of everything that reads untrusted bytes, with atheris (libFuzzer).

    python -m benchmarks.faults.fuzzing TARGET [--seconds 600] [--keep 60]

The targets are those of tests/fuzz_targets.py: image, npy, json, manifest, onnx. It starts from the corpus in tests/corpora/TARGET and from valid examples. An input that
crashes a target, or takes more than ten seconds or 2 GiB, ends the run with exit code 1. Afterwards the inputs that reach the most are written
to the corpus, smallest first; tests/test_corpora.py runs them all. Needs `pip install atheris`, in an environment of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORPORA = ROOT / "tests/corpora"
# Libraries are not instrumented: their branches would drown ours, and Pillow's decoders are in C.
OURS = [
    "models_store.inputs",
    "models_store.manifest",
    "models_store.graphs",
    "service.http.bodies",
    "service.http.images",
    "service.http.large_json",
    "PIL",
]
MOST_BYTES = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--keep", type=int, default=60, help="inputs that the corpus keeps")
    parser.add_argument("--inside", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        fuzz(args.target, args.inside)
        return
    corpus = CORPORA / args.target
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        for content in [*seeds(args.target), *(file.read_bytes() for file in corpus.iterdir())]:
            (work / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)
        limits = [f"-max_len={MOST_BYTES}", "-timeout=10", "-rss_limit_mb=2048", f"-artifact_prefix={folder}/"]
        code = inside(args.target, [*limits, f"-max_total_time={args.seconds}", "-print_final_stats=1", str(work)])
        found = [file for kind in ("crash", "timeout", "oom", "slow-unit") for file in Path(folder).glob(f"{kind}-*")]
        for file in found:
            kept = Path(tempfile.gettempdir()) / file.name
            kept.write_bytes(file.read_bytes())
            print(f"{args.target}: {kept}")
        if code or any(not file.name.startswith("slow") for file in found):
            sys.exit(1)
        chosen = sorted(work.iterdir(), key=lambda file: (file.stat().st_size, file.name))
        for file in chosen[:: max(1, len(chosen) // args.keep)][: args.keep]:
            (corpus / hashlib.sha256(file.read_bytes()).hexdigest()[:16]).write_bytes(file.read_bytes())
        print(
            f"{args.target}: {len(chosen)} inputs reached something new; the corpus has {len(list(corpus.iterdir()))}"
        )


def inside(target: str, options: list[str]) -> int:
    command = [sys.executable, "-m", "benchmarks.faults.fuzzing", target, "--inside", *options]
    return subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "PYTHONHASHSEED": "0"}).returncode


def fuzz(target: str, options: list[str]) -> None:
    import atheris  # pyright: ignore[reportMissingModuleSource] - in an environment of its own

    with atheris.instrument_imports(include=OURS, enable_loader_override=False):
        from tests import fuzz_targets
    run = fuzz_targets.TARGETS[target]
    atheris.Setup([sys.argv[0], *options], run)
    atheris.Fuzz()


def seeds(target: str) -> list[bytes]:
    """Valid inputs, from which the first mutations are made."""
    import numpy as np
    from PIL import Image

    from models_store.store import Store
    from tests.onnx_members import bank, linear, publish

    pixels = np.random.default_rng(0).random((2, 1, 4, 4), np.float32)
    if target == "image":
        pictures = []
        for mode in ("L", "RGB", "RGBA", "P", "1", "I;16", "LA"):
            for kind in ("PNG", "JPEG", "WEBP", "GIF"):
                stream = io.BytesIO()
                try:
                    Image.new(mode, (9, 8), 1 if mode in ("P", "1", "I;16") else None).save(stream, kind)
                except (OSError, ValueError):
                    continue
                pictures.append(stream.getvalue())
        return pictures
    if target == "npy":
        arrays = []
        for array in (
            pixels,
            pixels.astype(np.float64),
            np.asfortranarray(pixels),
            np.ones((2, 3)),
            np.ones((2, 6), np.int64),
        ):
            stream = io.BytesIO()
            np.save(stream, array)
            arrays.append(stream.getvalue())
        stream = io.BytesIO()
        np.savez(stream, age=np.ones(2, np.float32), job=np.array(["a", "b"]))
        return [*arrays, stream.getvalue()]
    if target == "json":
        return [
            b'{"inputs": [[[[0, 1, 0.5, 0.25], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]]]], "coverage": 0.9, "members": true}',
            b'{"inputs": [{"age": 3.5, "job": "a"}], "risk": 0.1}', b'{"inputs": {"age": [1, 2], "job": ["a", "b"]}}',
            b'{"inputs": [[1, 2, 3]], "mode": "average"}', b'{"texts": ["a b"]}', b'{"images": ["iVBORw0KGgo="]}',
        ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        version = publish(Store(Path(folder)), "e", (0, 1), bank=bank())
        if target == "manifest":
            return [(version.folder / "manifest.json").read_bytes()]
    return [linear(0).SerializeToString(), linear(1, softmax=True).SerializeToString()]


if __name__ == "__main__":
    main()
