"""Models and adapters by name: those of the configuration, and every export below a folder.

Owns what a name stands for. Knows neither torch nor Ray: names are looked up in a table, so that no
name can mean a place outside the folder.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.weights import first_line
from rayjobs.models import exports
from rayjobs.models.exports import ExportNote
from rayjobs.models.facts import ModelFacts, is_folder, read_facts
from rayjobs.models.options import LoadOptions, WordConfig
from rayjobs.storage import StorageError
from serve.config import NAME, LoraConfig, ModelConfig, ServeConfig

NO_FACTS = ModelFacts()


@dataclass(frozen=True)
class Weights:
    """What a replica has to load."""

    uri: str
    config: str | None = None
    how: LoadOptions = field(default_factory=LoadOptions)
    words: tuple[WordConfig, ...] = ()
    version: str = ""
    """Changes when another export takes an export's place."""


@dataclass(frozen=True)
class Entry:
    """A name that callers can say."""

    name: str
    kind: Literal["model", "lora"]
    weights: Weights | None
    """None for an adapter that fits any model."""
    lora: str | None = None
    """The adapter's file; a `model` that is one loads it at strength 1."""
    base: str | None = None
    """The name of the model that an adapter is for."""
    facts: ModelFacts = NO_FACTS
    hint: str | None = None
    """A prompt that the model was taught."""
    created: int = 0
    version: str = ""
    """Changes when another export takes its place."""


class Registry:
    """The names that can be served now; `refresh` looks for new exports."""

    def __init__(self, config: ServeConfig):
        self.config = config
        self.problems: dict[str, str] = {}
        """Why an export that is there is not served, by its name."""
        self._fixed = {entry.name: entry for entry in self._configured()}
        self._found: dict[str, tuple[str, Entry]] = {}
        self._looked_s = float("-inf")
        self._looking = threading.Lock()

    def entries(self) -> list[Entry]:
        found = {name: entry for name, (_, entry) in self._found.items()}
        return [*self._fixed.values(), *(e for n, e in found.items() if n not in self._fixed)]

    def find(self, name: str) -> Entry | None:
        """What a name means; a name that is not known yet is looked for first."""
        known = self._fixed.get(name) or self._of_folder(name)
        if known is None and NAME.fullmatch(name) and self.config.registry.uri is not None:
            self.refresh(at_once=True)
            known = self._of_folder(name)
        return known

    def default(self) -> Entry | None:
        name = self.config.default_model
        if name is not None:
            return self.find(name)
        if not self.entries():
            self.refresh(at_once=True)
        return next((entry for entry in self.entries() if entry.kind == "model"), None)

    def watch(self) -> None:
        """Look for new, changed and removed exports from now on, in a thread of its own."""
        if self.config.registry.uri is not None:
            threading.Thread(target=self._follow, name="registry", daemon=True).start()

    def _follow(self) -> None:
        while True:
            self.refresh()
            time.sleep(self.config.registry.refresh_s)

    def learn(self, facts: dict[str, ModelFacts]) -> None:
        """What replicas tell of models whose files are not to be seen from here: the hub's."""
        for name, found in facts.items():
            known = self._fixed.get(name)
            if known is not None and known.facts.family is None:
                self._fixed[name] = replace(known, facts=found)

    def refresh(self, at_once: bool = False) -> None:
        """Look for new, changed and removed exports, not more often than the configuration says.

        A storage server that is away changes nothing.
        """
        with self._looking:
            every_s = self.config.registry.refresh_s
            every_s = min(1.0, every_s) if at_once else every_s
            if time.monotonic() - self._looked_s >= every_s:
                self._look()
                self._looked_s = time.monotonic()

    def _look(self) -> None:
        uri = self.config.registry.uri
        if uri is None:
            return
        try:
            names = [name for name in storage.list_folders(uri) if NAME.fullmatch(name)]
            found = {name: self._read(uri, name) for name in names}
        except StorageError as error:
            self.problems["registry"] = str(error)
            return
        self.problems.pop("registry", None)
        self._found = {name: each for name, each in found.items() if each is not None}

    def _of_folder(self, name: str) -> Entry | None:
        found = self._found.get(name)
        return None if found is None else found[1]

    def _read(self, uri: str, name: str) -> tuple[str, Entry] | None:
        """The export of one folder, with a mark that changes with it; as it was, if it has not."""
        for place in (storage.join(uri, name, "export"), storage.join(uri, name)):
            mark = storage.etag(storage.join(place, exports.FILE))
            if mark is None:
                continue
            known = self._found.get(name)
            if known is not None and known[0] == mark:
                return known
            try:
                note = exports.read(place)
                entry = None if note is None else self._entry(name, place, note, mark)
            except storage.Unavailable:
                raise
            except Exception as error:  # one odd export hides itself, and no other
                self.problems[name] = first_line(error)
                return None
            self.problems.pop(name, None)
            return None if entry is None else (mark, replace(entry, version=mark))
        return None

    def _entry(
        self, name: str, place: str, note: ExportNote, mark: str, how: LoadOptions | None = None
    ) -> Entry:
        """What an export means: a model of its own, or an adapter or words for its base."""
        base = next((m for m in self.config.models if m.uri == note.base_uri), None)
        parts = exports.parts_of(place, note)
        if note.kind == "full":
            weights = Weights(place, None, how or LoadOptions(), version=mark)
        else:
            like = how or (_how(base) if base else LoadOptions())
            weights = Weights(parts.base_uri, base.config if base else None, like)
        if parts.words:
            weights = replace(weights, words=parts.words, version=mark)
        is_lora = note.kind == "lora"
        return Entry(
            name=name,
            kind="lora" if is_lora else "model",
            weights=weights,
            lora=parts.lora_uri,
            base=base.name if base else None,
            facts=read_facts(weights.uri),
            hint=note.instance_prompt,
            created=int(time.time()),
        )

    def _configured(self) -> Iterator[Entry]:
        for model in self.config.models:
            note = exports.read(model.uri) if is_folder(model.uri) else None
            if note is not None:
                entry = self._entry(model.name, model.uri, note, "", _how(model))
                yield replace(entry, kind="model")
                continue
            weights = Weights(model.uri, model.config, _how(model))
            yield Entry(model.name, "model", weights, None, None, read_facts(model.uri), model.hint)
        for lora in self.config.loras:
            yield self._lora(lora)

    def _lora(self, lora: LoraConfig) -> Entry:
        note = exports.read(lora.uri) if is_folder(lora.uri) else None
        if note is not None and note.kind != "lora":
            raise BadInput(f"loras: {lora.uri} is an export of kind {note.kind}; list it in models")
        base = next((m for m in self.config.models if m.name == lora.base), None)
        if lora.base is not None and base is None:
            known = ", ".join(model.name for model in self.config.models)
            raise BadInput(f"loras: base {lora.base!r} is no model; there are {known}")
        weights = None if base is None else Weights(base.uri, base.config, _how(base))
        hint = None if note is None else note.instance_prompt
        facts = ModelFacts() if base is None else read_facts(base.uri)
        return Entry(lora.name, "lora", weights, lora.uri, lora.base, facts, hint)


def _how(model: ModelConfig) -> LoadOptions:
    return LoadOptions(**{name: getattr(model, name) for name in LoadOptions.model_fields})
