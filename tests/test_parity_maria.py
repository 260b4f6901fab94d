"""Maria and Vokenization against torchvision's ResNeXt-101 and BERT of `transformers`, through the real command.

Full size, random weights. Needs the extra `[parity]`.
"""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from golden_convert import save
from reference import library, photo
from test_parity_convert import run, shaken, there_and_back

import cir_jax

try:
    import torch
except ImportError:  # the tests are not selected then
    torch = None

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(30522 - 5))]
TEXTS = ["w1 w20 w300 w4000", "w7", "w5 w6 w7 w8 w9 w10 w11"]


def close(found, expected):
    """The design's tolerance of float32."""
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


def head(sizes, token):
    """(function, tensors by the names of one of the two repositories) of linear layers with ReLU between them."""
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    names = ("mlp.0", "mlp.3") if token else [f"mlp.linears.{n}" for n in range(len(layers))]

    def called(x):
        for n, layer in enumerate(layers):
            x = layer(x if n == 0 else torch.relu(x))
        return x / x.norm(2, dim=-1, keepdim=True)

    named = zip(names, layers)
    return called, {f"{n}.{p}": x for n, layer in named for p, x in layer.state_dict().items()}


@pytest.fixture(scope="module")
def towers():
    """torchvision's ResNeXt-101 without its classes, and BERT base."""
    transformers, torchvision = library("transformers"), library("torchvision")
    torch.manual_seed(0)
    resnext = torchvision.models.resnext101_32x8d(weights=None)
    resnext.fc = torch.nn.Identity()
    bert = transformers.BertModel(transformers.BertConfig())
    return shaken(resnext).eval(), shaken(bert).eval()


@pytest.mark.parametrize("token", [False, True], ids=["maria", "vokenization"])
def test_a_whole_model_equals_its_parts_in_pytorch(token, towers, tmp_path):
    resnext, bert = towers
    sizes = (256, 64) if token else (1024, 1024, 512)
    (text_head, text), (image_head, image) = (head((n, *sizes), token) for n in (3072, 2048))
    parts = {
        "lang_model.backbone.": bert.state_dict(),
        "lang_model.": text,
        "visn_model.backbone.": resnext.state_dict(),
        "visn_model.": image,
    }
    tensors = {
        f"module.{prefix}{name}": x.detach().numpy()
        for prefix, part in parts.items()
        for name, x in part.items()
    }
    counters = sum(name.endswith("num_batches_tracked") for name in tensors)
    assert len(tensors) - counters in ((731, 732) if not token else (727, 728))
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n")
    source = save(tmp_path / "best.safetensors", tensors)
    run(source, tmp_path / "model", "--method", "maria", "--tokenizer", vocabulary)
    source.unlink()
    model = cir_jax.load(tmp_path / "model")
    images = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    ids = [[2, *(5 + int(word[1:]) for word in text.split()), 3] for text in TEXTS]
    length = max(map(len, ids))
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    ids = np.array([row + [0] * (length - len(row)) for row in ids])
    with torch.no_grad():
        features = resnext(torch.tensor(images))
        states = bert(torch.tensor(ids), torch.tensor(mask), output_hidden_states=True)
        states = torch.cat(states.hidden_states[-4:], -1)
        pictures, words = image_head(features).numpy(), text_head(states).numpy()

    @jax.jit
    def computed(params, images, ids, mask):
        method = nnx.merge(model.graph, params)
        return (
            method.resnext(images),
            method.bert.last_states(ids, mask, 4),
            method.item({"image": images}),
            method.texts({"text": ids, "text_mask": mask}),
        )

    found = computed(model.params, images.transpose(0, 2, 3, 1), ids, mask > 0)
    close(found[0], features.numpy())
    close(np.asarray(found[1])[mask > 0], states.numpy()[mask > 0])
    close(found[2], pictures)
    close(
        np.asarray(found[3])[mask[:, : found[3].shape[1]] > 0],
        words[mask > 0] if token else words[:, 0],
    )
    vectors = model.encode("query", TEXTS)
    if token:
        asking = vectors[1]
        np.testing.assert_array_equal(asking.sum(axis=1), mask.sum(axis=1) - 2)
        close(vectors[0][asking][: len(TEXTS[0].split())], words[0, 1:5])
    else:
        close(vectors, words[:, 0])
    np.testing.assert_allclose(
        np.linalg.norm(model.encode("item", [{"image": photo()}]), axis=1), 1, atol=1e-5
    )
    there_and_back(tmp_path, "maria", model.fingerprint, "--tokenizer", vocabulary)
