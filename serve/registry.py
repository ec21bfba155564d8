"""Models and adapters by name: from the configuration, and every export in the registry folder.

Owns what a name refers to. Knows neither torch nor Ray. Names are looked up in a table, so no name
can refer to a path outside the folder.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.facts import adapter_usual, file_name
from rayjobs.diffusion.files.header import first_line
from rayjobs.models import exports
from rayjobs.models.exports import ExportNote
from rayjobs.models.facts import ModelFacts, is_folder, read_facts
from rayjobs.models.options import LoadOptions, SourceConfig, WordConfig
from rayjobs.storage import StorageError
from serve.config import NAME, LoraConfig, ModelConfig, ServeConfig

NO_FACTS = ModelFacts()


@dataclass(frozen=True)
class Weights:
    """What a replica loads."""

    uri: str
    config: str | None = None
    how: LoadOptions = field(default_factory=LoadOptions)
    words: tuple[WordConfig, ...] = ()
    """Learned embeddings, each with its token."""
    version: str = ""
    """Changes when an export is replaced."""
    base: str | None = None
    revision: str | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None

    @property
    def source(self) -> SourceConfig:
        keys = {name: getattr(self, name) for name in SourceConfig.model_fields}
        return SourceConfig(**keys)


@dataclass(frozen=True)
class Entry:
    """A name that requests can use."""

    name: str
    kind: Literal["model", "lora", "control", "ip_adapter"]
    weights: Weights | None
    """None for a ControlNet, an IP-Adapter, and a LoRA that fits any model."""
    lora: str | None = None
    """The adapter's file; a `model` with one always uses it at scale 1."""
    net: tuple[str, ...] | None = None
    """The folder of a ControlNet; or an IP-Adapter's file, and its encoder's folder."""
    base: str | None = None
    """The name of the model that it belongs to, if it is none itself."""
    facts: ModelFacts = NO_FACTS
    hints: tuple[str, ...] = ()
    """Prompts that the model was tuned on, or that show what it can draw."""
    created: int = 0
    version: str = ""
    """Changes when its export is replaced."""


class Registry:
    """The names that can be served; `refresh` looks for new exports."""

    def __init__(self, config: ServeConfig):
        self.config = config
        self.problems: dict[str, str] = {}
        """Why an export is not served, by its name."""
        self._fixed = {entry.name: entry for entry in self._configured()}
        self._exports: dict[str, tuple[str, Entry]] = {}
        self._began_s = self._scanned_s = float("-inf")
        self._scan_lock = threading.Lock()

    def entries(self) -> list[Entry]:
        found = {name: entry for name, (_, entry) in self._exports.items()}
        return [*self._fixed.values(), *(e for n, e in found.items() if n not in self._fixed)]

    def get(self, name: str | None) -> Entry | None:
        """The entry of a name or alias, or the default's, as far as it is known; never waits."""
        name = self.config.aliases.get(name, name) if name is not None else self._default_name()
        return None if name is None else self._fixed.get(name) or self._export(name)

    def find(self, name: str | None, promised: bool = False) -> Entry | None:
        """As `get`, but a name that is not known yet is looked for in the registry folder first.

        One that is `promised`, since another process has seen it there, is looked for now, however
        short a time ago that was done last.
        """
        known = self.get(name)
        is_possible = name is None or NAME.fullmatch(name)
        if known is None and is_possible and self.config.registry.uri is not None:
            self.refresh(at_once=True, after_s=time.monotonic() if promised else None)
            known = self.get(name)
        return known

    def _default_name(self) -> str | None:
        models = (entry.name for entry in self.entries() if entry.kind == "model")
        return self.config.default_model or next(models, None)

    def watch(self) -> None:
        """Keep looking for new, changed and removed exports, in a thread."""
        if self.config.registry.uri is not None:
            threading.Thread(target=self._follow, name="registry", daemon=True).start()

    def _follow(self) -> None:
        while True:
            self.refresh()
            time.sleep(self.config.registry.refresh_s)

    def add_facts(self, facts: dict[str, ModelFacts]) -> None:
        """Take facts from replicas, about models whose files are not readable here."""
        for name, reported in facts.items():
            known = self._fixed.get(name)
            if known is not None and known.facts.family is None:
                self._fixed[name] = replace(known, facts=reported)

    def refresh(self, at_once: bool = False, after_s: float | None = None) -> None:
        """Look for new, changed and removed exports, at most as often as configured, or unless that
        has begun since `after_s`.

        While the storage is not available, nothing changes.
        """
        with self._scan_lock:
            every_s = self.config.registry.refresh_s
            every_s = min(1.0, every_s) if at_once else every_s
            is_due = time.monotonic() - self._scanned_s >= every_s
            if is_due or (after_s is not None and self._began_s < after_s):
                self._began_s = time.monotonic()
                self._scan()
                self._scanned_s = time.monotonic()

    def _scan(self) -> None:
        uri = self.config.registry.uri
        if uri is None:
            return
        try:
            names = [name for name in storage.list_folders(uri) if NAME.fullmatch(name)]
            scanned = {name: self._read(uri, name) for name in names}
        except StorageError as error:
            self.problems["registry"] = str(error)
            return
        self.problems.pop("registry", None)
        self._exports = {name: each for name, each in scanned.items() if each is not None}

    def _export(self, name: str) -> Entry | None:
        export = self._exports.get(name)
        return None if export is None else export[1]

    def _read(self, uri: str, name: str) -> tuple[str, Entry] | None:
        """The export of one folder and its etag; reread only when the etag has changed."""
        for folder in (storage.join(uri, name, "export"), storage.join(uri, name)):
            etag = storage.etag(storage.join(folder, exports.FILE))
            if etag is None:
                continue
            known = self._exports.get(name)
            if known is not None and known[0] == etag:
                return known
            try:
                note = exports.read(folder)
                entry = None if note is None else self._entry(name, folder, note, etag)
            except storage.Unavailable:
                raise
            except Exception as error:  # a damaged export must not hide the others
                self.problems[name] = first_line(error)
                return None
            self.problems.pop(name, None)
            return None if entry is None else (etag, replace(entry, version=etag))
        return None

    def _entry(
        self, name: str, folder: str, note: ExportNote, etag: str, how: LoadOptions | None = None
    ) -> Entry:
        """The entry of an export: a model of its own, or an adapter or embeddings for its base."""
        base = next((m for m in self.config.models if m.uri == note.base_uri), None)
        parts = exports.parts_of(folder, note)
        if note.kind == "full":
            weights = Weights(folder, None, how or LoadOptions(), version=etag)
        else:
            like = how or (_how(base) if base else LoadOptions())
            weights = _weights(parts.base if base is None else base, like)
        if parts.words:
            weights = replace(weights, words=parts.words, version=etag)
        is_lora = note.kind == "lora"
        return Entry(
            name=name,
            kind="lora" if is_lora else "model",
            weights=weights,
            lora=parts.lora_uri,
            base=base.name if base else None,
            facts=read_facts(weights.source),
            hints=(note.instance_prompt,) if note.instance_prompt else (),
            created=int(time.time()),
        )

    def _configured(self) -> Iterator[Entry]:
        for model in self.config.models:
            note = exports.read(model.uri) if is_folder(model.uri) else None
            if note is not None:
                entry = self._entry(model.name, model.uri, note, "", _how(model))
                yield replace(entry, kind="model")
                continue
            weights, facts = _weights(model, _how(model)), read_facts(model)
            yield Entry(model.name, "model", weights, facts=facts, hints=_hints(model))
        for lora in self.config.loras:
            yield self._lora(lora)
        for control in self.config.controls:
            self._check_base("controls", control.base)
            yield Entry(control.name, "control", None, net=(control.uri,), base=control.base)
        for each in self.config.ip_adapters:
            self._check_base("ip_adapters", each.base)
            pair = each.uri, each.encoder
            yield Entry(each.name, "ip_adapter", None, net=pair, base=each.base)

    def _check_base(self, key: str, name: str | None) -> None:
        known = [model.name for model in self.config.models]
        if name is not None and name not in known:
            raise BadInput(f"{key}: base {name!r} is not in models; known are {', '.join(known)}")

    def _lora(self, lora: LoraConfig) -> Entry:
        note = exports.read(lora.uri) if is_folder(lora.uri) else None
        if note is not None and note.kind != "lora":
            raise BadInput(f"loras: {lora.uri} is an export of kind {note.kind}; list it in models")
        self._check_base("loras", lora.base)
        base = next((m for m in self.config.models if m.name == lora.base), None)
        weights = None if base is None else _weights(base, _how(base))
        hints = (note.instance_prompt,) if note is not None and note.instance_prompt else ()
        facts = ModelFacts() if base is None else read_facts(base)
        usual = adapter_usual(f"{lora.name} {file_name(lora.uri)}")
        facts = facts if usual is None else replace(facts, usual=usual)
        return Entry(lora.name, "lora", weights, lora.uri, base=lora.base, facts=facts, hints=hints)


def _hints(model: ModelConfig) -> tuple[str, ...]:
    return (model.hint,) if isinstance(model.hint, str) else model.hint or ()


def _weights(source: SourceConfig, how: LoadOptions) -> Weights:
    keys = {name: getattr(source, name) for name in SourceConfig.model_fields}
    return Weights(**keys, how=how)


def _how(model: ModelConfig) -> LoadOptions:
    return LoadOptions(**{name: getattr(model, name) for name in LoadOptions.model_fields})
