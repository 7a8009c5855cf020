import pytest
from pydantic import ValidationError

from service.settings import Settings


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
