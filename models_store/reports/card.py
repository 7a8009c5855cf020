"""The model card of a version, in Markdown (Mitchell et al. 2019). It says what the manifest records, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator

from models_store.manifest import InputSpec, Manifest

_CLASSES = 20  # named in full
_OPTIONS = ("dataset", "network", "epochs", "lr", "batch_size", "weight_decay", "augment", "seed")


def card(manifest: Manifest) -> str:
    """Return the model card as Markdown. It holds provenance, so it is for the operator of a defended ensemble only."""
    return "\n".join(_lines(manifest)) + "\n"


def _lines(manifest: Manifest) -> Iterator[str]:
    yield f"# {manifest.name}, version {manifest.version}"
    yield ""
    yield from _model(manifest)
    yield from _use(manifest)
    yield from _training(manifest)
    yield from _evaluation(manifest)
    yield from _decisions(manifest)


def _model(manifest: Manifest) -> Iterator[str]:
    count, classes = len(manifest.classes), manifest.classes
    named = ", ".join(classes[:_CLASSES]) + (f", and {count - _CLASSES} more" if count > _CLASSES else "")
    yield "## Model"
    yield ""
    yield f"- Published: {manifest.created}"
    yield f"- Kind: classifier; the average of {len(manifest.members)} networks (method `{manifest.method}`)"
    if manifest.network:
        yield f"- Network: `{manifest.network.factory}`" + (
            f" {manifest.network.kwargs}" if manifest.network.kwargs else ""
        )
    if manifest.geometry:
        yield f"- Networks lie on: {manifest.geometry.shape} with {len(manifest.geometry.vertices)} trained weight sets"
    yield f"- Input: {_input(manifest.input)}"
    yield f"- Output: probabilities of {count} classes: {named}"
    yield f"- Temperature: {manifest.temperature:.4g}"
    yield ""


def _input(spec: InputSpec) -> str:
    if spec.kind == "image":
        channels, height, width = spec.shape
        return (
            f"images of {channels} channel(s), {height} × {width} pixels, values in [0, 1]; other sizes: {spec.resize}"
        )
    if spec.kind == "tokens":
        return f"texts of 1 to {spec.shape[0]} tokens of a vocabulary of {spec.vocabulary}"
    fields = f" of the fields {', '.join(field.name for field in spec.fields)}" if spec.fields else ""
    return f"features {spec.shape}{fields}; missing values: {spec.missing}"


def _use(manifest: Manifest) -> Iterator[str]:
    yield "## Use"
    yield ""
    yield "- It answers with one of the classes above, also for inputs that belong to none of them."
    yield (
        "- It can mark inputs that are unlike those of the training, and abstain."
        if manifest.calibration
        else "- It is not calibrated for abstention: it cannot mark inputs that are unlike those of the training."
    )
    yield "- The manifest does not record who may use it, for what, or which groups of people it was tested on. Add this here."
    yield ""


def _training(manifest: Manifest) -> Iterator[str]:
    provenance = manifest.provenance
    yield "## Training"
    yield ""
    options = [f"{name} {provenance.config[name]}" for name in _OPTIONS if provenance.config.get(name) is not None]
    sources = sorted({member.origin.source for member in manifest.members if member.origin.source})
    if options:
        yield f"- Options: {', '.join(options)}"
    if sources:
        yield f"- Imported from: {', '.join(sources)}"
    if provenance.data_fingerprint:
        yield f"- Fingerprint of the data: `{provenance.data_fingerprint}`"
    if provenance.epochs_spent is not None:
        yield f"- Cost: {provenance.epochs_spent:.4g} epochs" + (
            f", {provenance.wall_seconds:.0f} s" if provenance.wall_seconds is not None else ""
        )
    if provenance.device:
        yield f"- Device: {provenance.device}"
    if provenance.commit:
        yield f"- Commit: `{provenance.commit}`"
    if provenance.libraries:
        yield f"- Libraries: {', '.join(f'{name} {version}' for name, version in provenance.libraries.items())}"
    if not options and not sources:
        yield "- Nothing is recorded."
    yield ""


def _evaluation(manifest: Manifest) -> Iterator[str]:
    yield "## Evaluation"
    yield ""
    if (scores := manifest.validation) is None:
        yield "There are no scores: the version was published without labelled images."
        yield ""
        return
    own = [member.validation for member in manifest.members if member.validation]
    yield "On the validation split, which also chose the temperature:"
    yield ""
    yield "| | average | members |"
    yield "|---|---|---|"
    for name, title in (("accuracy", "Accuracy"), ("nll", "NLL, nats"), ("brier", "Brier score"), ("ece", "ECE")):
        values = [getattr(one, name) for one in own]
        yield f"| {title} | {getattr(scores, name):.4f} | {f'{min(values):.4f} to {max(values):.4f}' if values else '-'} |"
    yield ""
    if quantized := manifest.quantization:
        yield (
            f"The members are stored in {quantized.format}. In float32 the average has accuracy {quantized.float32.accuracy:.4f}, "
            f"NLL {quantized.float32.nll:.4f}."
        )
        yield ""
    yield "Scores on a test split, on foreign images and on corrupted images: `python -m training.evaluate`."
    yield ""


def _decisions(manifest: Manifest) -> Iterator[str]:
    yield "## Decisions"
    yield ""
    if (record := manifest.calibration) is None:
        yield "Not calibrated: no prediction sets, no abstention."
        return
    yield f"- Calibrated on {record.images} images ({record.source}). Guarantees hold for images drawn as these were."
    if record.cascade:
        bound = record.cascade.disagreement
        yield f"- Cascade: groups of {record.cascade.groups} members" + (
            f"; at most {bound:.2g} of its labels differ from those of all members" if bound is not None else ""
        )
    yield (
        f"- Novelty: distance of the features of member {record.novelty.member}, fitted on {record.novelty.images} images"
        if record.novelty
        else "- Novelty: predictive entropy"
    )
