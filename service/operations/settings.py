"""Settings of the service, from environment variables MODEPATH_…; a wrong one stops the start and says why."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
from functools import cache
from pathlib import Path
from typing import Self

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from models_store.errors import ModepathError, StoreError
from models_store.graphs.runtime import ProviderChoice, available_cores
from models_store.store import Store, default_root
from service.inference.policy import Policy

KEY_BYTES = 16


class WrongSettingError(ModepathError):
    """A setting is not what it may be; the message names all such."""


class Settings(BaseSettings):
    """Each field is read from MODEPATH_<FIELD>. What is said of a queue or of held bytes holds for each worker."""

    model_config = SettingsConfigDict(env_prefix="MODEPATH_", frozen=True, extra="ignore", hide_input_in_errors=True)

    store: Path = Field(default_factory=default_root, validation_alias=AliasChoices("MODELS_STORE"))
    default: str | None = Field(default=None, description="ensemble that answers when none is named")
    providers: ProviderChoice = Field(default="auto", description="auto, cpu or cuda")
    poll_seconds: float = Field(default=0.5, gt=0, description="seconds between two looks for a new activation")

    load_seconds: float = Field(
        default=120, gt=0, description="seconds in which a new version must become ready, in the process that tries it"
    )
    load_bytes: int | None = Field(
        default=None,
        gt=0,
        description="memory that one version may take there; default: what is left when it is tried, over the workers and one more",
    )

    host: str = Field(
        default="127.0.0.1", description="an address or the name of one; 0.0.0.0 opens the service to the network"
    )
    port: int = Field(default=3000, gt=0, lt=65536)
    hosts: tuple[str, ...] = Field(
        default=(),
        description="Host headers that are answered, as a JSON list of names without ports. Default: any where the service is open to the "
        "network; on a loopback address IP addresses and localhost only, so that no web page can reach it under a name of its own",
    )
    metrics_port: int | None = Field(
        default=None, gt=0, lt=65536, description="give /metrics a listener of its own; the public one then has none"
    )
    metrics_host: str = Field(default="127.0.0.1", description="address of that listener")
    access_log: bool = Field(default=False, description="write one JSON line per request to standard output")
    trusted_proxies: str = Field(
        default="",
        validation_alias=AliasChoices("MODEPATH_TRUSTED_PROXIES", "FORWARDED_ALLOW_IPS"),
        description="addresses or networks, comma-separated, whose X-Forwarded-For names the client in the access log",
    )

    workers: int = Field(
        default_factory=lambda: workers_for(available_cores()), gt=0, description="number of worker processes"
    )
    threads: int = Field(
        default_factory=lambda data: max(1, available_cores() // data["workers"]),
        gt=0,
        description="number of threads in each worker that run members",
    )

    policies: dict[str, Policy] = Field(
        default_factory=lambda: {},
        description="by ensemble, * for all others, as JSON; see service/inference/policy.py",
    )
    pool_bytes: int = Field(
        default=2**30, gt=0, description="memory for single networks of one ensemble, in each worker"
    )
    key: SecretStr | None = Field(default=None, description="key of mode `keyed`; default: a new one at each start")
    key_file: Path | None = Field(default=None, description="file that holds the key of mode `keyed`")
    key_seconds: float = Field(default=3600, gt=0, description="seconds after which the key of mode `keyed` turns")
    key_rows: int | None = Field(
        default=None,
        gt=0,
        description="rows after which the key of mode `keyed` turns as well; each worker counts its own",
    )

    caller_header: str | None = Field(
        default=None,
        description="header with the caller's identity, set by an authenticating proxy that overwrites client values; `keyed` then draws separately for each caller",
    )

    head_bytes: int = Field(default=32 * 1024, gt=0, description="request line and headers of a request; beyond: 431")
    head_seconds: float = Field(
        default=10, gt=0, description="until the head of a request is complete; beyond, its connection is closed"
    )
    max_body_bytes: int = Field(default=16 * 2**20, gt=0, description="largest size of a body; beyond: 413")
    max_rows: int = Field(default=1024, gt=0, description="largest number of images in one request; beyond: 413")
    max_pixels: int = Field(
        default=2**24, gt=0, description="largest number of pixels of the encoded images of one request; beyond: 413"
    )
    max_numbers: int = Field(
        default=2**21, gt=0, description="largest number of probabilities in one answer; beyond: 413"
    )
    timeout: float = Field(default=60, gt=0, description="seconds from a request's headers to its answer; beyond: 504")
    stall_seconds: float = Field(
        default=5, gt=0, description="how long 64 KiB of a body may take (then 408), and 64 KiB of an answer to be read"
    )

    hang_seconds: float = Field(
        default=30,
        gt=0,
        description="a worker whose event loop stands still, or whose members work on one batch, for so long is replaced",
    )
    grace_seconds: float = Field(
        default_factory=lambda data: data["timeout"] + 5,
        gt=0,
        description="how long requests may still take when the service is to end",
    )

    batch_rows: int = Field(default=64, gt=0, description="largest number of rows that run together")
    batch_seconds: float = Field(default=0.05, gt=0, description="seconds that a batch should take at most")
    queue_rows: int = Field(default=4096, gt=0, description="largest number of rows that may wait; beyond: 429")
    queue_pixels: int = Field(
        default=2**25, gt=0, description="pixels of large encoded images that may wait to be decoded; beyond: 429"
    )
    queue_seconds: float = Field(default=2, gt=0, description="seconds that a request may wait; beyond: 429 or 503")
    held_bytes: int = Field(
        default=256 * 2**20,
        gt=0,
        description="of bodies, and again of decoded images, that are held at once; of bodies an eighth is kept for small ones",
    )

    @field_validator("store")
    @classmethod
    def _folder(cls, store: Path) -> Path:
        try:
            return Store(store).root
        except StoreError as error:
            raise ValueError(str(error)) from None

    @field_validator("host", "metrics_host")
    @classmethod
    def _address(cls, host: str) -> str:
        """BentoML takes addresses only."""
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(host))
        try:
            found = [str(address[0]) for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError):
            raise ValueError(f"{host!r} is neither an IP address nor the name of one") from None
        return next((address for address in found if "." in address), found[0])

    def secret(self) -> bytes:
        """The key of `keyed`."""
        if self.key is None:
            assert self.key_file is not None, "share_key gave a key to this process's parent"
            return self.key_file.read_bytes().strip()
        return os.fsencode(self.key.get_secret_value())

    @model_validator(mode="after")
    def _long_key(self) -> Self:
        given = self.key is not None or self.key_file is not None
        if given and len(self.secret()) < KEY_BYTES:  # an empty one, too: it is often a variable that was not set
            raise ValueError(f"the key has less than {KEY_BYTES} bytes; make one with: openssl rand -hex 32")
        if given and b"\0" in self.secret():
            raise ValueError("the key holds a zero byte; make one with: openssl rand -hex 32")
        if self.key_rows is not None and self.workers > 1:
            raise ValueError(
                "key_rows needs one worker: each counts its own rows, so that several would give several answers"
            )
        return self


def share_key() -> None:
    """In the process that starts the workers: give them one key, so that they answer alike; also those that begin after its file has changed."""
    none = settings().key is None and settings().key_file is None
    os.environ["MODEPATH_KEY"] = secrets.token_hex(KEY_BYTES) if none else os.fsdecode(settings().secret())


def workers_for(cores: int) -> int:
    """One process for four cores: members run outside Python's lock, and each worker holds all of them in memory."""
    return max(1, cores // 4)


@cache
def settings() -> Settings:
    """The process's settings, read once.

    Raises:
        WrongSettingError: one is not what it may be.
    """
    try:
        return Settings()
    except SettingsError as error:  # no JSON where it has to be
        raise WrongSettingError(f"{error}: {error.__cause__}") from None
    except ValidationError as errors:
        found = [error for error in errors.errors() if error["type"] != "default_factory_not_called"]  # that follows
        raise WrongSettingError("; ".join(map(_one_line, found))) from None


def _one_line(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    name = ".".join(map(str, error["loc"]))
    return f"{name if name.isupper() else 'MODEPATH_' + name.upper()}: {message}"
