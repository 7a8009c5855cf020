"""Settings of the service, from environment variables MODEPATH_…; a wrong one stops the start and says why."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from models_store.runtime import ProviderChoice
from models_store.store import default_root


class Settings(BaseSettings):
    """Each field is read from MODEPATH_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix="MODEPATH_", frozen=True, extra="ignore")

    store: Path = Field(default_factory=default_root, validation_alias=AliasChoices("MODELS_STORE"))
    default: str | None = Field(default=None, description="ensemble that answers when none is named")
    providers: ProviderChoice = Field(default="auto", description="auto, cpu or cuda")
    max_body_bytes: int = Field(default=16 * 2**20, gt=0)
    max_rows: int = Field(default=1024, gt=0, description="images in one request")
    poll_seconds: float = Field(default=1.0, gt=0, description="how often a new activation is looked for")
    host: str = Field(default="127.0.0.1", description="an IP address; 0.0.0.0 opens the service to the network")
    port: int = Field(default=3000, gt=0, lt=65536)
    timeout: float = Field(default=60, gt=0, description="seconds a request may take")


@cache
def settings() -> Settings:
    """The process's settings, read once."""
    return Settings()
