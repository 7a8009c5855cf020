import shutil
import subprocess
import sys

import pytest

from models_store import signing, upkeep
from models_store.__main__ import main
from models_store.errors import SignatureError
from models_store.store import Store
from tests.onnx_members import publish

pytest.importorskip("model_signing.signing")
pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two pairs, made by openssl as the documentation says: name -> (private, public)."""
    folder = tmp_path_factory.mktemp("keys")
    found = {}
    for name in ("ours", "theirs"):
        private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
        subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True)
        subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
        found[name] = private, public
    return found


@pytest.fixture
def signed(store, keys):
    version = publish(store, "e", (0, 1))
    signing.sign(store, version, keys["ours"][0])
    return version


def test_a_signature_holds_for_the_key_that_made_it_and_for_no_other(store, signed, keys):
    signing.check(store, signed, [keys["ours"][1]])
    signing.check(store, signed, [keys["theirs"][1], keys["ours"][1]])  # several: keys can be replaced one by one
    with pytest.raises(SignatureError, match="none of the keys that are trusted"):
        signing.check(store, signed, [keys["theirs"][1]])
    store.verify(signed)  # it lies outside the version, which does not change


def test_a_version_without_a_signature_is_refused_with_the_remedy(store, keys):
    with pytest.raises(SignatureError, match=r"not signed.*models_store sign e@1 --key"):
        signing.check(store, publish(store, "e", (0,)), [keys["ours"][1]])


def test_a_signature_of_another_version_or_of_a_changed_one_does_not_hold(store, signed, keys):
    other = publish(store, "e", (2, 3))
    shutil.copy(store.signature("e", 1), store.signature("e", 2))
    with pytest.raises(SignatureError, match="or was changed since"):
        signing.check(store, other, [keys["ours"][1]])
    member = signed.folder / "members/000.onnx"
    member.write_bytes(member.read_bytes() + b"x")
    with pytest.raises(SignatureError, match="or was changed since"):
        signing.check(store, signed, [keys["ours"][1]])


def test_a_link_in_place_of_a_signature_is_not_followed(store, signed, keys, tmp_path):
    target = store.signature("e", 1)
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SignatureError, match="not signed"):
        signing.check(store, signed, [keys["ours"][1]])


def test_copies_keep_the_signature_and_gc_removes_it(store, signed, keys, tmp_path):
    copy = Store(tmp_path / "backup")
    upkeep.copy_all(store, copy)
    signing.check(copy, copy.load("e", 1), [keys["ours"][1]])
    later = publish(store, "e", (4,), activate=False)
    upkeep.copy_all(store, copy)
    signing.sign(store, later, keys["ours"][0])  # after it was copied
    upkeep.copy_all(store, copy)
    signing.check(copy, copy.load("e", 2), [keys["ours"][1]])
    publish(store, "e", (5,))
    upkeep.collect_garbage(store, 1)
    assert not store.signature("e", 1).exists()


def test_the_tool_of_the_package_verifies_what_we_sign(store, signed, keys):
    command = [sys.executable, "-m", "model_signing", "verify", "key", signed.folder]
    command += ["--signature", store.signature("e", 1), "--public_key", keys["ours"][1]]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_commands_sign_and_verify(store, keys, capsys, tmp_path):
    publish(store, "e", (0,))
    private, public = (str(key) for key in keys["ours"])
    begin = ["--store", str(store.root)]
    assert main([*begin, "verify", "--signed-by", public]) == 1
    assert "e@1 is not signed" in capsys.readouterr().out
    assert main([*begin, "sign", "e", "--key", private]) == 0
    assert main([*begin, "verify", "--signed-by", public]) == 0
    assert main([*begin, "verify", "e@1", "--signed-by", str(keys["theirs"][1])]) == 1
    assert main([*begin, "sign", "e", "--key", public]) == 2
    assert "cannot be used to sign" in capsys.readouterr().err


def test_an_encrypted_key_needs_its_password(store, keys, tmp_path):
    version, locked = publish(store, "e", (0,)), tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", keys["ours"][0], "-out", locked, "-passout", "pass:secret"], check=True
    )
    with pytest.raises(SignatureError):
        signing.sign(store, version, locked)
    (tmp_path / "password").write_text("secret\n")
    assert (
        main(
            [
                "--store",
                str(store.root),
                "sign",
                "e",
                "--key",
                str(locked),
                "--password-file",
                str(tmp_path / "password"),
            ]
        )
        == 0
    )
    signing.check(store, version, [keys["ours"][1]])
