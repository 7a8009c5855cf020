import pytest

from models_store.store import Store
from tests.buckets import serving


@pytest.fixture(scope="session")
def buckets(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("buckets")) as server:
        yield server


@pytest.fixture
def address(buckets, monkeypatch, tmp_path):
    """The address of a new bucket, and the environment to use it."""
    for name, value in buckets.environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    return f"s3://{buckets.make()}/models"


@pytest.fixture(params=["folder", "bucket"])
def either(request, tmp_path):
    """A store in a folder, and one in a bucket."""
    if request.param == "folder":
        return Store(tmp_path / "store")
    return Store(request.getfixturevalue("address"))


@pytest.fixture
def remote(address):
    return Store(address)
