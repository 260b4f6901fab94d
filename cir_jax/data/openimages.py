"""Open Images and dialogues, as Maria (Liang et al. 2021; jokieleung/Maria) joins them: lines ask for pictures.

images/0312462f3202e152.jpg, …; open_images.ids with an id on each line, whose order counts, or else all pictures by
name; and train.pkl.txt, valid.pkl.txt, test.pkl.txt, a dialogue on each line with tabs between the utterances.
"""

from cir_jax.data import published
from cir_jax.data.benchmark import Benchmark
from cir_jax.data.published import Asked

FILES = {"train": "train.pkl.txt", "val": "valid.pkl.txt", "test": "test.pkl.txt"}
METRICS = ("recall@1", "recall@5", "recall@10", "mrr")


def benchmark(root: str, variant: str = "", split: str = "test") -> Benchmark:
    """Whole lines ask, tabs included (to every tokenizer here they are spaces); no answers exist.

    The id of a query is the place of its line from 0 on; lines that ask nothing are passed over. The lines of `train` end with the
    response: `dialogues-context` leaves it out, `dialogues` does not, as originally.
    """
    part = published.part(
        "openimages", root, variant, split, ("dialogues",), tuple(FILES), ["context"]
    )
    if "context" in part.flags and split != "train":
        raise ValueError(f"{part.title}: the response of val and test is not in their files")
    file = part.root / FILES[split]
    lines = published.read_lines(file)
    if "context" in part.flags:
        lines = [line.rpartition("\t")[0] for line in lines]
    asked = [
        Asked(id=str(number), asks={"text": line}, targets={})
        for number, line in enumerate(lines)
        if line.strip()
    ]
    if not asked:
        raise ValueError(f"{file} holds no dialogues")
    places = {name: [f"images/{name}.jpg"] for name in _ids(part)}
    return published.benchmark(part, file, asked, places, METRICS)


def _ids(part) -> list[str]:
    file = part.root / "open_images.ids"
    if not file.is_file():
        names = published.listing(part.root, "images")
        return sorted(name.removesuffix(".jpg") for name in names if name.endswith(".jpg"))
    return published.distinct([line for line in published.read_lines(file) if line], file)
