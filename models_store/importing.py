"""Import ONNX files from other tools as the members of one ensemble.

graphs/adapting.py adapts each of them to FORMAT.md, or refuses it with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models_store.errors import MemberError
from models_store.graphs import output_kind
from models_store.graphs.adapting import Adapted, ImportOptions, adapt
from models_store.inputs import kinds
from models_store.manifest import TOKENIZER_FILE, Draft, Member, Origin
from models_store.store import Store, Version


def import_members(
    store: Store, name: str, files: Sequence[Path], options: ImportOptions, activate: bool = True
) -> Version:
    """Publish foreign ONNX models, whose architectures may differ, as one ensemble with equal weights.

    Raises:
        MemberError: a file cannot serve as a member, or the files do not agree on input shape and classes.
        StoreWriteError: the store cannot be written.
    """
    models = [adapt(file, options) for file in files]
    if len({(one.spec.model_dump_json(), one.classes) for one in models}) > 1:
        listing = "; ".join(
            f"{file.name}: {one.spec.kind} {kinds.shown(one.spec)}, {one.classes} classes"
            for file, one in zip(files, models, strict=True)
        )
        raise MemberError(f"The members of an ensemble take the same inputs and know the same classes. {listing}.")
    _check_kinds(files, models, options)
    spec, classes = models[0].spec, models[0].classes
    class_names = list(options.classes or map(str, range(classes)))
    if len(class_names) != classes:
        raise MemberError(f"{len(class_names)} class names were given, but the models have {classes} classes.")
    with store.staging(name) as staged:
        (staged / "members").mkdir()
        members: list[Member] = []
        for index, (file, one) in enumerate(zip(files, models, strict=True)):
            path = f"members/{index:03d}.onnx"
            (staged / path).write_bytes(one.model)
            members.append(Member(file=path, origin=Origin(source=file.name), weight=1 / len(files)))
        if spec.tokenizer and options.tokenizer:
            (staged / TOKENIZER_FILE).write_bytes(options.tokenizer)
        draft = Draft(
            method="import",
            input=spec,
            classes=class_names,
            members=members,
        )
        return store.publish(name, staged, draft, activate=activate)


def _check_kinds(files: Sequence[Path], models: Sequence[Adapted], options: ImportOptions) -> None:
    """Check that all models return the kind of output that --output states.

    Raises:
        MemberError: a model returns another kind, or the models differ.
    """
    named = {kind: [f.name for f, one in zip(files, models, strict=True) if one.kind == kind] for kind in _GIVES}
    if sigmoid := named["sigmoid"]:
        raise MemberError(
            f"{', '.join(sigmoid)} ends in a sigmoid: scores of independent labels, which are neither logits nor the "
            "probabilities of one class out of several. Export the classifier without its last sigmoid."
        )
    if named["probs"] and named["logits"]:
        raise MemberError(
            f"{', '.join(named['logits'])} gives logits, but {', '.join(named['probs'])} gives probabilities (its rows "
            "sum to 1: it ends in softmax). The members of one ensemble must give the same: export all of them without "
            "softmax."
        )
    if named["probs"] and options.output != "probs":
        raise MemberError(
            f"{', '.join(named['probs'])} gives probabilities, not logits: its rows lie in [0, 1] and sum to 1, so it "
            "ends in softmax. Import it with --output probs."
        )
    if named["logits"] and options.output == "probs":
        raise MemberError(
            f"{', '.join(named['logits'])} does not give probabilities: its rows do not lie in [0, 1] and sum to 1. "
            "If it gives logits, leave out --output probs."
        )


_GIVES: tuple[output_kind.Kind, ...] = ("logits", "probs", "sigmoid")
