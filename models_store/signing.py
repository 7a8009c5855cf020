"""Signatures of versions by the package model-signing, with keys that need no network.

<root>/<name>/.signatures/<version>.sig   a signature over all files of a version

The format is that of the OpenSSF's model signing: its command line verifies what this module signs, and the reverse.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models_store import files
from models_store.errors import SignatureError, StoreError
from models_store.store import Store, Version


def sign(store: Store, version: Version, key: Path, password: str | None = None) -> Path:
    """Sign a version, verified before, and return the file of the signature. It replaces an earlier one.

    Args:
        store: the store that holds the version.
        version: the version.
        key: file with the private key: an elliptic curve key in PEM.
        password: of that file; None if it is not encrypted.

    Raises:
        SignatureError: the key cannot be read, or the package is missing.
        StoreError: the version is damaged, or the store cannot be written.
    """
    signing = _module("signing")
    store.verify(version)
    target = store.signature(version.manifest.name, version.manifest.version)
    with files.writing(store.root, lambda: f"{version.name} was not signed."):
        files.make_folder(target.parent)
        begun = target.with_suffix(".new")
        try:
            signer = signing.Config().use_elliptic_key_signer(private_key=key, password=password and password.encode())
        except Exception as error:  # those of cryptography and model_signing share no base class
            raise SignatureError(
                f"{key} cannot be used to sign ({error}). It must be an elliptic curve key in PEM, as made by: "
                "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
            ) from None
        signer.sign(version.folder, begun)
        files.sync(begun)
        begun.replace(target)
        files.sync(target.parent)
    store.keep_signature(version.manifest.name, version.manifest.version)
    return target


def check(store: Store, version: Version, keys: Sequence[Path]) -> None:
    """Check that one of these keys signed a version, as it is now.

    Args:
        store: the store that holds the version.
        version: the version.
        keys: files with public keys in PEM.

    Raises:
        SignatureError: it is not signed, or by none of these keys, or it was changed since; or the package is missing.
    """
    verifying = _module("verifying")
    signature = store.signature(version.manifest.name, version.manifest.version)
    command = f"python -m models_store sign {version.name} --key FILE"
    try:
        files.check_regular(signature, 2**24)
    except (OSError, StoreError):
        raise SignatureError(
            f"{version.name} is not signed, and signatures are required (MODEPATH_SIGNED_BY). Sign it: {command}"
        ) from None
    why: Exception | None = None
    for key in keys:
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=key).verify(version.folder, signature)
        except Exception as error:  # see above
            why = error
        else:
            return
    raise SignatureError(
        f"{version.name} was signed by none of the keys that are trusted (MODEPATH_SIGNED_BY), or was changed since: {why}. "
        f"If you trust it, sign it: {command}"
    )


def check_keys(keys: Sequence[Path]) -> None:
    """Check that these files hold public keys, so that a service does not start only to refuse everything.

    Raises:
        SignatureError: one does not, or the package is missing.
    """
    verifying = _module("verifying")
    for key in keys:
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=key)
        except Exception as error:  # see above
            raise SignatureError(f"{key} is not a public key of an elliptic curve in PEM ({error}).") from None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise SignatureError(
            f"Signatures need the package model-signing ({error}): pip install 'modepath[signing]'"
        ) from None
