"""What a check found, line by line, and what it could not look at."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

from rayjobs.config import BadInput
from rayjobs.storage import StorageError


@dataclass
class Report:
    """Findings are mistakes; facts are what was seen, or what only the cluster can tell."""

    findings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    places: dict[str, str | None] = field(default_factory=dict)
    """What is wrong with a bucket that was asked: it is asked once, and told once."""

    def find(self, lines: Iterable[str], where: str = "") -> None:
        for line in lines:
            if where + line not in self.findings:
                self.findings.append(where + line)

    def tell(self, fact: str) -> None:
        if fact not in self.facts:
            self.facts.append(fact)

    @contextmanager
    def catching(self, where: str = "") -> Generator[None]:
        """An error that a job would end with is a finding, or several."""
        try:
            yield
        except (BadInput, StorageError) as error:
            self.find(str(error).splitlines(), where)
