"""The pseudo-words of many pictures, found one by one: what SEARLE's mapping network learns from (`cir_jax.data.searle`)."""

import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cir_jax.checkpoint import abstract_params
from cir_jax.data.records import Gallery
from cir_jax.methods.clip import ClipConfig
from cir_jax.methods.inversion import SearleConfig
from cir_jax.methods.oti import invert
from cir_jax.model import Model
from cir_jax.vectors import VectorWriter


def write_words(
    clip: Model,
    gallery: Gallery,
    dest: str | os.PathLike,
    phrases: Callable[[str], Sequence[tuple[str, str]]] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 32,
    shard_size: int = 1024,
    **options,
) -> None:
    """Write the pseudo-words of pictures as vectors with their ids; begun again, it goes on behind the last shard.

    Args:
      clip: a `clip`; pictures are read with SEARLE's transform instead of its own.
      gallery: the pictures.
      dest: the folder to write.
      phrases: from the id of a picture to its phrases, as `invert` takes them.
      seed, batch_size, shard_size: of the random numbers, of what is computed and of what is written at once.
      options: of `invert`.

    Raises:
      ValueError: another model, a picture that cannot be read or has no phrases.
    """
    model = with_searle(clip)
    method = nnx.merge(model.graph, model.params)
    given = {"checkpoint": clip.name, "gallery": gallery.locator}
    with VectorWriter(dest, fingerprint=clip.fingerprint, **given) as writer:
        for first in range(writer.rows, len(gallery), shard_size):
            rows, found = range(first, min(first + shard_size, len(gallery))), []
            features = jnp.asarray(model.encode("item", [gallery[row] for row in rows]))
            for start in rows[::batch_size]:
                some = rows[start - first :][:batch_size]
                said = phrases and [phrases(gallery.ids[row]) for row in some]
                key = jax.random.fold_in(jax.random.key(seed), start)
                these = features[start - first :][:batch_size]
                found.append(np.asarray(invert(method, these, key, said, **options)))
            writer.add(np.concatenate(found), [gallery.ids[row] for row in rows])
        writer.finish()


def with_searle(clip: Model) -> Model:
    """A SEARLE around a CLIP, for all that does without its mapping network, whose parameters are zero.

    ValueError: a model of another method.
    """
    if type(clip.config) is not ClipConfig:
        raise ValueError(f"{clip.name or 'this model'} is no clip; SEARLE's words are of one")
    theirs = {each.name: getattr(clip.config, each.name) for each in fields(ClipConfig)}
    inputs = theirs["inputs"]
    image = replace(inputs.image, resize="targetpad", short=None, convert_first=False)
    theirs["inputs"] = replace(inputs, image=image)
    config = SearleConfig(**theirs, first_star_only=True)
    graph, shapes = abstract_params(config)
    mapper = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["mapper"])
    return Model(config, graph, {"clip": clip.params, "mapper": mapper}, name=clip.name)
