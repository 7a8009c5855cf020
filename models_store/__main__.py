"""The store's command line: python -m models_store --help."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from models_store import signing, upkeep
from models_store.decisions.calibrating import Labelled, calibrate, from_npz
from models_store.errors import EnsembleNotFoundError, ModepathError, StoreError
from models_store.importing import ImportOptions, import_members
from models_store.records.rollout import RollOut, Rule
from models_store.reports.card import card
from models_store.reports.differences import differences, table
from models_store.store import Store, Version


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0 on success, 1 if `verify` finds damage, 2 on an error."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(Store(args.store), args)
    except (ModepathError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _list(store: Store, args: argparse.Namespace) -> int:
    names = store.names()
    if args.quiet:
        print(*names, sep="\n", end="\n" if names else "")
        return 0
    if not names:
        print(f"{store.address} holds no ensemble. Train one: python -m training.fge --help")
    for name in names:
        try:
            versions = store.versions(name)
        except StoreError as error:
            print(f"  {name}  damaged: {error}")
            continue
        try:
            active = store.active(name)
        except EnsembleNotFoundError:
            active = None
        except StoreError as error:
            active = None
            print(f"  {name}  damaged: {error}")
        canary = _canary(store, name)
        for number in versions:
            mark = "*" if number == active else "~" if number == canary else " "
            try:
                manifest = store.load(name, number).manifest
                scores = f"validation accuracy {manifest.validation.accuracy:.4f}" if manifest.validation else ""
                print(
                    f"{mark} {name}@{number}  {manifest.method}  {len(manifest.members)} members  {manifest.created}  {scores}"
                )
            except StoreError as error:
                print(f"{mark} {name}@{number}  damaged: {error}")
    return 0


def _show(store: Store, args: argparse.Namespace) -> int:
    print(store.resolve(args.name).manifest.dump(), end="")
    return 0


def _verify(store: Store, args: argparse.Namespace) -> int:
    damaged = 0
    for what, error in (
        [_verified(store, args.name, args.signed_by)] if args.name else _all_verified(store, args.signed_by)
    ):
        damaged += error is not None
        print(f"damaged  {what}: {error}" if error else f"ok       {what}")
    return 1 if damaged else 0


def _verified(store: Store, reference: str, keys: list[Path]) -> tuple[str, StoreError | None]:
    try:
        version = store.resolve(reference)
        store.verify(version)
        if keys:
            signing.check(store, version, keys)
    except StoreError as error:
        return reference, error
    return version.name, None


def _all_verified(store: Store, keys: list[Path]) -> Iterator[tuple[str, StoreError | None]]:
    """Result for every version, and for the `active` file of each ensemble where that is damaged."""
    for name in store.names():
        try:
            versions = store.versions(name)
        except StoreError as error:
            yield name, error
            continue
        for version in versions:
            yield _verified(store, f"{name}@{version}", keys)
        try:
            if (active := store.active(name)) not in versions:
                store.load(name, active)
        except EnsembleNotFoundError as error:
            if store.activation_token(name) is not None:  # it names a version that does not exist
                yield f"{name}/active", error
        except StoreError as error:
            yield f"{name}/active", error


def _sign(store: Store, args: argparse.Namespace) -> int:
    version = store.resolve(args.name)
    password = None if args.password_file is None else _content(args.password_file).decode().strip()
    print(f"signed {version.name}: {signing.sign(store, version, args.key, password)}")
    return 0


def _activate(store: Store, args: argparse.Namespace) -> int:
    store.verify(store.load(args.name, args.version))
    store.activate(args.name, args.version)
    print(f"{args.name}@{args.version} is active")
    return 0


def _canary(store: Store, name: str) -> int | None:
    try:
        plan = store.roll_out(name)
    except StoreError as error:
        print(f"  {name}  damaged: {error}")
        return None
    return None if plan is None or plan.ended else plan.version


def _roll_out(store: Store, args: argparse.Namespace) -> int:
    if args.end:
        ended = store.end_roll_out(args.name)
        print(f"the roll-out of {args.name} {'has ended' if ended else 'had ended before'}")
        return 0
    if args.version is not None:
        try:
            rule = Rule(
                errors=args.max_errors, disagreement=args.max_disagreement, slowdown=args.max_slowdown, requests=args.judge_after
            )  # fmt: skip
            plan = RollOut(version=args.version, share=args.share, shadow=args.shadow, rule=rule)
        except ValidationError as error:
            first = error.errors()[0]
            named = ".".join(map(str, first["loc"])) or "options"
            raise StoreError(f"{named}: {first['msg'].removeprefix('Value error, ')}.") from None
        store.verify(store.load(args.name, args.version))
        store.begin_roll_out(args.name, plan)
        if not plan.shadow:
            print("Without --shadow only its errors are judged, not its answers and its time.")
    elif (found := store.roll_out(args.name)) is None:
        print(f"{args.name} has no canary")
        return 0
    else:
        plan = found
    state = f"ROLLED BACK, because {plan.ended}" if plan.ended else "going on"
    print(
        f"{args.name}@{plan.version}: answers {plan.share:g} of the callers, compared on {plan.shadow:g} of the requests: {state}"
    )
    return 0


def _deactivate(store: Store, args: argparse.Namespace) -> int:
    store.deactivate(args.name)
    print(f"{args.name} is not served any more; its versions stay published")
    return 0


def _diff(store: Store, args: argparse.Namespace) -> int:
    before, after = store.resolve(args.first).manifest, store.resolve(args.second).manifest
    for line in table(differences(before, after), (f"{before.name}@{before.version}", f"{after.name}@{after.version}")):
        print(line)
    return 0


def _card(store: Store, args: argparse.Namespace) -> int:
    print(card(store.resolve(args.name).manifest), end="")
    return 0


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}.") from None


def _import(store: Store, args: argparse.Namespace) -> int:
    classes = args.classes.split(",") if args.classes else None
    options = ImportOptions(
        input_shape=tuple(args.input_shape) if args.input_shape else None,
        classes=classes,
        mean=args.mean,
        std=args.std,
        output=args.output,
        resize=args.resize,
        kind=args.kind,
        vocabulary=args.vocabulary,
        tokenizer=_content(args.tokenizer) if args.tokenizer else None,
        channels_last=args.channels_last,
        pixels=args.pixels,
        output_name=args.output_name,
    )
    version = import_members(store, args.name, args.members, options, activate=not args.no_activate)
    print(f"published {version.name}: {len(version.manifest.members)} members")
    if args.no_activate:
        print(f"It is not served; to serve it: python -m models_store activate {args.name} {version.manifest.version}")
    return 0


def _calibrate(store: Store, args: argparse.Namespace) -> int:
    version = store.resolve(args.name)
    given = _labelled(version, args.dataset)
    calibrated = calibrate(store, version, given, activate=not args.no_activate)
    record = calibrated.manifest.calibration
    assert record is not None, "it was just measured"
    print(
        f"published {calibrated.name}: calibrated on {record.images} of {len(given.labels)} images; temperature {calibrated.manifest.temperature:.3f}"
    )
    if args.no_activate:
        print(
            f"It is not served; to serve it: python -m models_store activate {calibrated.manifest.name} {calibrated.manifest.version}"
        )
    return 0


def _labelled(version: Version, dataset: str | None) -> Labelled:
    """Images of an npz file, or the validation split of a data source of training."""
    if dataset is not None and dataset.startswith("npz:"):
        return from_npz(Path(dataset.removeprefix("npz:")))
    try:
        sources: Any = importlib.import_module("training.data")  # this command stands above all packages
        config: Any = importlib.import_module("training.config")
    except ImportError:
        raise StoreError(
            "Data sources other than npz:FILE need the training extra: pip install 'modepath[training]', or give --dataset npz:FILE."
        ) from None
    recorded = version.manifest.provenance.config
    if dataset is None and "dataset" not in recorded:
        raise StoreError(f"{version.name} was imported, so its data set is unknown: name one with --dataset.")
    options = config.data_options({"dataset": dataset, **recorded})
    options = options.of_other(dataset) if dataset else options
    loaded = sources.load(options)
    images, labels = sources.as_arrays(loaded.validation)
    seen = sources.seen_images(loaded, options.dataset)
    return Labelled(images, labels, f"the validation split of {options.dataset}", seen)


def _gc(store: Store, args: argparse.Namespace) -> int:
    if args.keep < 1:
        raise StoreError(f"--keep must be at least 1; got {args.keep}.")
    found = upkeep.collect_garbage(store, args.keep, dry=args.dry_run)
    if found.damaged:
        name, why = next(iter(found.damaged.items()))
        raise StoreError(
            f"{name} cannot be read, so that what it is based on is unknown, and nothing was removed: {why} Repair it, or remove its folder."
        )
    for name, why in found.kept.items():
        print(f"kept {name}: {why}")
    for name in found.done:
        print(f"{'would remove' if args.dry_run else 'removed'} {name}")
    return 0


def _backup(store: Store, args: argparse.Namespace) -> int:
    target = Store(args.dir)
    return _copied(upkeep.copy_all(store, target), target.address)


def _restore(store: Store, args: argparse.Namespace) -> int:
    source = Store(args.dir)
    if type(source) is Store and not args.dir.is_dir():
        raise StoreError(f"{args.dir} is neither a folder nor the address of a bucket.")
    return _copied(upkeep.copy_all(source, store), store.address)


def _copied(found: upkeep.Outcome, where: str) -> int:
    for name in found.done:
        print(f"copied {name} to {where}")
    for name, why in found.damaged.items():
        print(f"error: {name} was not copied: {why}", file=sys.stderr)
    return 1 if found.damaged else 0


def _export(store: Store, args: argparse.Namespace) -> int:
    version = store.resolve(args.name)
    store.verify(version)
    copy = Store(args.dir).adopt(version)
    print(f"{copy.folder} (a complete store: MODELS_STORE={args.dir})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models_store", description="Manage published ensembles.")
    parser.add_argument(
        "--store",
        type=Path,
        help="the store's folder (default: $MODELS_STORE; else models_store/ensembles of a checkout, or the user's data folder)",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="every version; * is active, ~ a canary")
    command.add_argument("--quiet", action="store_true", help="names only")
    command.set_defaults(run=_list)

    command = commands.add_parser("show", help="the manifest of a version")
    command.add_argument("name", metavar="NAME[@VERSION]")
    command.set_defaults(run=_show)

    command = commands.add_parser("verify", help="check hashes and members; exit code 1 if anything is damaged")
    command.add_argument("name", metavar="NAME[@VERSION]", nargs="?", help="default: every version")
    command.add_argument(
        "--signed-by", metavar="KEY.pem", type=Path, nargs="+", default=[],
        help="also check that one of these public keys signed it",
    )  # fmt: skip
    command.set_defaults(run=_verify)

    command = commands.add_parser("sign", help="sign a version with an elliptic curve key (extra `signing`)")
    command.add_argument("name", metavar="NAME[@VERSION]")
    command.add_argument("--key", type=Path, required=True, metavar="FILE", help="private key in PEM")
    command.add_argument("--password-file", type=Path, metavar="FILE", help="file that holds the password of the key")
    command.set_defaults(run=_sign)

    command = commands.add_parser("activate", help="serve this version from now on")
    command.add_argument("name", metavar="NAME")
    command.add_argument("version", metavar="VERSION", type=int)
    command.set_defaults(run=_activate)

    rule = Rule()
    command = commands.add_parser(
        "rollout",
        help="make a version the canary: it answers some callers, or is compared with the active version; without VERSION, show the canary",
    )
    command.add_argument("name", metavar="NAME")
    command.add_argument("version", metavar="VERSION", type=int, nargs="?")
    command.add_argument("--share", type=float, default=0.0, help="share of the callers that it answers, 0 to 1")
    command.add_argument(
        "--shadow", type=float, default=0.0, help="share of the requests that both versions compute, to be compared"
    )
    command.add_argument(
        "--max-errors", type=float, default=rule.errors, help="roll back if it fails a larger share of its requests (default: %(default)s)"
    )  # fmt: skip
    command.add_argument(
        "--max-disagreement", type=float, default=rule.disagreement,
        help="roll back if both versions label a larger share of the compared rows differently (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--max-slowdown", type=float, default=rule.slowdown,
        help="roll back if it takes more times the active version's time per row (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--judge-after", type=int, default=rule.requests, metavar="N", help="requests, or rows, that shares are judged on (default: %(default)s)"
    )  # fmt: skip
    command.add_argument("--end", action="store_true", help="end the roll-out; the active version answers all callers")
    command.set_defaults(run=_roll_out)

    command = commands.add_parser("deactivate", help="serve no version of this ensemble; its versions stay published")
    command.add_argument("name", metavar="NAME")
    command.set_defaults(run=_deactivate)

    command = commands.add_parser(
        "diff", help="what differs between two versions: training, members, scores, calibration"
    )
    command.add_argument("first", metavar="NAME[@VERSION]")
    command.add_argument("second", metavar="NAME[@VERSION]")
    command.set_defaults(run=_diff)

    command = commands.add_parser("card", help="a model card in Markdown, written from the manifest")
    command.add_argument("name", metavar="NAME[@VERSION]")
    command.set_defaults(run=_card)

    command = commands.add_parser("import", help="publish ONNX classifiers from other tools as an ensemble")
    command.add_argument("name", metavar="NAME")
    command.add_argument("members", metavar="MEMBER.onnx", nargs="+", type=Path)
    command.add_argument("--classes", help="class names, separated by commas (default: 0, 1, …)")
    command.add_argument(
        "--input-shape", nargs="+", type=int, metavar="N",
        help="shape of one row, if the file leaves it open: C H W of images, the largest length of texts",
    )  # fmt: skip
    command.add_argument(
        "--kind", choices=["image", "features", "tokens"],
        help="what the models take (default: floats with four axes and bytes are images, other floats features, integers tokens)",
    )  # fmt: skip
    command.add_argument("--vocabulary", type=int, help="tokens: number of ids; 0 fills texts up")
    command.add_argument(
        "--tokenizer", type=Path, metavar="FILE",
        help="tokens: tokenizer.json of the package tokenizers, published with the members: requests may then send texts",
    )  # fmt: skip
    command.add_argument("--channels-last", action="store_true", help="the models take images (H, W, C)")
    command.add_argument(
        "--pixels", choices=[1, 255], type=int, default=1, help="largest value of a pixel that the models take"
    )
    command.add_argument(
        "--mean", nargs="+", type=float, help="means of channels or features: adds (x - mean) / std to the graph"
    )
    command.add_argument("--std", nargs="+", type=float)
    command.add_argument(
        "--output",
        choices=["logits", "probs"],
        default="logits",
        help="what the models return; log-probabilities are logits",
    )
    command.add_argument("--output-name", help="the output that gives a number for each class, if there are several")
    command.add_argument(
        "--resize", choices=["refuse", "stretch", "crop"], default="refuse", help="treatment of images of another size"
    )
    command.add_argument("--no-activate", action="store_true", help="publish without serving it")
    command.set_defaults(run=_import)

    command = commands.add_parser(
        "calibrate",
        help="publish a copy whose decisions (prediction sets, abstention, cascade) are calibrated on labelled images",
    )
    command.add_argument("name", metavar="NAME[@VERSION]")
    command.add_argument(
        "--dataset",
        metavar="npz:FILE | SOURCE",
        help="labelled images that the members were not trained on: an npz file with the arrays x (images, C, H, W) and y, or a data set of "
        "python -m training.fge --help, whose validation split is used (default: the one it was trained on)",
    )
    command.add_argument("--no-activate", action="store_true", help="publish without serving it")
    command.set_defaults(run=_calibrate)

    command = commands.add_parser(
        "gc", help="remove old versions; never those that are active, or that another version was trained from"
    )
    command.add_argument(
        "--keep", type=int, required=True, metavar="N", help="newest versions of each ensemble that stay"
    )
    command.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    command.set_defaults(run=_gc)

    command = commands.add_parser(
        "backup", help="copy all versions that DIR lacks into it, and what is active; a service may run meanwhile"
    )
    command.add_argument("dir", metavar="DIR", type=Path)
    command.set_defaults(run=_backup)

    command = commands.add_parser(
        "restore", help="the reverse of backup: copy what the store lacks from DIR, and activate what is active there"
    )
    command.add_argument("dir", metavar="DIR", type=Path)
    command.set_defaults(run=_restore)

    command = commands.add_parser("export", help="copy a version into a folder, which becomes a complete store")
    command.add_argument("name", metavar="NAME[@VERSION]")
    command.add_argument("dir", metavar="DIR", type=Path)
    command.set_defaults(run=_export)
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # exit silently when the reader closes the pipe, as in `list | head`
    sys.exit(main())
