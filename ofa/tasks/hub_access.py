"""Reach data sets of the Hugging Face hub: one short request, then a download or this machine's caches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ofa import hub
from ofa.errors import InputError, first_sentence
from ofa.tasks.demo import DEMO_TASKS

_log = logging.getLogger(__name__)

_WAYS = (
    f"work offline with a folder of task.json and train.jsonl, or with an embedded demo task ({', '.join(DEMO_TASKS)})"
)


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub. `unreachable` is the reason to read only the caches, or None if the hub answered."""

    hub_id: str
    config: str | None = None
    revision: str | None = None
    data_files: str | None = None
    unreachable: str | None = None

    def split(self, split: str) -> Any:
        """One split as a `datasets.Dataset`. Raises `InputError` if neither hub nor cache has it."""
        try:
            with _without_library_lines(), _datasets_offline(self.unreachable is not None):
                loaded = self._load(split)
        except Exception as error:
            # The hub's client raises errors of several libraries: broken connection, no such split, no such file.
            raise InputError(
                f'{self.hub_id} (split "{split}") could not be loaded from the Hugging Face hub '
                f"({self._reason(error)}): check its name and the network, or {_WAYS}"
            ) from error
        if self.unreachable is not None:
            _log.info('%s (split "%s") comes from this machine\'s cache (%s)', self.hub_id, split, self.unreachable)
        return loaded

    def _load(self, split: str) -> Any:
        import datasets

        if self.data_files is None:
            return datasets.load_dataset(self.hub_id, name=self.config, revision=self.revision, split=split)
        from huggingface_hub import snapshot_download

        # `datasets` does not find individually named files in its cache again; the hub client's cache does.
        pattern = self.data_files.format(split=split)
        folder = snapshot_download(
            self.hub_id,
            repo_type="dataset",
            revision=self.revision,
            allow_patterns=pattern,
            local_files_only=self.unreachable is not None,
        )
        return datasets.Dataset.from_parquet(sorted(map(str, Path(folder).glob(pattern))))

    def _reason(self, error: Exception) -> str:
        # The libraries report a cache miss as a connection error.
        if self.unreachable is not None and isinstance(error, OSError):
            return f"{self.unreachable}, and no copy of it is in the cache"
        return first_sentence(error)


def find_dataset(
    hub_id: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    data_files: str | None = None,
    offline: bool = False,
) -> HubDataset:
    """Ask the hub, once and for a few seconds at most, whether it has this data set; `datasets` would retry six times.

    With `offline`, or offline mode in the environment, the hub is not asked. Raises `InputError` if the hub has no such
    data set, or access to it is restricted.
    """
    import datasets

    answer = hub.ask("data set", hub_id, offline=offline or datasets.config.HF_HUB_OFFLINE, otherwise=_WAYS)
    return HubDataset(hub_id, config, revision, data_files, answer.unreachable)


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
