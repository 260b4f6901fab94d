"""How fast pictures are read and prepared, beside PyTorch's DataLoader; the command is `python -m cir_jax.bench load`.

All take turns in one process with the same number of threads or workers. The rate is pictures per second by the clock
and the cost the milliseconds of processor time for one picture, child processes included, which other work on the
machine disturbs less; of both the best of all rounds.
"""

import contextlib
import io
import os
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cir_jax.bench.measure import print_table
from cir_jax.data.images import ImageSpec, jpeg
from cir_jax.data.inputs import Inputs
from cir_jax.data.records import Gallery, open_gallery

GOAL = 0.95  # of PyTorch's rate
INPUTS = Inputs(ImageSpec(size=224))


@dataclass(frozen=True, kw_only=True)
class Load:
    """Pictures of 224 pixels per second, from a folder, a tar and ArrayRecord, beside PyTorch's DataLoader.

    Each is read, decoded, resized (bicubic, the short side to 224), cut and normalised by Pillow and the same arithmetic;
    the DataLoader reads the folder. It has a worker for each core, and ours a thread for each core.
    """

    folder: Path | None = None
    """a folder of pictures (default: 200 drawn like photographs, 500 x 375, JPEG of about 50 KB)"""
    repeat: int = 5
    """rounds"""
    epochs: int = 4
    """passes over the pictures in each round"""
    batch: int = 64
    """pictures of a batch"""
    workers: int = 0
    """worker processes of ours instead of threads"""

    def __post_init__(self):
        for name, least in (("repeat", 1), ("epochs", 1), ("batch", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass
class Result:
    """The best of one reader: pictures per second, and milliseconds of processor time for a picture."""

    title: str
    rate: float = 0.0
    cost: float = float("inf")


# ---- pictures ----


def draw(rng: np.random.Generator, height: int = 375, width: int = 500) -> np.ndarray:
    """A picture `[height, width, 3]` uint8 that is as hard to code as a photograph: soft colours, edges, grain."""
    rows, columns = np.linspace(0, 11, height), np.linspace(0, 15, width)
    coarse = rng.uniform(0, 255, (13, 17, 3))
    y, x = rows.astype(int), columns.astype(int)
    down, right = (rows - y)[:, None, None], (columns - x)[None, :, None]
    corner = lambda dy, dx: coarse[y + dy][:, x + dx]
    upper = corner(0, 0) * (1 - right) + corner(0, 1) * right
    picture = upper * (1 - down) + (corner(1, 0) * (1 - right) + corner(1, 1) * right) * down
    for _ in range(12):
        centre, radius = rng.uniform((0, 0), (height, width)), rng.uniform(10, 90)
        away = np.hypot(*np.ogrid[-centre[0] : height - centre[0], -centre[1] : width - centre[1]])
        picture[away[:height, :width] < radius] += rng.uniform(-70, 70, 3)
    picture += rng.normal(0, 6, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


def write_pictures(folder: Path, count: int = 200) -> None:
    """Draw `count` pictures into a new folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        (folder / f"{number:05d}.jpg").write_bytes(jpeg(draw(rng)))


def write_tar(folder: Path, path: Path) -> None:
    """The pictures of a folder as one shard."""
    with tarfile.open(path, "w") as archive:
        for row, file in enumerate(open_gallery(folder)):
            data = Path(file["image"]).read_bytes()
            info = tarfile.TarInfo(f"{row:08d}{Path(file['id']).suffix}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


# ---- readers ----


class _Epochs:
    """A gallery several times over, pictures only."""

    def __init__(self, gallery: Gallery, epochs: int):
        self.gallery, self.epochs = gallery, epochs

    def __len__(self) -> int:
        return len(self.gallery) * self.epochs

    def __getitem__(self, row: int) -> dict:
        return {"image": self.gallery[row % len(self.gallery)]["image"]}


class _Files:
    """The same for PyTorch: `transform` of every picture."""

    def __init__(self, examples: _Epochs, transform, read):
        self.examples, self.transform, self.read = examples, transform, read

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int):
        return self.transform(self.read(self.examples[row]["image"]))


def ours(gallery: Gallery, command: Load) -> Iterator[np.ndarray]:
    """Batches `[n, 224, 224, 3]` float32 of our pipeline."""
    from cir_jax.data.pipeline import eval_batches

    examples, options = _Epochs(gallery, command.epochs), {"workers": command.workers}
    for batch in eval_batches(examples, INPUTS, command.batch, pad=False, **options):
        yield batch["image"]


def theirs(gallery: Gallery, command: Load) -> Iterator[np.ndarray]:
    """Batches `[n, 224, 224, 3]` float32 of a DataLoader over a folder, its workers a process for each core."""
    from cir_jax.bench.peers import library

    torch, folders = library("torch"), library("torchvision.datasets.folder")
    known, spec = library("torchvision.transforms"), INPUTS.image
    transform = known.Compose(
        [
            known.Resize(spec.size, known.InterpolationMode.BICUBIC),
            known.CenterCrop(spec.size),
            known.ToTensor(),
            known.Normalize(spec.mean, spec.std),
        ]
    )
    files = _Files(_Epochs(gallery, command.epochs), transform, folders.default_loader)
    loader = torch.utils.data.DataLoader(files, command.batch, num_workers=os.cpu_count() or 1)
    for batch in loader:
        yield batch.permute(0, 2, 3, 1).numpy()  # a view


# ---- measuring ----


def measured(command: Load, advance: Callable[[int], None]) -> tuple[list[Result], float]:
    """The best of each reader, PyTorch's first, and the largest difference between their first batches and PyTorch's."""
    with contextlib.ExitStack() as opened:
        readers = _readers(command, Path(opened.enter_context(tempfile.TemporaryDirectory())))
        difference = _difference(readers)
        results = {title: Result(title) for title in readers}
        for number in range(command.repeat):
            # Each begins a round as often as the others.
            titles = list(readers)
            for title in titles[number % len(titles) :] + titles[: number % len(titles)]:
                rate, cost = _timed(readers[title])
                found = results[title]
                found.rate, found.cost = max(found.rate, rate), min(found.cost, cost)
                advance(1)
    return list(results.values()), difference


def _readers(command: Load, place: Path) -> dict[str, Callable[[], Iterator[np.ndarray]]]:
    from cir_jax.data.packed import Part, pack

    folder = command.folder or place / "pictures"
    if command.folder is None:
        write_pictures(folder)
    raw = open_gallery(folder)
    write_tar(folder, place / "x.tar")
    pack("gallery", {Part("gallery", "own", "all"): raw}, place / "packed")
    galleries = {
        "folder": raw,
        "tar": open_gallery(place / "x.tar"),
        "ArrayRecord": open_gallery(place / "packed"),
    }
    found = {"DataLoader, folder": lambda: theirs(raw, command)}
    return found | {
        title: lambda gallery=gallery: ours(gallery, command)
        for title, gallery in galleries.items()
    }


def _difference(readers) -> float:
    firsts = []
    for make in readers.values():
        with contextlib.closing(make()) as stream:
            firsts.append(next(stream).copy())
    return max(float(np.abs(first - firsts[0]).max()) for first in firsts)


def _processor() -> float:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, who))


def _timed(make: Callable[[], Iterator[np.ndarray]]) -> tuple[float, float]:
    """(pictures per second, milliseconds of processor time for one)."""
    processor, clock, count = _processor(), time.perf_counter(), 0
    with contextlib.closing(make()) as stream:
        for batch in stream:
            count += len(batch)
    clock = time.perf_counter() - clock
    return count / clock, 1e3 * (_processor() - processor) / count


def load(command: Load) -> None:
    """Measure and print the table."""
    from cir_jax.progress import progress

    with progress("measured", 4 * command.repeat) as advance:
        results, difference = measured(command, advance)
    torch, *others = results
    rows = [(torch.title, f"{torch.rate:.0f}", "", f"{torch.cost:.2f}", "", "")]
    for found in others:
        ratios = found.rate / torch.rate, torch.cost / found.cost
        faster, cheaper = (f"{x:.2f}{' below' if x < GOAL else ''}" for x in ratios)
        numbers = f"{found.rate:.0f}", faster, f"{found.cost:.2f}", cheaper, f"{GOAL:.2f}"
        rows.append((found.title, *numbers))
    titles = ("reader", "pictures/s", "ratio", "ms of processor", "ratio", "goal")
    print_table(titles, rows, words=1)
    made = f"{command.workers} worker processes" if command.workers else "threads"
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; ours with {made}; "
        f"pictures differ by at most {difference:.1e}"
    )
