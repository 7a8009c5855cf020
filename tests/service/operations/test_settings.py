import re

import pytest
from pydantic import ValidationError

from service.operations.settings import Settings, WrongSettingError, settings, share_key, workers_for
from tests.conftest import ROOT


def test_settings_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MODEPATH_MAX_ROWS", "7")
    monkeypatch.setenv("MODELS_STORE", str(tmp_path))
    assert Settings().max_rows == 7
    assert Settings().store == tmp_path


@pytest.mark.parametrize(("name", "value"), [("MAX_ROWS", "0"), ("PROVIDERS", "tpu"), ("PORT", "x")])
def test_a_wrong_setting_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(f"MODEPATH_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_a_store_at_an_address_of_another_kind_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("MODELS_STORE", "ftp://bucket/ensembles")
    settings.cache_clear()
    with pytest.raises(WrongSettingError, match=r"^MODELS_STORE: .*is not an address of object storage"):
        settings()


def test_all_wrong_settings_are_named_in_one_line_and_their_values_are_not_shown(monkeypatch):
    monkeypatch.setenv("MODEPATH_MAX_ROWS", "0")
    monkeypatch.setenv("MODEPATH_WORKERS", "many")
    monkeypatch.setenv("MODEPATH_KEY", "secret")
    settings.cache_clear()
    with pytest.raises(WrongSettingError) as raised:
        settings()
    message = str(raised.value)
    assert "MODEPATH_MAX_ROWS: " in message
    assert "MODEPATH_WORKERS: " in message
    assert "THREADS" not in message  # its error only follows from the other one
    assert "\n" not in message + str(raised.value.__cause__)
    monkeypatch.setenv("MODEPATH_MAX_ROWS", "1")
    monkeypatch.setenv("MODEPATH_WORKERS", "1")
    with pytest.raises(WrongSettingError, match="openssl rand") as raised:
        settings()
    assert "secret" not in str(raised.value)
    monkeypatch.setenv("MODEPATH_POLICIES", "{")
    with pytest.raises(WrongSettingError, match="policies"):
        settings()


@pytest.mark.parametrize(
    ("host", "address"),
    [("localhost", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("::", "::"), ("::1", "::1")],
)
def test_a_host_is_an_address_or_the_name_of_one(monkeypatch, host, address):
    monkeypatch.setenv("MODEPATH_HOST", host)
    monkeypatch.setenv("MODEPATH_METRICS_HOST", host)
    assert (Settings().host, Settings().metrics_host) == (address, address)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "", "a" * 300, "1.2.3.4.5"])
def test_a_host_that_is_no_address_is_refused(monkeypatch, host):
    monkeypatch.setenv("MODEPATH_HOST", host)
    with pytest.raises(ValidationError, match="neither an IP address nor the name of one"):
        Settings()


def test_requests_may_take_their_time_when_the_service_ends(monkeypatch):
    monkeypatch.setenv("MODEPATH_TIMEOUT", "100")
    assert Settings().grace_seconds > 100
    monkeypatch.setenv("MODEPATH_GRACE_SECONDS", "7")
    assert Settings().grace_seconds == 7


def test_no_proxy_is_trusted_but_those_that_are_named(monkeypatch):
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    assert Settings().trusted_proxies == ""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.1")  # uvicorn's own variable
    assert Settings().trusted_proxies == "10.0.0.1"
    monkeypatch.setenv("MODEPATH_TRUSTED_PROXIES", "10.0.0.0/8")
    assert Settings().trusted_proxies == "10.0.0.0/8"


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 1), (4, 1), (8, 2), (64, 16)])
def test_workers_and_threads_fit_the_machine(monkeypatch, cores, workers):
    monkeypatch.delenv("MODEPATH_THREADS", raising=False)  # set where tests run in parallel
    monkeypatch.setattr("service.operations.settings.available_cores", lambda: cores)
    assert workers_for(cores) == workers
    chosen = Settings()
    assert (chosen.workers, chosen.threads) == (workers, cores // workers)
    monkeypatch.setenv("MODEPATH_WORKERS", str(2 * cores))
    assert Settings().threads == 1


def test_the_documentation_lists_every_setting_once_and_no_other():
    rows = re.findall(r"^\| `(MODE\w+)` \|", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    settings = {f"MODEPATH_{name.upper()}" for name in Settings.model_fields} - {"MODEPATH_STORE"}
    assert sorted(rows) == sorted(settings | {"MODELS_STORE", "MODEPATH_RUNS", "MODEPATH_DATA"})


def test_an_empty_or_short_key_is_refused(monkeypatch):
    for key in ("", "short"):
        monkeypatch.setenv("MODEPATH_KEY", key)
        with pytest.raises(ValidationError, match="openssl rand"):
            Settings()
    monkeypatch.setenv("MODEPATH_KEY", "a key of sixteen bytes")
    assert Settings().secret() == b"a key of sixteen bytes"


def test_rows_turn_the_key_of_one_worker_only(monkeypatch):
    monkeypatch.setenv("MODEPATH_KEY_ROWS", "100")
    monkeypatch.setenv("MODEPATH_WORKERS", "2")
    monkeypatch.setenv("MODEPATH_KEY", "0123456789abcdef")
    with pytest.raises(ValidationError, match="one worker") as told:
        Settings()
    assert "0123456789" not in str(told.value)


def test_workers_share_the_key_that_its_file_held_at_the_start(monkeypatch, tmp_path):
    file = tmp_path / "key"
    file.write_bytes("a key of sixteen bytes, and ø\xff\n".encode("latin-1"))
    monkeypatch.setenv("MODEPATH_KEY_FILE", str(file))
    monkeypatch.setenv("MODEPATH_KEY", "")  # so that monkeypatch restores it
    monkeypatch.delenv("MODEPATH_KEY")
    alone = Settings().secret()
    monkeypatch.setattr("service.operations.settings.settings", Settings)
    share_key()
    file.write_text("another key of sixteen bytes")
    assert Settings().secret() == alone
    file.write_bytes(b"a key of sixteen bytes\0and one")
    monkeypatch.delenv("MODEPATH_KEY")
    with pytest.raises(ValidationError, match="zero byte"):
        Settings()
