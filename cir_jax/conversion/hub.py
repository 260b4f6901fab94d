"""Models of the Hugging Face Hub, downloaded once; the only file that imports `huggingface_hub`."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

SCHEME = "hf://"
_ADDRESS = re.compile(r"hf://(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")  # the first kind that a repository has is taken
BESIDE = (
    "config.json",
    "open_clip_config.json",
    "preprocessor_config.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
    "vocab.txt",
    "1_Pooling/config.json",
)


class NoWeights(ValueError):
    """A repository holds nothing to convert."""


class Fetched(NamedTuple):
    """A local folder, and where its files came from: the address with the commit that it stood for."""

    folder: Path
    address: str


def fetch(address: str) -> Fetched:
    """The files of `hf://owner/name[@revision]` that a conversion needs, from the cache or downloaded to it.

    A download that was interrupted continues. The revision, a branch, tag or commit, `main` if none is given, becomes
    the commit that it names; without a connection, the one that it named when it was downloaded.

    Raises:
      ValueError: a malformed address, `NoWeights`.
      OSError: no such repository or revision, one that needs a permission, or no connection and nothing in the cache.
      ImportError: `huggingface_hub` is not installed.
    """
    match = _ADDRESS.fullmatch(address)
    if not match:
        raise ValueError(
            f"{address!r} is no address of the Hub; expected hf://owner/name or hf://owner/name@revision"
        )
    name, revision = match[1], match[2] or "main"
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ImportError(
            f"{address} needs huggingface_hub; run `pip install 'cir_jax[hub]'`, or download the folder yourself "
            "and give its path"
        ) from None
    download = huggingface_hub.snapshot_download
    try:
        found = huggingface_hub.model_info(name, revision=revision)
        names = [each.rfilename for each in found.siblings or ()]
        # By the revision's own name, so that the cache remembers which commit it was.
        folder = download(name, revision=revision, allow_patterns=chosen_files(address, names))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        what = "revision" if isinstance(error, errors.RevisionNotFoundError) else "repository"
        raise FileNotFoundError(
            f"{address}: the Hub has no such {what}, or shows it only to some; look at the address, or log in with "
            "`hf auth login`"
        ) from None
    except NoWeights:
        raise
    except Exception as error:  # without a connection, that of whichever HTTP library is underneath
        folder = _cached(download, name, revision)
        if folder is None:
            raise ConnectionError(
                f"{address} could not be downloaded ({_short(error)}) and is not in the cache; connect, or download "
                "the folder elsewhere and give its path"
            ) from None
    return Fetched(Path(folder), f"{SCHEME}{name}@{Path(folder).name}")


def _cached(download, name: str, revision: str) -> str | None:
    """The folder that an earlier download filled; None if there is none."""
    for suffix in WEIGHTS:
        patterns = [f"*{suffix}", f"*{suffix}.index.json", *BESIDE]
        options = {"allow_patterns": patterns, "local_files_only": True}
        options["ignore_patterns"] = ["onnx/*", "openvino/*"]
        with contextlib.suppress(OSError):  # not there, or not whole
            folder = download(name, revision=revision, **options)
            if list(Path(folder).glob(f"*{suffix}")):
                return folder
    return None


def chosen_files(address: str, names: Sequence[str]) -> list[str]:
    """Of the files of a repository those that a conversion reads: weights of one kind, and what describes them."""
    top = [name for name in names if len(PurePosixPath(name).parts) == 1]
    for suffix in WEIGHTS:
        weights = [name for name in top if name.endswith((suffix, f"{suffix}.index.json"))]
        if any(name.endswith(suffix) for name in weights):
            return weights + [name for name in names if name in BESIDE]
    raise NoWeights(
        f"{address} has no weights ({', '.join(WEIGHTS)}) among its files {', '.join(sorted(top)[:8])}"
    )


def _short(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text[:200] or type(error).__name__
