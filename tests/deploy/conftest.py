from tests.service.conftest import serve, store  # noqa: F401 - fixtures
