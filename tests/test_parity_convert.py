"""Converters against the libraries that wrote the files: random weights, the real command, features, lists and exports.

Needs the extra `[parity]`. Sizes are the published ones; the weights are random, with norms, biases and batch statistics
that are not those of a fresh model, so that nothing cancels.
"""

import jax
import numpy as np
import processes
import pytest
from flax import nnx
from reference import library

import cir_jax
from cir_jax.encoders.layers import unit

try:
    import torch
except ImportError:  # the tests are not selected then
    torch = None

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
ITEMS, SHOWN, TIE = 5000, 100, 5e-5
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def run(*arguments):
    done = processes.run("cir_jax.convert", *arguments)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def there_and_back(folder, method, fingerprint, *options):
    """`model` in a folder, exported and converted again, is the same, and its export the same bytes."""
    run("--export", "original", folder / "model", folder / "export.safetensors")
    assert fingerprint in run(
        folder / "export.safetensors", folder / "again", "--method", method, *options
    )
    run("--export", "original", folder / "again", folder / "second.safetensors")
    first, second = (folder / f"{each}.safetensors" for each in ("export", "second"))
    assert first.read_bytes() == second.read_bytes()


def libraries():
    return library("transformers"), library("open_clip")


def shaken(model, seed=0):
    """A model whose vectors (norms, biases, batch statistics) are random too."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if not x.is_floating_point() or not (x.ndim == 1 and len(x) > 1):
                continue
            if name.endswith("running_var"):
                x.mul_(0.5 + torch.rand(x.shape, generator=draw))
            elif ".bn" in name and name.endswith("weight"):  # some begin at 0
                x.copy_(1 + 0.1 * torch.randn(x.shape, generator=draw))
            else:
                x.add_(0.1 * torch.randn(x.shape, generator=draw))
    return model.eval()


def pictures(size, count=3):
    return np.random.default_rng(1).normal(size=(count, size, size, 3)).astype(np.float32)


def ids(count=4, length=77):
    """Rows of random words of different length between start and end."""
    draw, rows = np.random.default_rng(2), np.zeros((count, length), np.int32)
    for row in range(count):
        end = 5 + 17 * row
        rows[row, :end] = draw.integers(1, 49405, end)
        rows[row, 0], rows[row, end] = 49406, 49407
    return rows


def our_clip(folder, size):
    """Unit features of pictures and texts of a converted model."""
    model = cir_jax.load(folder)
    method = lambda part: jax.jit(lambda p, x: getattr(nnx.merge(model.graph, p), part)(x))
    images = method("item")(model.params, {"image": pictures(size)})
    texts = method("query")(model.params, {"text": ids()})
    return {"image": np.asarray(images), "text": np.asarray(texts)}


def their_open_clip(model, size):
    with torch.no_grad():
        images = model.encode_image(torch.from_numpy(pictures(size).transpose(0, 3, 1, 2).copy()))
        texts = model.encode_text(torch.from_numpy(ids()).long())
    return {"image": images.numpy(), "text": texts.numpy()}


def their_transformers(model, size):
    with torch.no_grad():
        pixels = torch.from_numpy(pictures(size).transpose(0, 3, 1, 2).copy())
        images = model.get_image_features(pixel_values=pixels).pooler_output
        texts = model.get_text_features(input_ids=torch.from_numpy(ids()).long()).pooler_output
    return {"image": images.numpy(), "text": texts.numpy()}


def compare(ours, theirs, capsys, name):
    """Unit vectors within the design's tolerance, and the same lists but for ties."""
    worst = 0.0
    for part, raw in theirs.items():
        reference = np.asarray(unit(jax.numpy.asarray(raw)))
        worst = max(worst, float(np.abs(ours[part] - reference).max()))
        assert np.abs(reference[0] - reference[1]).max() > 1e-3  # the inputs matter
        same_lists(ours[part], reference)
    with capsys.disabled():
        print(f"\n{name}: largest deviation {worst:.2e}")
    assert worst <= 1e-5 * max(1, max(np.abs(x).max() for x in ours.values()))


def same_lists(ours, reference):
    """The best of random items for each query: places may differ only between scores that hardly do."""
    noise = np.random.default_rng(3).normal(size=(ITEMS, reference.shape[1])).astype(np.float32)
    items = np.asarray(unit(jax.numpy.asarray(reference.mean(0) + 0.05 * noise)))
    for query, expected in zip(ours, reference):
        scores = items @ expected
        order = [np.argsort(-s, kind="stable")[:SHOWN] for s in (items @ query, scores)]
        assert np.abs(scores[order[0]] - scores[order[1]]).max() < TIE


# ---- transformers ----

HUGGING_FACE = {  # vision width, layers, heads, patch; text width, heads; embed
    "B/32": (768, 12, 12, 32, 512, 8, 512),
    "B/16": (768, 12, 12, 16, 512, 8, 512),
    "L/14": (1024, 24, 16, 14, 768, 12, 768),
}


def hugging_face(name, activation="quick_gelu"):
    transformers, _ = libraries()
    width, layers, heads, patch, words, word_heads, embed = HUGGING_FACE[name]
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    vision |= {"num_attention_heads": heads, "patch_size": patch, "hidden_act": activation}
    text = {"hidden_size": words, "intermediate_size": 4 * words, "hidden_act": activation}
    text |= {"num_attention_heads": word_heads, "projection_dim": embed}
    config = transformers.CLIPConfig(
        vision_config=vision | {"projection_dim": embed}, text_config=text, projection_dim=embed
    )
    # With the ids of the released configs, whose end token is the largest id.
    config.text_config.eos_token_id, config.text_config.bos_token_id = 49407, 49406
    torch.manual_seed(0)
    return shaken(transformers.CLIPModel(config))


@pytest.mark.parametrize("name", ["B/16", "L/14"])
def test_hugging_face(name, tmp_path, capsys):
    model = hugging_face(name)
    model.save_pretrained(tmp_path / "hf")
    theirs = their_transformers(model, 224)
    del model
    run(tmp_path / "hf", tmp_path / "ours", "--method", "clip")
    compare(our_clip(tmp_path / "ours", 224), theirs, capsys, f"transformers {name}")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hugging_face_in_every_kind_of_file(activation, tmp_path, capsys):
    model = hugging_face("B/32", activation)
    theirs = their_transformers(model, 224)
    model.save_pretrained(tmp_path / "one")
    if activation == "quick_gelu":
        model.save_pretrained(tmp_path / "shards", max_shard_size="200MB")
        assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
        (tmp_path / "bin").mkdir()
        torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
        model.config.save_pretrained(tmp_path / "bin")
    del model
    run(tmp_path / "one", tmp_path / "ours", "--method", "clip")
    compare(our_clip(tmp_path / "ours", 224), theirs, capsys, f"transformers B/32 {activation}")
    mark = cir_jax.load(tmp_path / "ours").fingerprint
    for kind in ("shards", "bin") if activation == "quick_gelu" else ():
        assert mark in run(tmp_path / kind, tmp_path / f"ours {kind}", "--method", "clip")


# ---- open_clip and OpenAI's layouts ----


def open_clip_model(name, **options):
    _, open_clip = libraries()
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None, **options)
    if name.startswith("RN"):
        # Batch statistics of pictures, or the features of a random ResNet would hardly depend on its input.
        for module in model.visual.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
                torch.nn.init.ones_(module.weight)
        model.train()
        with torch.no_grad():
            model.encode_image(torch.from_numpy(pictures(224).transpose(0, 3, 1, 2).copy()))
    return shaken(model)


def exported_equals(model, checkpoint, folder, theirs, size):
    """The export, read back by the original library, gives its very numbers again."""
    from safetensors.torch import load_file

    run("--export", "original", checkpoint, folder / "export.safetensors")
    with torch.no_grad():
        for x in model.state_dict().values():
            x.zero_()
    model.load_state_dict(load_file(folder / "export.safetensors"), strict=True)
    again = their_open_clip(model, size)
    assert all(np.array_equal(again[part], x) for part, x in theirs.items())


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "RN50"])
def test_open_clip_and_its_export(name, tmp_path, capsys):
    model = open_clip_model(name)
    theirs = their_open_clip(model, 224)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    said = ["--activation", "gelu"] if name == "RN50" else ["--variant", name]
    run(tmp_path / "weights.pt", tmp_path / "ours", "--method", "clip", *said)
    compare(our_clip(tmp_path / "ours", 224), theirs, capsys, f"open_clip {name}")
    exported_equals(model, tmp_path / "ours", tmp_path, theirs, 224)


SMALL = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}


def small(custom=False):
    _, open_clip = libraries()
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    torch.manual_seed(0)
    return shaken(kind(**SMALL))


@pytest.mark.parametrize("layout", ["custom_text", "training", "half", "legacy", "jit"])
def test_other_layouts(layout, tmp_path, capsys):
    model = small(custom=layout == "custom_text")
    said, path = ["--activation", "quick_gelu"], tmp_path / "weights.pt"
    state = model.state_dict()
    if layout == "training":
        state = {f"module.{name}": x for name, x in state.items()}
        optimizer = torch.optim.AdamW(model.parameters())
        state = {
            "epoch": 3,
            "name": "run",
            "state_dict": state,
            "optimizer": optimizer.state_dict(),
        }
    if layout == "half":  # what OpenAI's files hold in half precision (react.md 4.6)
        whole = ("ln_", "embedding", "logit_scale")
        for name, x in state.items():
            if not any(part in name for part in whole):
                x.copy_(x.half())
        state = {k: x if any(part in k for part in whole) else x.half() for k, x in state.items()}
    theirs = their_open_clip(model, 64)
    if layout == "jit":
        for name, value in (
            ("input_resolution", 64),
            ("context_length", 77),
            ("vocab_size", 49408),
        ):
            model.__dict__.pop(name, None)
            model.register_buffer(name, torch.tensor(value))
        inputs = torch.zeros(1, 3, 64, 64), torch.from_numpy(ids(1)).long()
        torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), path)
        said = []
    else:
        torch.save(state, path, _use_new_zipfile_serialization=layout != "legacy")
    out = run(path, tmp_path / "ours", "--method", "clip", *said)
    assert ("JIT" in out) == (layout == "jit")
    compare(our_clip(tmp_path / "ours", 64), theirs, capsys, f"open_clip, {layout}")


# ---- BERT ----


def test_bert_base_and_its_export(tmp_path, capsys):
    from safetensors.torch import load_file

    transformers, _ = libraries()
    torch.manual_seed(0)
    model = shaken(transformers.BertModel(transformers.BertConfig()))
    model.save_pretrained(tmp_path / "hf")
    words = [*WORDS, *(f"word{n}" for n in range(30522 - len(WORDS)))]
    (tmp_path / "hf" / "vocab.txt").write_text("\n".join(words) + "\n")
    run(tmp_path / "hf", tmp_path / "ours", "--method", "bert", "--variant", "mean")

    rows = ids(4, 64) % 30522
    mask = np.arange(64) < np.array([[5], [20], [40], [64]])

    def vectors(model):
        with torch.no_grad():
            inputs = torch.from_numpy(rows).long(), torch.from_numpy(mask).long()
            states = model(input_ids=inputs[0], attention_mask=inputs[1]).last_hidden_state
        return states.numpy()

    states = vectors(model)
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    ours = cir_jax.load(tmp_path / "ours")
    query = nnx.merge(ours.graph, ours.params).query({"text": rows, "text_mask": mask})
    compare({"text": np.asarray(query)}, {"text": mean}, capsys, "transformers BERT base")
    run("--export", "original", tmp_path / "ours", tmp_path / "export.safetensors")
    again = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False).eval()
    again.load_state_dict(load_file(tmp_path / "export.safetensors"), strict=True)
    np.testing.assert_array_equal(vectors(again), states)
