import json
import stat
import subprocess
import sys

import pytest

from service.access import keys
from service.access.keys import SCOPES, KeyFileError, Keys


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(keys, "LOOK_SECONDS", 0)


def test_a_key_is_found_with_its_name_scopes_and_quota_and_is_not_in_the_file(file):
    secret = keys.add(file, "shop", ["predict", "predict", "feedback"], 600)
    found = Keys(file).find(secret)
    assert (found.name, found.scopes, found.rows_per_minute) == ("shop", ["predict", "feedback"], 600)
    assert found.id in secret
    assert secret.rpartition("_")[2] not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s[:-1],
        lambda s: s + "x",
        str.upper,
        lambda s: "",
        lambda s: s.rpartition("_")[2],
        lambda s: s[::-1],
        lambda s: "\udcff",
    ],
)
def test_anything_but_the_whole_key_is_not_found(file, change):
    secret = keys.add(file, "shop", ["predict"])
    assert Keys(file).find(change(secret)) is None


def test_scopes_are_separate_and_admin_has_all(file):
    for scope in SCOPES:
        secret = keys.add(file, scope, [scope])
        found = Keys(file).find(secret)
        assert [one for one in SCOPES if found.may(one)] == (list(SCOPES) if scope == "admin" else [scope])


def test_a_second_key_of_a_name_replaces_the_first_without_a_gap(file, at_once):
    served, first = None, keys.add(file, "shop", ["predict"])
    served = Keys(file)
    second = keys.add(file, "shop", ["predict"])
    assert served.find(first).name == served.find(second).name == "shop"
    assert keys.revoke(file, "shop", served.find(first).id) == 1
    assert served.find(first) is None
    assert served.find(second) is not None
    assert keys.revoke(file, "shop") == 1
    assert served.find(second) is None


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"keys": [{"id": "0"}]}', '{"keys": 3}', "[]", '{"keys": [], "x": 1}', "\x00" * 100, "[" * 100_000],
)
def test_a_broken_file_is_refused_but_the_keys_that_were_read_stay(file, at_once, caplog, content):
    secret = keys.add(file, "shop", ["predict"])
    served = Keys(file)
    file.write_text(content)
    with pytest.raises(KeyFileError, match="not a file of keys"):
        keys.read(file)
    assert served.find(secret) is not None
    assert "The keys that were read before stay valid" in caplog.text
    file.unlink()
    assert served.find(secret) is not None
    other = keys.add(file, "other", ["read"])
    assert served.find(other).name == "other"
    assert served.find(secret) is None


@pytest.mark.parametrize(
    ("name", "scopes", "quota"),
    [("a b", ["predict"], None), ("", ["predict"], None), ("a", [], None), ("a", ["all"], None), ("a", ["predict"], 0)],
)
def test_a_key_that_cannot_be_is_refused(file, name, scopes, quota):
    with pytest.raises(KeyFileError):
        keys.add(file, name, scopes, quota)
    assert not file.exists()


def test_revoking_an_unknown_key_says_which_there_are(file):
    keys.add(file, "shop", ["predict"])
    with pytest.raises(KeyFileError, match=r"has no key 'ship'; it has shop \("):
        keys.revoke(file, "ship")


def test_commands_at_the_same_time_lose_no_key(file):
    code = "import sys; from pathlib import Path; from service.access import keys\nfor i in range(5): keys.add(Path(sys.argv[1]), sys.argv[2] + str(i), ['predict'])"
    processes = [subprocess.Popen([sys.executable, "-c", code, file, name]) for name in "abcd"]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert len({key.name for key in keys.read(file)}) == 20


def test_the_command_makes_lists_and_revokes_keys(file):
    def run(*arguments):
        command = [sys.executable, "-m", "modepath", "keys", *arguments, "--file", str(file)]
        return subprocess.run(command, capture_output=True, text=True)

    made = run("add", "shop", "--scope", "predict", "--scope", "feedback", "--rows-per-minute", "90")
    assert made.returncode == 0, made.stderr
    assert Keys(file).find(made.stdout.strip()).rows_per_minute == 90
    assert "shop" in (listed := run("list").stdout)
    assert "90 rows per minute" in listed
    assert made.stdout.strip() not in listed
    assert run("revoke", "shop").stdout.strip() == "revoked 1 key of shop"
    assert run("revoke", "shop").returncode == 2
    assert json.loads(file.read_text()) == {"keys": []}
    assert run("add", "shop", "--scope", "everything").returncode == 2
