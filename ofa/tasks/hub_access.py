"""Reach data sets of the Hugging Face hub: one short request, then a download or this machine's caches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ofa import hub
from ofa.errors import InputError, first_sentence
from ofa.tasks.demo import DEMO_TASKS

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_WAYS = (
    "work offline with a local copy of the repository as the source, with a folder of task.json and train.jsonl, or "
    f"with an embedded demo task ({', '.join(DEMO_TASKS)})"
)


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub. `unreachable` is the reason to read only the caches, or None if the hub answered."""

    hub_id: str
    config: str | None = None
    revision: str | None = None
    unreachable: str | None = None

    def split(self, split: str) -> object:
        """One split as a `datasets.Dataset`. Raises `InputError` if neither hub nor cache has it."""
        import datasets

        def load() -> object:
            return datasets.load_dataset(self.hub_id, name=self.config, revision=self.revision, split=split)

        return self._loaded(load, f' (split "{split}")')

    def folder(self, pattern: str) -> Path:
        """A local copy of the files that match. Raises `InputError` if neither hub nor cache has them."""
        from huggingface_hub import snapshot_download

        def load() -> Path:
            local = self.unreachable is not None
            folder = snapshot_download(
                self.hub_id,
                repo_type="dataset",
                revision=self.revision,
                allow_patterns=pattern,
                local_files_only=local,
            )
            return Path(folder)

        return self._loaded(load, "")

    def _loaded(self, load: Callable[[], _T], part: str) -> _T:
        try:
            with _without_library_lines(), _datasets_offline(self.unreachable is not None):
                loaded = load()
        except Exception as error:
            # The hub's client raises errors of several libraries: broken connection, no such split, no such file.
            raise InputError(
                f"{self.hub_id}{part} could not be loaded from the Hugging Face hub ({self._reason(error)}): check its "
                f"name and the network, or {_WAYS}"
            ) from error
        if self.unreachable is not None:
            _log.info("%s%s comes from this machine's cache (%s)", self.hub_id, part, self.unreachable)
        return loaded

    def _reason(self, error: Exception) -> str:
        # The libraries report a cache miss as a connection error.
        if self.unreachable is not None and isinstance(error, OSError):
            return f"{self.unreachable}, and no copy of it is in the cache"
        return first_sentence(error)


def find_dataset(
    hub_id: str, *, config: str | None = None, revision: str | None = None, offline: bool = False
) -> HubDataset:
    """Ask the hub, once and for a few seconds at most, whether it has this data set; `datasets` would retry six times.

    With `offline`, or offline mode in the environment, the hub is not asked. Raises `InputError` if the hub has no such
    data set, or access to it is restricted.
    """
    import datasets

    answer = hub.ask("data set", hub_id, offline=offline or datasets.config.HF_HUB_OFFLINE, otherwise=_WAYS)
    return HubDataset(hub_id, config, revision, answer.unreachable)


@contextmanager
def _datasets_offline(offline: bool) -> Iterator[None]:
    """Make `datasets` read only its cache, as if HF_HUB_OFFLINE had been set before its import."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _without_library_lines() -> Iterator[None]:
    """Silence the warnings of the libraries: our own message replaces them."""
    from datasets.utils import logging as of_datasets
    from huggingface_hub.utils import logging as of_hub

    before = [(library, library.get_verbosity()) for library in (of_datasets, of_hub)]
    for library, _ in before:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)
