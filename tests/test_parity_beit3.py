"""BEiT-3 base and large against torchscale's multiway encoder, through the real command.

Full size but for the table of words, random weights. Needs `torchscale` beside the extra `[parity]`, as `.ci/run`
installs it.
"""

import jax
import numpy as np
import pytest
from flax import nnx
from golden_convert import save
from reference import library, photo
from test_parity_convert import compare, pictures, run, shaken, there_and_back

import cir_jax
from cir_jax.data.text import TextSpec, tokenizer, train_sentencepiece

try:
    import torch
except ImportError:  # the tests are not selected then
    torch = None

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
TEXTS = ["a red fox runs over the hill", "an old green boat lies in the harbour", "two foxes"]
SIZES = {  # width, layers, heads; tensors of a checkpoint for retrieval
    "base": (768, 12, 12, 494),
    "large": (1024, 24, 16, 974),
}


def torchscale(words: int, width: int, layers: int, heads: int):
    """The encoder that BEiT-3 builds of torchscale (cfir.md 2.1)."""
    library("torchscale")
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    shape = {"encoder_embed_dim": width, "encoder_ffn_embed_dim": 4 * width}
    shape |= {"encoder_layers": layers, "encoder_attention_heads": heads}
    torch.manual_seed(0)
    return BEiT3(EncoderConfig(multiway=True, no_output_layer=True, vocab_size=words, **shape))


def rows(words: int, length: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Random ids of three texts of different length, and their mask."""
    ids = np.random.default_rng(2).integers(4, words, (3, length)).astype(np.int32)
    mask = np.arange(length) < np.array([[length], [11], [5]])
    return np.where(mask, ids, 1), mask


def their_features(model, heads, ids, mask):
    with torch.no_grad():
        seen = torch.from_numpy(pictures(224).transpose(0, 3, 1, 2).copy())
        read = torch.from_numpy(ids).long(), torch.from_numpy(~mask)
        images = model(visual_tokens=seen)["encoder_out"]
        texts = model(textual_tokens=read[0], text_padding_position=read[1])["encoder_out"]
        return {
            "image": heads["vision_head.weight"](images[:, 0]).numpy(),
            "text": heads["language_head.weight"](texts[:, 0]).numpy(),
        }


@pytest.mark.parametrize("size", SIZES)
def test_beit3(size, tmp_path, capsys):
    width, layers, attention, count = SIZES[size]
    vocabulary = tmp_path / "words.spm"
    train_sentencepiece(TEXTS, 40, vocabulary)
    words = tokenizer(TextSpec("sentencepiece", str(vocabulary))).size
    ids, mask = rows(words)
    model = shaken(torchscale(words, width, layers, attention))
    names = ("vision_head.weight", "language_head.weight")
    heads = {name: torch.nn.Linear(width, width, bias=False) for name in names}
    theirs = their_features(model, heads, ids, mask)
    tensors = {f"beit3.{name}": x.numpy() for name, x in model.state_dict().items()}
    tensors |= {name: head.weight.detach().numpy() for name, head in heads.items()}
    tensors["logit_scale"] = np.float32(2.5)
    assert len(tensors) == count
    source = save(tmp_path / "beit3.safetensors", tensors)
    del model, tensors
    run(source, tmp_path / "model", "--method", "cfir", "--tokenizer", vocabulary)
    source.unlink()

    ours = cir_jax.load(tmp_path / "model")
    method = lambda part: jax.jit(lambda p, x: getattr(nnx.merge(ours.graph, p), part)(x))
    found = {
        "image": np.asarray(method("item")(ours.params, {"image": pictures(224)})),
        "text": np.asarray(method("query")(ours.params, {"text": ids, "text_mask": mask})),
    }
    compare(found, theirs, capsys, f"torchscale, BEiT-3 {size}")
    vectors = ours.encode("item", [{"image": photo()}]), ours.encode("query", TEXTS)
    np.testing.assert_allclose([np.linalg.norm(x, axis=1)[0] for x in vectors], 1, atol=1e-5)
    there_and_back(tmp_path, "cfir", ours.fingerprint, "--tokenizer", vocabulary)
