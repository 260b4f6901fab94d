"""`python -m cir_jax.convert SOURCE DEST --method NAME`: a checkpoint of another library becomes one of ours, or back."""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from cir_jax import files
from cir_jax.progress import printable


@dataclass(frozen=True)
class Arguments:
    """Convert a checkpoint of PyTorch, safetensors, flax or Hugging Face; the numbers stay what they are.

    SOURCE is a file or a folder (or `hf://owner/name`), DEST a new folder. A method that is made of several files takes
    the others as `part=SOURCE`. With `--export original` the arguments are a CHECKPOINT of ours and a new
    `.safetensors` file, which gets the names of the original library again. Whatever does not fit is listed, and then
    nothing is written.
    """

    paths: tyro.conf.Positional[tuple[str, ...]]
    """SOURCE [part=SOURCE …] DEST, or with --export CHECKPOINT DEST.safetensors; parts are the clip=SOURCE of
    fti4cir, pic2word, searle and lincir, the stage1=SOURCE of blip_rerank and the bert=SOURCE that maria begins with"""
    method: str | None = None
    """what the checkpoint is: clip, bert, cfir (BEiT-3), maria, blip_cir, blip_itm, blip_rerank, fti4cir, pic2word, searle,
    lincir, magiclens"""
    variant: str | None = None
    """what the file does not tell: the published name of a CLIP (ViT-B/32, ViT-B-32-quickgelu); mean or cls of a BERT;
    cfir or multiway-adapter of a CFIR with adapters; pixels of a BLIP's pictures, if not those of the file; published
    for a state dict of FTI4CIR; token for Vokenization's model before its training"""
    tokenizer: Path | None = None
    """vocabulary file, if it is neither CLIP's nor in the source's folder"""
    activation: Literal["quick_gelu", "gelu"] | None = None
    """of a CLIP whose file does not tell it"""
    group: str | None = None
    """which tensors to take where a file holds several models, such as `ema`"""
    resize_first: bool = False
    """CLIP: resize pictures before they become RGB, as OpenAI's code (differs for palettes and transparency)"""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """type on disk"""
    export: Literal["original"] | None = None
    """write a checkpoint of ours with the original's names"""


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
      layout: of names, as recognised.
      tensors, parameters: how many the model has been made of, and has.
      ignored: source name -> why it was not needed; left_out: what else the file held -> how many tensors.
      notes: what was decided, and by what.
      fingerprint: of the checkpoint; modules: of each part of it.
    """

    layout: str
    tensors: int
    parameters: int
    ignored: Mapping[str, str]
    left_out: Mapping[str, int]
    notes: tuple[str, ...]
    fingerprint: str
    modules: Mapping[str, str]


def _modules() -> dict:
    from cir_jax.conversion import beit3, bert, blip, clip, inversion, magiclens, maria

    modules = {"clip": clip, "bert": bert, "cfir": beit3, "maria": maria}
    modules |= dict.fromkeys(("blip_cir", "blip_itm", "blip_rerank"), blip)
    return modules | dict.fromkeys(inversion.NETWORKS, inversion) | {"magiclens": magiclens}


def _module(method: str | None):
    modules = _modules()
    if method not in modules:
        found = "none was given" if method is None else f"found {method!r}"
        raise ValueError(
            f"--method says what to convert to; expected {', '.join(modules)}, {found}"
        )
    return modules[method]


def convert(
    source: str | os.PathLike,
    dest: str | os.PathLike,
    method: str,
    *,
    variant: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    activation: str | None = None,
    group: str | None = None,
    resize_first: bool = False,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    parts: Mapping[str, str] | None = None,
) -> Converted:
    """Write the checkpoint `dest` from a source of another library.

    Arguments as of the command (`Arguments`); `parts` are further sources by name.

    Raises:
      FileExistsError: something is at `dest`; nothing has been read then.
      ValueError: a source that cannot be read, or one that does not fit the method; the message lists all faults.
    """
    files.refuse_existing(dest)
    module = _module(method)
    known, parts = getattr(module, "PARTS", {}).get(method, ()), parts or {}
    if not set(parts) <= set(known):
        more = f", perhaps with {', '.join(f'{part}=SOURCE' for part in known)}" if known else ""
        raise ValueError(
            f"{method} is made of one source{more}; found {', '.join(sorted(parts))} besides"
        )
    from cir_jax.conversion.rules import Options
    from cir_jax.conversion.sources import joined, open_source

    path, folder, came_from = _found(source)
    options = Options(
        method=method,
        variant=variant,
        activation=activation,
        tokenizer=None if tokenizer is None else files.local_path(tokenizer),
        resize_first=resize_first,
        folder=folder,
    )
    if options.tokenizer and not options.tokenizer.is_file():
        raise FileNotFoundError(f"there is no vocabulary file {options.tokenizer.absolute()}")
    try:
        opened = {"": open_source(path, group or getattr(module, "GROUP", None))}
        for part, each in parts.items():
            found, _, name = _found(each)
            opened[part], came_from = open_source(found), f"{came_from} {part}={name}"
        plan = module.plan(opened, options)
        return _written(plan, joined(opened), dest, dtype, came_from)
    except ValueError as error:
        place = printable(str(source))
        told = str(error)
        raise (error if place in told else ValueError(f"{place}: {told}")) from None


def _found(source) -> tuple[Path, Path | None, str]:
    """(local file or folder, the folder if it is one, the name to remember) of a source, perhaps on the Hub."""
    if os.fspath(source).startswith("hf://"):
        from cir_jax.conversion.hub import fetch

        try:
            fetched = fetch(os.fspath(source))
        except ImportError as error:
            raise ValueError(str(error)) from None
        return fetched.folder, fetched.folder, fetched.address
    path = files.local_path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path.absolute()}")
    return path, path if path.is_dir() else None, path.name


def _written(plan, source, dest, dtype: str, came_from: str) -> Converted:
    """Convert by a plan and save; memory holds the model once, and one tensor more."""
    from flax import traverse_util

    from cir_jax.checkpoint import abstract_params, initial_params, save_model
    from cir_jax.conversion.rules import convert as apply
    from cir_jax.conversion.rules import module_fingerprints

    _, tree = abstract_params(plan.config)
    shapes = {name: tuple(x.shape) for name, x in traverse_util.flatten_dict(tree, sep="/").items()}
    fresh = initial_params(plan.config, plan.fresh) if plan.fresh else {}
    params, ignored = apply(source.tensors, plan, shapes, dtype, fresh)
    modules = module_fingerprints(params)
    about = {
        "converted": {
            "source": came_from,
            "sha256": source.sha256,
            "layout": plan.layout,
            "notes": list(plan.notes),
            "ignored": len(ignored),
        }
    }
    tree = traverse_util.unflatten_dict(params, sep="/")
    mark = save_model(dest, plan.config, tree, dtype=dtype, about=about, modules=modules)
    return Converted(
        layout=plan.layout,
        tensors=len(source.tensors) - len(ignored),
        parameters=sum(x.size for x in params.values()),
        ignored=ignored,
        left_out=source.left_out,
        notes=plan.notes,
        fingerprint=mark,
        modules=modules,
    )


def export(checkpoint: str | os.PathLike, dest: str | os.PathLike) -> int:
    """Write a checkpoint with the original library's names, float32, and return the number of tensors.

    CLIP gets OpenAI's names (which open_clip reads too), behind `clip.` those of a CLIP inside another method; BERT gets
    those of `transformers.BertModel`, MagicLens those of its parameters with dots between the parts; the text encoder of
    stage I inside a `blip_rerank` stands behind `stage1.`. Batch norm's counts of training steps are no part of a model
    here, PyTorch begins them at 0; nor are `position_ids`.

    Raises:
      FileExistsError: something is at `dest`.
      ValueError: a `dest` that does not end in `.safetensors`, a method without an original.
    """
    files.refuse_existing(dest)
    if Path(dest).suffix != ".safetensors":
        raise ValueError(f"{dest}: expected a name that ends in .safetensors")
    from flax import traverse_util

    from cir_jax.conversion.rules import original
    from cir_jax.methods import method_name
    from cir_jax.model import load

    model = load(checkpoint)
    name = method_name(model.config)
    if name not in _modules():
        raise ValueError(
            f"{checkpoint} is a model of method {name}; only {', '.join(_modules())} have an original to go back to"
        )
    rules, notes = _modules()[name].original(model.config)
    params = traverse_util.flatten_dict(model.params, sep="/")
    tensors = list(original(params, rules))
    with files.write_atomically(dest) as part:
        write_safetensors(part, tensors, {"format": "pt", "cir_jax": model.fingerprint, **notes})
    return len(tensors)


def write_safetensors(path: Path, tensors, metadata: Mapping[str, str]) -> None:
    """Write float32 tensors, (name, shape, function that makes the array), holding one of them at a time."""
    import math

    import numpy as np

    header, at = {"__metadata__": dict(metadata)}, 0
    for name, shape, _ in tensors:
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _, _, make in tensors:
            file.write(np.ascontiguousarray(make(), "<f4"))


def print_summary(done: Converted, dest: str) -> None:
    """What was made of what, in a few lines."""
    print(f"{done.layout}: {done.tensors:,} tensors, {done.parameters:,} parameters in {dest}")
    for note in done.notes:
        print(note)
    for reason in dict.fromkeys(done.ignored.values()):
        names = [name for name, why in done.ignored.items() if why == reason]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print(f"ignored {printable(', '.join(names[:3]))}{more}: {reason}")
    for name, count in done.left_out.items():
        print(f"left out {printable(name)}: {count:,} tensors that are no part of the model")
    modules = ", ".join(f"{name} {mark}" for name, mark in done.modules.items())
    print(f"fingerprint {done.fingerprint} ({modules})")


def _split(paths: tuple[str, ...]) -> tuple[str, dict[str, str], str]:
    """(SOURCE, parts, DEST) of the positional arguments."""
    if len(paths) < 2:
        raise ValueError(f"expected SOURCE [part=SOURCE …] DEST, found {' '.join(paths)}")
    source, *between, dest = paths
    parts = {}
    for each in between:
        name, equals, path = each.partition("=")
        if not (equals and name.isidentifier() and path) or name in parts:
            raise ValueError(
                f"between SOURCE and DEST expected part=SOURCE, each part once; found {each}"
            )
        parts[name] = path
    return source, parts, dest


def main(argv: list[str] | None = None) -> None:
    """Convert or export as the command line says, and tell what was made of what."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m cir_jax.convert")
    source, parts, dest = _split(arguments.paths)
    if arguments.export:
        if parts or arguments.method:
            raise ValueError("--export takes CHECKPOINT DEST.safetensors and no --method")
        print(f"{export(source, dest):,} tensors with the original's names in {dest}")
        return
    done = convert(
        source,
        dest,
        arguments.method,
        variant=arguments.variant,
        tokenizer=arguments.tokenizer,
        activation=arguments.activation,
        group=arguments.group,
        resize_first=arguments.resize_first,
        dtype=arguments.dtype,
        parts=parts,
    )
    print_summary(done, dest)


if __name__ == "__main__":
    from cir_jax.commands import start

    start("convert")
