"""Every setting of the server: its name, bounds, default and meaning. Validated once, at start.

A value comes from the first of these that has it: a flag, a ``TIMBRE_*`` variable, the TOML file named by
``--config`` or ``TIMBRE_CONFIG``, the default. This is the only module that reads the environment. It knows
no other part of the server: `build.py` hands each part the few values that it needs. A group's docstring is
its title in ``timbre serve --help``; a field's docstring is its help.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, SettingsConfigDict
from pydantic_settings import PydanticBaseSettingsSource as Source

ENV_PREFIX = "TIMBRE_"
EMBEDDED_MODEL = "embedded"
KIB = 1024
MIB = 1024 * KIB
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
MIN_API_KEY_LENGTH = 8


class SettingsError(ValueError):
    """Settings that cannot be used; the message names each one, where it may be set and what was expected."""


def _read_json(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


class _Group(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


class ModelSettings(_Group):
    """Model"""

    config: Path | None = None
    """TOML file with any of these settings, by their names with underscores."""
    model: str = EMBEDDED_MODEL
    """Folder, GGUF file or hub id of a causal language model; 'embedded' is the small one that comes
    with the package."""
    served_model_name: str | None = Field(None, pattern="^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$")
    """Name that requests use for the base model (default: the model's own name)."""
    layer_replication: Annotated[tuple[tuple[int, int], ...], NoDecode, BeforeValidator(_read_json)] = ()
    """Run layers again, sharing their weights: '[[0, 4], [2, 5]]' is layers 0 to 3, then 2 to 4. Serves the
    adapters that PEFT trained with this layer_replication, and no others (default: each layer once)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of weights and activations; 'auto' takes what suits the device."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    kernels: Literal["auto", "torch", "native", "triton"] = "auto"
    """What runs adapters (native: attention, too); 'auto': triton or native where it runs, else torch."""
    cache_dir: Path = Path(".timbre/cache")
    """Folder for converted weights, so that a second start is quick."""


class EngineSettings(_Group):
    """Engine"""

    max_model_len: int | None = Field(None, ge=1)
    """Longest prompt and output together, in tokens (default: what the model allows)."""
    max_num_seqs: int = Field(64, ge=1, le=4096)
    """Most requests that run at the same time."""
    max_num_batched_tokens: int | None = Field(None, ge=1)
    """Most tokens in one step, copies for several experts counted (default: 512 on a CPU, 2048 on a GPU)."""
    kv_cache_mib: int | None = Field(None, ge=1)
    """Memory for the KV cache, in MiB (default: sized from free memory at start)."""
    enable_prefix_caching: bool = True
    """Keep KV blocks of finished requests for prompts that begin alike."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of the model (default: as many as this process, or its container, may use)."""


class AdapterSettings(_Group):
    """Adapters"""

    store_dir: Path = Path(".timbre/store")
    """Folder of the adapter store."""
    examples_dir: Path | None = None
    """Folder whose adapters are registered at start where their names are free."""
    adapter_memory_mib: int = Field(1024, ge=1)
    """Memory for adapters, in MiB of prepared tensors; the least recently used leave it first."""
    lora_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of factors of low rank in memory; in C++ of sparse values and rotations, and of other matrices if
    it has such products. 'auto': bfloat16 for a model that runs in it, else float32."""
    max_upload_mib: int = Field(512, ge=1)
    """Largest adapter file that may be uploaded, in MiB."""
    allow_merged_pin: bool = False
    """Let POST /v1/adapters/{name}/pin merge one adapter, within the memory for adapters."""
    lora_path_root: Path | None = None
    """Folder that /v1/load_lora_adapter may read adapters from (default: those routes are off)."""


class HttpSettings(_Group):
    """HTTP"""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Host headers that are answered, comma separated, '*.example.org' and '*' allowed (default: any, but
    only local names on a loopback address without API keys)."""
    max_body_mib: int = Field(32, ge=1)
    """Largest body of a request that is not an upload, in MiB."""
    max_header_kib: int = Field(64, ge=4, le=1024)
    """Largest request line and headers together, in KiB."""
    keep_alive_timeout_s: int = Field(5, ge=1)
    """Seconds that an idle connection stays open."""
    head_timeout_s: float = Field(10.0, gt=0)
    """Seconds in which a request's line and headers must arrive."""


class LimitSettings(_Group):
    """Limits"""

    max_queued_requests: int = Field(1024, ge=1)
    """Most requests in the server, running or waiting; further ones get 503 queue_full."""
    max_queued_tokens: int = Field(1_000_000, ge=1)
    """Most prompt and output tokens of all requests in the server; 1024 of output where no limit is named."""
    max_logprobs: int = Field(20, ge=-1)
    """Most log-probabilities a request may ask for at each position; -1 allows the whole vocabulary."""


class SecuritySettings(_Group):
    """Security"""

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Keys, comma separated, one of which every request but the probes must bear (default: no key is asked
    for). Prefer the variable or the file: flags can be seen in the list of processes."""
    api_key_file: Path | None = None
    """File with further keys, one a line; lines that begin with # are left out."""
    public_metrics: bool = False
    """Answer /metrics without a key."""
    serve_openapi: bool = False
    """Serve the API's schema under /openapi.json."""


class LifeCycleSettings(_Group):
    """Life cycle"""

    drain_lead_s: float = Field(5.0, ge=0, le=600)
    """Seconds between SIGTERM and refusing new work, while /readyz already answers 503."""
    drain_timeout_s: float = Field(60.0, ge=0, le=86400)
    """Seconds that running requests may take to finish after that."""
    stall_timeout_s: float = Field(30.0, gt=0)
    """Seconds without an engine step, with work waiting, after which /livez answers 503."""


class ObservabilitySettings(_Group):
    """Logs and metrics"""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""
    log_format: Literal["auto", "console", "json"] = "auto"
    """'auto' writes for people on a terminal and JSON elsewhere."""
    metrics_max_adapters: int = Field(256, ge=1)
    """Adapters with metric series of their own; the least recent share adapter="_other"."""


class Settings(
    BaseSettings,
    ObservabilitySettings,
    LifeCycleSettings,
    SecuritySettings,
    LimitSettings,
    HttpSettings,
    AdapterSettings,
    EngineSettings,
    ModelSettings,
):
    """All settings, frozen: nothing changes after start-up."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: Source,
        env_settings: Source,
        dotenv_settings: Source,
        file_secret_settings: Source,
    ) -> tuple[Source, ...]:
        path = init_settings().get("config") or os.environ.get(f"{ENV_PREFIX}CONFIG")
        file = InitSettingsSource(settings_cls, _values_in(Path(path))) if path else None
        return (init_settings, env_settings, file) if file else (init_settings, env_settings)

    @field_validator("api_keys", "allowed_hosts", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("cache_dir", "store_dir", "examples_dir", "lora_path_root", "api_key_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value is not None else None

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        for folder, path in (("examples_dir", self.examples_dir), ("lora_path_root", self.lora_path_root)):
            if path is not None and not path.is_dir():
                raise ValueError(f"{folder}: there is no folder {path}")
        self.keys()
        return self

    def keys(self) -> tuple[str, ...]:
        """All API keys, of setting and file. Raises ValueError for one too short or not fit for a header."""
        keys = [key.get_secret_value() for key in self.api_keys]
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text("utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"api_key_file: {self.api_key_file} cannot be read: {error}") from error
            from_file = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
            if not from_file:
                raise ValueError(f"api_key_file: {self.api_key_file} holds no key; expected one a line")
            keys += from_file
        for key in keys:
            if len(key) < MIN_API_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    f"api_keys: a key of {len(key)} characters was given; expected at least "
                    f"{MIN_API_KEY_LENGTH} printable ASCII characters without spaces"
                )
        return tuple(keys)

    def answered_hosts(self) -> tuple[str, ...]:
        """Host names that are answered. ``("*",)``: any.

        A browser can be led to a server on its own machine by a name that an attacker controls. A key stops
        that; where there is none, a server on a loopback address answers to local names only.
        """
        if self.allowed_hosts:
            return self.allowed_hosts
        local = self.host in ("127.0.0.1", "localhost", "::1") and not self.keys()
        return LOOPBACK_HOSTS if local else ("*",)


def _values_in(file: Path) -> dict[str, Any]:
    """The values of a TOML file."""
    try:
        return tomllib.loads(file.expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"the settings file {file} cannot be read: {error}") from error


def load_settings(flags: Mapping[str, Any]) -> Settings:
    """Settings from flags (by field name), the environment and the TOML file, in that order.

    Raises: SettingsError naming every setting that is wrong, unknown ones included.
    """
    try:
        return Settings(**flags)
    except ValidationError as error:
        lines = [_describe(detail) for detail in error.errors(include_url=False, include_context=False)]
        raise SettingsError("\n".join(lines)) from error


def setting_groups() -> dict[str, tuple[str, ...]]:
    """The fields' names by their group's title, in the order of the help."""
    groups = [cls for cls in reversed(Settings.__mro__) if issubclass(cls, _Group)]
    return {str(cls.__doc__): tuple(cls.model_fields) for cls in groups if cls not in (_Group, Settings)}


def unknown_variables() -> tuple[str, ...]:
    """``TIMBRE_*`` variables that are set and mean nothing here: most often a slip of the pen."""
    names = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    return tuple(sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in names))


def _describe(detail: ErrorDetails) -> str:
    name = str(detail["loc"][0]) if detail["loc"] else ""
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"{name}: there is no such setting; see timbre serve --help"
    if not name:
        return message
    return f"{name} (--{name.replace('_', '-')}, {ENV_PREFIX}{name.upper()}): {message}"
