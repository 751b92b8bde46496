"""What a training is told about its data: one dataset or several with weights, and which of their rows count.

`DataChoice` is the options of a command, `TrainedOn` what a run folder keeps of them where it is more than a dataset.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

from data_pipeline.formats.schema import DatasetInfo
from data_pipeline.loading.kept import read_kept_rows
from data_pipeline.loading.loader import Dataset, open_dataset
from data_pipeline.loading.mix import MixedDataset
from data_pipeline.selection.filters import FOLDER, select_rows
from infra import storage
from infra.errors import UserError, nearest

TRAINED_ON = "trained_on.json"
_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)=(.+)", re.DOTALL)  # a path as a=b/c is written ./a=b/c
_NAMED_CONDITION = re.compile(r"([A-Za-z][A-Za-z0-9_-]*):(.+)", re.DOTALL)


@dataclass(frozen=True)
class DataChoice:
    """Which data a command trains on."""

    data: tuple[str, ...]
    """Dataset made by `python -m data_pipeline run` (folder or s3://), or several as NAME=URI NAME=URI."""
    mix: tuple[str, ...] = ()
    """Weights of several datasets, NAME=WEIGHT: their shares of the samples; equal if left out."""
    max_repeats: int | None = None
    """Epochs of a dataset in a mix at most; then the others go on without it."""
    where: tuple[str, ...] = ()
    """Train only on rows that fulfil this, e.g. "aesthetic > 5 and width >= 512"; "NAME: ..." for one of several
    datasets."""
    columns: tuple[str, ...] = ()
    """Parquet with `key` and columns made later, for --where; NAME=URI for one of several datasets."""
    allow_other_data: bool = False
    """Continue a run although its data, filter or mix changed; the recipe's hash changes with them."""

    @property
    def plain(self) -> bool:
        """One dataset, all of its rows?"""
        return len(self.data) == 1 and not self.where

    def words(self) -> list[str]:
        """The options again, for the command of a run."""
        found = ["--data", *self.data]
        for name, values in (("mix", self.mix), ("where", self.where), ("columns", self.columns)):
            found += [f"--{name}", *values] if values else []
        found += [] if self.max_repeats is None else ["--max-repeats", str(self.max_repeats)]
        return [*found, *(["--allow-other-data"] if self.allow_other_data else [])]

    def open(self) -> Dataset:
        """The train split, filtered and mixed; UserError for what does not fit together."""
        uris = self.name_datasets()
        weights = self._read_weights(uris)
        conditions = list(_assign(self.where, _NAMED_CONDITION, uris, "--where"))
        tables = list(_assign(self.columns, _NAMED, uris, "--columns"))
        parts = {}
        for name, uri in uris.items():
            own_choice = [[text for owner, text in pairs if owner in ("", name)] for pairs in (conditions, tables)]
            if not own_choice[0] and not any(owner == name for owner, _ in tables):
                own_choice[1] = []  # a table for all is for those that have a condition
            parts[name] = select_rows(open_dataset(uri), *own_choice)
        if len(parts) == 1:
            return next(iter(parts.values()))
        return MixedDataset(parts, weights, max_repeats=self.max_repeats)

    def open_val(self) -> Dataset:
        """The val split, unfiltered, of the dataset that is named first."""
        return open_dataset(next(iter(self.name_datasets().values())), split="val")

    def name_datasets(self) -> dict[str, str]:
        """URIs by name; a single dataset needs none."""
        if len(self.data) == 1:
            found = _NAMED.fullmatch(self.data[0])
            if self.mix or self.max_repeats is not None:
                raise UserError("--mix and --max-repeats are for several datasets: --data a=URI b=URI")
            return {found[1]: found[2]} if found else {"": self.data[0]}
        named = [_NAMED.fullmatch(word) for word in self.data]
        bare = next((word for word, found in zip(self.data, named) if found is None), None)
        if bare is not None or not named:
            raise UserError(f"--data {bare or ''}: several datasets have names: --data a=URI b=URI")
        uris = {found[1]: found[2] for found in named if found}
        if len(uris) < len(named):
            raise UserError(f"--data {' '.join(self.data)}: a name stands twice")
        return uris

    def _read_weights(self, uris: dict[str, str]) -> dict[str, Fraction]:
        weights = dict.fromkeys(uris, Fraction(1))
        given: dict[str, Fraction] = {}
        for word in self.mix:
            name, equals, value = word.partition("=")
            if name not in uris:
                known = ", ".join(uris)
                raise UserError(f"--mix {word}: no dataset {name!r}{nearest(name, uris)}; --data names {known}")
            try:
                given[name] = Fraction(value)
            except (ValueError, ZeroDivisionError):
                given[name] = Fraction(0)
            if not equals or given[name] <= 0:
                raise UserError(f"--mix {word}: expected {name}=WEIGHT, a number above 0; leave out data of weight 0")
        if given and given.keys() != uris.keys():
            forgotten = ", ".join(sorted(uris.keys() - given.keys()))
            raise UserError(f"--mix gives no weight to {forgotten}: name every dataset")
        if self.max_repeats is not None and self.max_repeats < 1:
            raise UserError(f"--max-repeats {self.max_repeats}: expected 1 or more")
        return weights | given


def _assign(
    words: Sequence[str], pattern: re.Pattern[str], uris: dict[str, str], option: str
) -> Iterator[tuple[str, str]]:
    """(name of a dataset, "" for all of them; what is meant for it)."""
    for word in words:
        found = pattern.fullmatch(word)
        if found is None or (found[1] not in uris and "" in uris):
            yield "", word
        elif found[1] in uris:
            yield found[1], found[2].strip()
        else:
            raise UserError(f"{option} {word}: no dataset {found[1]!r}{nearest(found[1], uris)}")


@dataclass(frozen=True)
class TrainedPart:
    """One dataset of a run, as it was when the run began."""

    uri: str
    info: DatasetInfo
    """dataset.json of that day: the table of shards that it names stays when the dataset grows."""
    weight: str
    selection: str
    """Names the object of kept rows; "" where all are."""


@dataclass(frozen=True)
class TrainedOn:
    """RUN/trained_on.json: from it and the recipe the order of samples can be computed again."""

    parts: Mapping[str, TrainedPart]
    """By name; a single dataset may have the name ""."""
    where: tuple[str, ...]
    columns: tuple[str, ...]
    max_repeats: int | None

    def open(self, found_at: Mapping[str, str] = MappingProxyType({})) -> Dataset:
        """The data again, also after the datasets have grown. `found_at`: by name, other roots than those of then."""
        parts = {}
        for name, part in self.parts.items():
            uri = found_at.get(name, part.uri)
            parts[name] = Dataset(uri, part.info, "train")
            if part.selection:
                path = storage.join(uri, FOLDER, f"{part.selection}.parquet")
                parts[name] = parts[name].keep(read_kept_rows(path, parts[name].index)[0], part.selection)
        if len(parts) == 1:
            return next(iter(parts.values()))
        weights = {name: Fraction(part.weight) for name, part in self.parts.items()}
        return MixedDataset(parts, weights, max_repeats=self.max_repeats)

    def summarise(self) -> dict[str, object]:
        """What a person calls a change of data."""
        parts: dict[str, object] = {}
        for name, part in self.parts.items():
            parts |= {f"data {name}".strip(): part.info.fingerprint, f"rows of {name}".strip(" of"): part.selection}
        weights = {f"weight of {name}": part.weight for name, part in self.parts.items() if len(self.parts) > 1}
        return {**parts, **weights, "where": " and ".join(self.where), "max_repeats": self.max_repeats}


def describe_choice(choice: DataChoice, dataset: Dataset) -> TrainedOn:
    """What `choice.open()` gave, for the run folder."""
    parts = dataset.parts if isinstance(dataset, MixedDataset) else {next(iter(choice.name_datasets())): dataset}
    weights = dataset.weights if isinstance(dataset, MixedDataset) else {}
    return TrainedOn(
        {
            name: TrainedPart(
                part.uri, part.info, str(weights.get(name, 1)), "" if part.kept is None else part.fingerprint
            )
            for name, part in parts.items()
        },
        choice.where, choice.columns, choice.max_repeats,
    )  # fmt: skip


def list_changes(old: TrainedOn, new: TrainedOn) -> list[str]:
    """`["weight of b: 1/2 -> 2/3"]`."""
    before, after = old.summarise(), new.summarise()
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {_or_none(before.get(key))} -> {_or_none(after.get(key))}" for key in changed]


def _or_none(value: object) -> object:
    return "none" if value in (None, "") else value
