"""BLIP against `transformers`, and Candidate-Reranking's files at full size, through the real command.

Random weights. Needs the extra `[parity]`.
"""

import shutil

import golden_blip as golden
import jax
import numpy as np
import pytest
from flax import nnx
from reference import library, photo
from test_parity_convert import run, shaken
from test_parity_maria import close

import cir_jax
from cir_jax.encoders.bert import BLIP_BASE, BertConfig
from cir_jax.encoders.vit import VIT_B16_384, VitConfig, resize_positions
from cir_jax.retrieval import score_candidates

try:
    import torch
except ImportError:  # the tests are not selected then
    torch = None

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TINY = (
    VitConfig(size=64, patch=16, width=192, layers=3, heads=3),
    BertConfig(
        vocabulary=40, length=20, width=128, layers=2, heads=2, hidden=64, types=0, image_width=192
    ),
)
BASE = (VIT_B16_384, BLIP_BASE)
LARGE = (
    VitConfig(384, 16, 1024, 24, 16),
    BertConfig(vocabulary=30524, types=0, image_width=1024),
)
SIZES = {"tiny": TINY, "B/16": BASE, "L/16": LARGE}


def vocabulary(folder, text):
    path = folder / "vocab.txt"
    words = [*SPECIAL, *(f"w{n}" for n in range(text.vocabulary - 2 - len(SPECIAL)))]
    path.write_text("\n".join(words) + "\n")
    return path


def hugging_face(image, text, embed):
    """With the numbers of heads and the epsilon that BLIP's weights have."""
    transformers = library("transformers")
    config = transformers.BlipConfig(
        vision_config={
            "hidden_size": image.width,
            "intermediate_size": 4 * image.width,
            "num_hidden_layers": image.layers,
            "num_attention_heads": image.heads,
            "image_size": image.size,
            "patch_size": image.patch,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "hidden_size": text.width,
            "encoder_hidden_size": image.width,
            "intermediate_size": text.hidden,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "vocab_size": text.vocabulary,
            "max_position_embeddings": text.length,
        },
        image_text_hidden_size=embed,
    )
    torch.manual_seed(0)
    model = shaken(transformers.BlipForImageTextRetrieval(config))
    with torch.no_grad():  # its own start is nearly zero, and then pictures hardly matter
        model.vision_model.embeddings.position_embedding.normal_(std=0.5)
        for name, x in model.named_parameters():
            if name.startswith("text_encoder") and x.ndim == 2:
                x.mul_(2)
    return model


def asked(text, rows=3):
    """Ids as BLIP's own code makes them, [ENC] in front, and their mask."""
    draw, ids = np.random.default_rng(0), np.zeros((rows, 16), np.int32)
    for row in range(rows):
        end = 5 + 5 * row
        ids[row, :end] = draw.integers(5, text.vocabulary - 2, end)
        ids[row, 0], ids[row, end] = 2, 3
    mask = np.arange(16) < np.array([[6 + 5 * row] for row in range(rows)])
    return ids, mask


def theirs(model, images, ids, mask, text):
    ids = ids.copy()
    plain = torch.from_numpy(ids).long()
    ids[:, 0] = text.vocabulary - 1
    fused = torch.from_numpy(ids).long()
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    mask = torch.from_numpy(mask).long()
    with torch.no_grad():
        found = model(fused, pixels, attention_mask=mask)
        tokens = found.last_hidden_state
        alone = model.text_encoder(input_ids=plain, attention_mask=mask).last_hidden_state
        vectors = torch.nn.functional.normalize(model.vision_proj(tokens[:, 0]), dim=-1)
        words = torch.nn.functional.normalize(model.text_proj(alone[:, 0]), dim=-1)
        both = found.question_embeds
        asks = torch.nn.functional.normalize(model.text_proj(both[:, 0]), dim=-1)
    parts = (tokens, both, alone, found.itm_score, vectors, words, asks)
    return [x.numpy() for x in parts]


@pytest.mark.parametrize("size", ["tiny", "B/16", "L/16"])
def test_hugging_face(size, tmp_path, capsys):
    image, text = SIZES[size]
    model = hugging_face(image, text, 256 if size != "tiny" else 16)
    images = np.random.default_rng(1).normal(size=(3, image.size, image.size, 3)).astype(np.float32)
    if size == "L/16":
        images = images[:2]
    ids, mask = asked(text, len(images))
    expected = theirs(model, images, ids, mask, text)
    tokens, both, alone, logits, vectors, words, asks = expected
    model.save_pretrained(tmp_path / "hf")
    del model
    vocabulary(tmp_path / "hf", text)
    # The published configs say 8 heads and 1e-5 here and there.
    config = (tmp_path / "hf" / "config.json").read_text()
    changed = config.replace('"layer_norm_eps": 1e-06', '"layer_norm_eps": 1e-05')
    (tmp_path / "hf" / "config.json").write_text(changed)
    assert changed != config
    told = run(tmp_path / "hf", tmp_path / "itm", "--method", "blip_itm")
    assert (
        "config.json is not followed in vision_config.layer_norm_eps 1e-05 (BLIP has 1e-06)" in told
    )
    ours = cir_jax.load(tmp_path / "itm")
    assert (ours.config.image, ours.config.text) == (image, text)

    @jax.jit
    def matched(params, images, ids, mask):
        method = nnx.merge(ours.graph, params)
        seen = method.image(images)
        fused = ids.at[:, 0].set(text.vocabulary - 1)
        query = method.query({"text": ids, "text_mask": mask})
        scores = method.score_all(query, method.item({"image": images}))
        return seen, method.text(fused, mask, seen), method.text(ids, mask), scores

    found = matched(ours.params, images, jax.numpy.asarray(ids), mask)
    worst = largest(found[0], tokens)
    worst = max(worst, largest(np.asarray(found[1])[mask], both[mask]))
    worst = max(worst, largest(np.asarray(found[2])[mask], alone[mask]))
    odds = logits[:, 1] - logits[:, 0]
    worst = max(worst, largest(np.diag(found[3]), odds))
    assert np.abs(both[0, 0] - both[1, 0]).max() > 1e-2 and np.ptp(odds) > 1e-3
    del ours, found
    run(tmp_path / "hf", tmp_path / "cir", "--method", "blip_cir")
    ours = cir_jax.load(tmp_path / "cir")

    @jax.jit
    def compared(params, images, ids, mask):
        method = nnx.merge(ours.graph, params)
        asked = {"text": ids, "text_mask": mask}
        item = method.item({"image": images})
        return item, method.query(asked), method.query(asked | {"image": images})

    for x, y in zip(compared(ours.params, images, ids, mask), (vectors, words, asks)):
        worst = max(worst, largest(x, y))
    with capsys.disabled():
        print(f"\ntransformers BLIP {size}: largest relative deviation {worst:.2e}")


def largest(found, expected):
    """The largest deviation, in the design's measure; it must be within its tolerance."""
    close(found, expected)
    return float(np.abs(found - expected).max() / max(1, np.abs(expected).max()))


@pytest.mark.parametrize(("side", "grid"), [(14, 24), (24, 14), (3, 5), (14, 30)])
def test_positions_of_another_grid(side, grid, capsys):
    table = np.random.default_rng(0).standard_normal((1 + side**2, 8)).astype(np.float32)
    square = torch.from_numpy(table[1:].reshape(1, side, side, 8)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(square, (grid, grid), mode="bicubic")
    resized = resized.permute(0, 2, 3, 1).reshape(-1, 8).numpy()
    found = resize_positions(table, grid)
    np.testing.assert_array_equal(found[0], table[0])
    with capsys.disabled():
        print(f"\npositions {side} to {grid}: {largest(found[1:], resized):.2e}")


# ---- Candidate-Reranking ----


def drawn(shapes, seed):
    rng = np.random.default_rng(seed)

    def made(name, shape):
        x = rng.standard_normal(shape, np.float32)
        if "norm" in name.lower() and name.endswith("weight"):
            return 1 + 0.1 * x
        return np.float32(0.1) if name == "temp" else np.float32(0.03) * x

    return {name: made(name, shape) for name, shape in shapes.items()}


def checkpoint(path, key, tensors):
    """As the original saves: with the state of an optimizer."""
    position_ids = {"text_encoder.embeddings.position_ids": torch.arange(512)[None]}
    state = {n: torch.from_numpy(np.asarray(x)) for n, x in tensors.items()} | position_ids
    moment = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}
    optimizer = {"state": {0: moment}, "param_groups": [{"params": [0]}]}
    torch.save({"epoch": 3, "optimizer_state_dict": optimizer, key: state}, path)
    return path


def test_both_stages_at_full_size(tmp_path, capsys):
    text = "w1 w20 w300 instead of w4000"
    words = vocabulary(tmp_path, BLIP_BASE)
    tensors = drawn(golden.stage1_shapes(VIT_B16_384, BLIP_BASE, 256), 0)
    one = checkpoint(tmp_path / "blip.pt", "BLIP_Retrieval", tensors)
    told = run(one, tmp_path / "stage1", "--method", "blip_cir", "--tokenizer", words)
    assert "Candidate-Reranking, stage I: 471 tensors, 223,742,721 parameters" in told
    assert "left out optimizer_state_dict: 2 tensors" in told
    model = cir_jax.load(tmp_path / "stage1")
    assert float(model.params["temperature"]) == np.float32(0.1)
    vectors = model.encode(
        "query", [{"image": photo(), "text": text}, {"text": text}, {"image": photo()}]
    )
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    del model
    comes_back(tmp_path, "stage1", "blip_cir", told, words, 471)
    both = {n: x for n, x in tensors.items() if n.startswith("visual_encoder.")}
    del tensors
    tensors = drawn(golden.stage2_shapes(VIT_B16_384, BLIP_BASE), 1) | both
    del both
    two = checkpoint(tmp_path / "blip2.pt", "BLIP_NLVR", tensors)
    del tensors
    said = ("--method", "blip_rerank", "--tokenizer", words)
    told = run(two, f"stage1={one}", tmp_path / "stage2", *said)
    assert "Candidate-Reranking, stage II: 1,038 tensors, 425,6" in told
    one.unlink(), two.unlink()
    model, items = cir_jax.load(tmp_path / "stage2"), [photo(), picture(0), picture(1)]
    pictures = lambda rows: [{"image": items[row]} for row in rows]
    scores = score_candidates(
        model, [{"image": photo(), "text": text}], pictures, np.arange(3)[None]
    )
    assert np.isfinite(scores).all() and np.ptp(scores) > 1e-4
    del model
    comes_back(tmp_path, "stage2", "blip_rerank", told, words, 722 + 316)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (50, 80, 3)).astype(np.uint8)


def comes_back(folder, name, method, told, words, count):
    """The export, converted again, has the same fingerprint; the folders are removed."""
    out = folder / "export.safetensors"
    assert f"{count:,} tensors" in run("--export", "original", folder / name, out)
    again = run(out, folder / "again", "--method", method, "--tokenizer", words)
    assert again.splitlines()[-1] == told.splitlines()[-1]
    out.unlink()
    for each in (name, "again"):
        shutil.rmtree(folder / each)
