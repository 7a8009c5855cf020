"""Settings of the service, from environment variables MODEPATH_…; a wrong value stops the start with a message."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import socket
from functools import cache
from pathlib import Path
from typing import Literal, Self

import platformdirs
import sqlalchemy
import sqlalchemy.exc
from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from models_store.errors import ModepathError, StoreError
from models_store.graphs.runtime import ProviderChoice, available_cores
from models_store.store import Store, default_root
from service.inference.policy import Policy

KEY_BYTES = 16


class WrongSettingError(ModepathError):
    """At least one setting has an invalid value; the message names all of them."""


class Settings(BaseSettings):
    """Each field is read from MODEPATH_<FIELD>. Limits of queues and of held bytes apply to each worker separately."""

    model_config = SettingsConfigDict(env_prefix="MODEPATH_", frozen=True, extra="ignore", hide_input_in_errors=True)

    store: Path = Field(default_factory=default_root, validation_alias=AliasChoices("MODELS_STORE"))
    default: str | None = Field(default=None, description="ensemble that answers when a request names none")
    providers: ProviderChoice = Field(default="auto", description="ONNX Runtime provider: auto, cpu or cuda")
    poll_seconds: float = Field(default=0.5, gt=0, description="seconds between two checks for a new activation")

    load_seconds: float = Field(
        default=120, gt=0, description="seconds within which a new version must become ready in the trial process"
    )
    load_bytes: int | None = Field(
        default=None,
        gt=0,
        description="bytes of memory that one version may take in the trial process; default: the memory that is free when the trial starts, "
        "divided by the number of workers plus one",
    )

    host: str = Field(
        default="127.0.0.1",
        description="address to listen on, or a name for it; 0.0.0.0 opens the service to the network",
    )
    port: int = Field(default=3000, gt=0, lt=65536)
    hosts: tuple[str, ...] = Field(
        default=(),
        description="accepted Host headers, as a JSON list of names without ports. Default: any name if the service is open to the network; "
        "on a loopback address only IP addresses and localhost, so that a web page cannot reach the service under its own domain name",
    )
    signed_by: tuple[Path, ...] = Field(
        default=(),
        description="files of public keys in PEM, as JSON: only versions that one of them signed are served; default: all versions",
    )
    keys_file: Path | None = Field(
        default=None,
        description="file of API keys, made by `modepath keys add`; every request but /livez and /readyz then needs one. Default: no keys",
    )
    cors_origins: tuple[str, ...] = Field(
        default=(),
        description='origins whose web pages may use the service, as a JSON list such as ["https://app.example"]. Default: none',
    )
    metrics_port: int | None = Field(
        default=None,
        gt=0,
        lt=65536,
        description="port of a separate listener for /metrics; the public port then has no /metrics",
    )
    metrics_host: str = Field(default="127.0.0.1", description="address of the separate listener for /metrics")
    grpc_port: int | None = Field(
        default=None,
        gt=0,
        lt=65536,
        description="port of the Open Inference Protocol over gRPC; without one there is no gRPC. Needs the extra grpc",
    )
    access_log: bool = Field(default=False, description="write one JSON line per request to standard output")
    log_format: Literal["text", "json"] = Field(
        default="text", description="form of the service's log: lines for people, or one JSON object per line"
    )
    otlp_endpoint: str | None = Field(
        default=None,
        validation_alias=AliasChoices("MODEPATH_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        description="base URL of an OpenTelemetry collector (OTLP over HTTP), to which traces of predictions are sent",
    )
    trusted_proxies: str = Field(
        default="",
        validation_alias=AliasChoices("MODEPATH_TRUSTED_PROXIES", "FORWARDED_ALLOW_IPS"),
        description="proxies whose X-Forwarded-For names the client in the access log: addresses or networks, comma-separated",
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
        description="policies by ensemble name, * for all others, as JSON; see service/inference/policy.py",
    )
    pool_bytes: int = Field(
        default=2**30, gt=0, description="bytes of memory for the single networks of one ensemble, in each worker"
    )
    key: SecretStr | None = Field(default=None, description="key of mode `keyed`; default: a new one at each start")
    key_file: Path | None = Field(default=None, description="file that holds the key of mode `keyed`")
    key_seconds: float = Field(default=3600, gt=0, description="seconds after which the key of mode `keyed` changes")
    key_rows: int | None = Field(
        default=None,
        gt=0,
        description="rows after which the key of mode `keyed` changes as well; each worker counts its own rows",
    )

    feedback: str = Field(
        default_factory=lambda: f"sqlite:///{platformdirs.user_data_path('modepath') / 'feedback.db'}",
        description="database in which answers are kept until their labels are known, as an SQLAlchemy URL; off: keep none",
    )
    feedback_days: float = Field(default=30, gt=0, description="days for which answers and labels are kept")
    feedback_bytes: int = Field(
        default=2**30, gt=0, description="bytes of kept answers and images, about; beyond, the oldest are removed"
    )
    feedback_images: float = Field(
        default=0, ge=0, le=1, description="share of the images that are kept with their answers, for relabelling"
    )
    feedback_images_of: Literal["all", "uncertain"] = Field(
        default="all",
        description="which images feedback_images keeps: a random share of all, or those with the largest predictive entropy among the "
        "calibration images",
    )

    caller_header: str | None = Field(
        default=None,
        description="header with the caller's identity, set by an authenticating proxy that overwrites client values; `keyed` then draws separately for each caller",
    )

    head_bytes: int = Field(
        default=32 * 1024, gt=0, description="largest size of the request line and headers; beyond: 431"
    )
    head_seconds: float = Field(
        default=10,
        gt=0,
        description="seconds until the head of a request is complete; beyond, its connection is closed",
    )
    max_body_bytes: int = Field(default=16 * 2**20, gt=0, description="largest size of a body; beyond: 413")
    max_rows: int = Field(default=1024, gt=0, description="largest number of images in one request; beyond: 413")
    max_pixels: int = Field(
        default=2**25, gt=0, description="largest number of pixels of the encoded images of one request; beyond: 413"
    )
    max_numbers: int = Field(
        default=2**21, gt=0, description="largest number of probabilities in one answer; beyond: 413"
    )
    timeout: float = Field(default=60, gt=0, description="seconds from a request's headers to its answer; beyond: 504")
    stall_seconds: float = Field(
        default=5,
        gt=0,
        description="seconds in which a client must send 64 KiB of a body (beyond: 408), or read 64 KiB of an answer",
    )

    hang_seconds: float = Field(
        default=30,
        gt=0,
        description="seconds after which a worker is replaced whose event loop is blocked, or whose members still run one batch",
    )
    grace_seconds: float = Field(
        default_factory=lambda data: data["timeout"] + 5,
        gt=0,
        description="seconds that requests may still take when the service stops",
    )

    batch_rows: int = Field(default=64, gt=0, description="largest number of rows that run together")
    batch_seconds: float = Field(default=0.05, gt=0, description="seconds that a batch should take at most")
    queue_rows: int = Field(default=4096, gt=0, description="largest number of rows that may wait; beyond: 429")
    queue_pixels: int = Field(
        default=2**26,
        gt=0,
        description="largest number of pixels of large encoded images that may wait to be decoded; beyond: 429",
    )
    queue_seconds: float = Field(default=2, gt=0, description="seconds that a request may wait; beyond: 429 or 503")
    held_bytes: int = Field(
        default=256 * 2**20,
        gt=0,
        description="largest number of bytes of bodies that are held at once, and again of decoded images; an eighth of those for bodies is "
        "reserved for small bodies",
    )

    @field_validator("store")
    @classmethod
    def _folder(cls, store: Path) -> Path:
        try:
            return Store(store).root
        except StoreError as error:
            raise ValueError(str(error)) from None

    @field_validator("feedback")
    @classmethod
    def _database(cls, url: str) -> str:
        if url != "off":
            try:
                sqlalchemy.make_url(url)
            except (sqlalchemy.exc.ArgumentError, ValueError):
                raise ValueError(
                    "it is neither the URL of a database, as sqlite:////data/feedback.db, nor off"
                ) from None
        return url

    @field_validator("host", "metrics_host")
    @classmethod
    def _address(cls, host: str) -> str:
        """Resolve a name, because BentoML accepts addresses only."""
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(host))
        try:
            found = [str(address[0]) for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError):
            raise ValueError(f"{host!r} is neither an IP address nor the name of one") from None
        return next((address for address in found if "." in address), found[0])

    def secret(self) -> bytes:
        """Return the key of mode `keyed`."""
        if self.key is None:
            assert self.key_file is not None, "share_key gave a key to this process's parent"
            return self.key_file.read_bytes().strip()
        return os.fsencode(self.key.get_secret_value())

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"{origin!r} is not an origin such as https://app.example, without a path")
        return origins

    @model_validator(mode="after")
    def _one_caller(self) -> Self:
        if self.keys_file is not None and self.caller_header is not None:
            raise ValueError("keys_file and caller_header both name the caller; give one of them")
        return self

    @model_validator(mode="after")
    def _long_key(self) -> Self:
        given = self.key is not None or self.key_file is not None
        if given and len(self.secret()) < KEY_BYTES:  # also refuses an empty key, often a variable that was not set
            raise ValueError(f"the key has less than {KEY_BYTES} bytes; make one with: openssl rand -hex 32")
        if given and b"\0" in self.secret():
            raise ValueError("the key holds a zero byte; make one with: openssl rand -hex 32")
        if self.key_rows is not None and self.workers > 1:
            raise ValueError(
                "key_rows needs one worker: each worker counts its own rows, so several workers would give different answers"
            )
        return self


def share_key() -> None:
    """Give all workers one key, so that they answer alike, even those started after the key file has changed.

    Called in the process that starts the workers.
    """
    none = settings().key is None and settings().key_file is None
    os.environ["MODEPATH_KEY"] = secrets.token_hex(KEY_BYTES) if none else os.fsdecode(settings().secret())


def workers_for(cores: int) -> int:
    """One worker for four cores: members run outside Python's lock, and each worker holds all of them in memory."""
    return max(1, cores // 4)


@cache
def settings() -> Settings:
    """Return the settings of this process, read once.

    Raises:
        WrongSettingError: a setting has an invalid value.
    """
    try:
        return Settings()
    except SettingsError as error:  # a setting that must be JSON is not
        raise WrongSettingError(f"{error}: {error.__cause__}") from None
    except ValidationError as errors:
        # A default that depends on an invalid setting is reported too, but is only a consequence.
        found = [error for error in errors.errors() if error["type"] != "default_factory_not_called"]
        raise WrongSettingError("; ".join(map(_one_line, found))) from None


def _one_line(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    name = ".".join(map(str, error["loc"]))
    return f"{name if name.isupper() else 'MODEPATH_' + name.upper()}: {message}"
