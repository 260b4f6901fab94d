"""ImageNet's test pictures with words and phrases, on which SEARLE (Baldrati et al. 2023; miccunifi/SEARLE) trains.

Beside the pictures (`cir_jax.data.imagenet`):

searle/words/           vectors: the pseudo-word of each picture (`cir_jax.training.words.write_words`)
searle/concepts.csv     SEARLE's similar concepts: `Image Name`, then those of a picture, the nearest first, as 1, 2, …
searle/phrases.json     {"concept": ["a photo of concept that …", …], …}, SEARLE's phrases of GPT-Neo
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cir_jax.data import published
from cir_jax.data.benchmark import Made
from cir_jax.data.published import Part
from cir_jax.data.tables import refuse
from cir_jax.vectors import Vectors

CONCEPTS = 150  # nearest ones that training draws from
STAR = "$"
NAME = "Image Name"


class Phrases(NamedTuple):
    """Concepts, the phrases with each, and the numbers of the concepts of each picture, nearest first."""

    concepts: Sequence[str]
    said: Sequence[Sequence[str]]
    near: Mapping[str, np.ndarray]

    def of(self, picture: str) -> list[tuple[str, str]]:
        """Every (phrase, concept in it) of a picture, for `cir_jax.training.words.write_words`; none if it is unknown."""
        return [
            (phrase, self.concepts[number])
            for number in self.near.get(Path(picture).stem, ())
            for phrase in self.said[number]
        ]


def pairs(part: Part) -> Made:
    """Raw training pairs: every step sees another phrase with one of the picture's concepts, starred and as it is.

    Raises:
      FileNotFoundError: missing files or pictures.
      ValueError: malformed ones; pictures with words that have no concepts.
    """
    folder = part.root / "searle"
    words = Vectors(folder / "words")
    names = [Path(each).stem for each in published.distinct(words.ids, folder / "words")]
    phrases = read_phrases(part.root)
    lost = [f"{name} has no concepts with phrases" for name in names if name not in phrases.near]
    refuse(f"{part.title} contradicts itself", lost, folder / "concepts.csv")
    paths, missing = published.present(part, {name: [f"test/{name}.JPEG"] for name in names})
    kept = [row for row, name in enumerate(names) if name in paths and name in phrases.near]
    missing.tell(len(kept), len(names), "pairs")
    tokens = words.array()

    def row(number):
        place, name = kept[number], names[kept[number]]
        item = {"image": paths[name], "token": tokens[place]}

        def draw(rng):
            concept = phrases.near[name][rng.integers(len(phrases.near[name]))]
            phrase = phrases.said[concept][rng.integers(len(phrases.said[concept]))]
            # original: every occurrence becomes a star, though the model's `first_star_only` puts the word at one alone
            starry = phrase.replace(phrases.concepts[concept], f" {STAR} ")
            return {"query": {"text": starry}, "item": {**item, "text": phrase}}

        return {**draw(np.random.default_rng(0)), "draw": draw}

    return Made(len(kept), row)


def read_phrases(root: Path, concepts: int = CONCEPTS) -> Phrases:
    """The phrases with each concept, and which concepts the pictures of `searle/concepts.csv` show, by their stems.

    A concept that is not in all of its phrases is left out, as originally.

    Args:
      concepts: nearest ones of a picture that are taken.

    Raises:
      FileNotFoundError, ValueError: missing and malformed files.
    """
    file = Path(root) / "searle/phrases.json"
    said = published.read_json(file, {str: [str]})
    usable = {
        name: each for name, each in said.items() if each and all(name in one for one in each)
    }
    if not usable:
        raise ValueError(f"{file} has no concept that is in all of its phrases")
    numbers = {name: number for number, name in enumerate(usable)}
    near = _near(Path(root) / "searle/concepts.csv", numbers, concepts)
    return Phrases(list(usable), list(usable.values()), near)


def _near(file: Path, numbers: Mapping[str, int], most: int) -> dict[str, np.ndarray]:
    """The numbers of the concepts of each picture; read line by line, for the file is large."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; cir_jax/data/searle.py says what it is")
    near = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            ranks = [str(rank) for rank in range(1, most + 1) if str(rank) in reader.fieldnames]
            if NAME not in reader.fieldnames or not ranks:
                raise ValueError(f"its columns are {reader.fieldnames[:4]}, expected {NAME}, 1, …")
            for row in reader:
                found = [numbers[row[rank]] for rank in ranks if row[rank] in numbers]
                if found:
                    near[Path(row[NAME]).stem] = np.array(found, np.int32)
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{file} is no table of concepts: {error}") from None
    return near
