"""BLIP and Candidate-Reranking converted: names and counts of the published files, golden numbers through a file."""

import dataclasses
import json
import math
import shutil

import golden_blip as golden
import jax
import ml_dtypes
import numpy as np
import pytest
from golden_convert import save
from safetensors.numpy import load_file, save_file
from test_blip import (
    COSINES,
    DOUBLED_SCORES,
    SCORES,
    close,
    quick,
    stage2_queries,
)

import cir_jax
from cir_jax.checkpoint import abstract_params, initial_params
from cir_jax.conversion import blip as table
from cir_jax.conversion.rules import Options
from cir_jax.conversion.sources import Source, Tensors
from cir_jax.convert import convert, export
from cir_jax.encoders.bert import BLIP_BASE, BertConfig
from cir_jax.encoders.blip import with_encode_token
from cir_jax.encoders.vit import (
    VIT_B16_224,
    VIT_B16_384,
    VitConfig,
    bicubic_weights,
    resize_positions,
)
from cir_jax.methods.blip_cir import BlipCir, BlipCirConfig
from cir_jax.methods.blip_rerank import BlipRerank, BlipRerankConfig, start_from_stage1

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
IDS = {"text_encoder.embeddings.position_ids": (1, 20)}
# Twelve layers as in the published files, and small in everything else.
IMAGE = VitConfig(size=8, patch=4, width=64, heads=1)
WORDS = BertConfig(vocabulary=15, length=20, width=64, heads=1, hidden=8, types=0, image_width=64)
MATCH = golden.linears({"itm_head": (2, 64)})


def behind(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


def stage1_shapes():
    return golden.stage1_shapes(IMAGE, WORDS) | IDS


def stage2_shapes():
    return golden.stage2_shapes(IMAGE, WORDS) | IDS


def trained_shapes():
    """What BLIP's own training adds to every file: the copies with momentum."""
    parts = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.")
    shapes = stage1_shapes()
    copies = {
        name.replace(".", "_m.", 1): shape
        for name, shape in shapes.items()
        if name.startswith(parts)
    }
    return shapes | MATCH | copies | {"image_queue": (16, 30), "text_queue": (16, 30)}


def pretrained_shapes():
    shapes = trained_shapes() | {"queue_ptr": (1,)}
    encoder = {n: s for n, s in stage1_shapes().items() if n.startswith("text_encoder.")}
    shapes |= {f"text_decoder.bert.{n.partition('.')[2]}": s for n, s in encoder.items()}
    head = {"decoder.weight": (15, 64), "decoder.bias": (15,), "bias": (15,)}
    head |= golden.linears({"transform.dense": (64, 64), "transform.LayerNorm": (64,)})
    return shapes | behind("text_decoder.cls.predictions.", head)


def retrieval_shapes():
    return trained_shapes() | {"idx_queue": (1, 30), "ptr_queue": (1,)}


def matching_shapes():
    """What BLIP's class for matching needs: no temperature."""
    shapes = golden.stage1_shapes(IMAGE, WORDS) | IDS | MATCH
    del shapes["temp"]
    return shapes


def hugging_face_shapes():
    return {table._their_name(name): s for name, s in matching_shapes().items() if name not in IDS}


FILES = {
    "stage1": (stage1_shapes, 472),
    "stage2": (stage2_shapes, 723),
    "pretrained": (pretrained_shapes, 1272),
    "retrieval": (retrieval_shapes, 949),
    "matching": (matching_shapes, 473),
    "hugging_face": (hugging_face_shapes, 472),
}


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    whole = ("position_ids", "_ptr", "ptr_queue", "idx_queue")
    return {
        name: np.zeros(shape, np.int64)
        if name.endswith(whole)
        else np.asarray(0.1 * rng.standard_normal(shape), np.float32)
        for name, shape in shapes.items()
    }


def vocabulary(folder, count=13):
    folder.mkdir(exist_ok=True)
    words = [*SPECIAL, *(f"w{n}" for n in range(count - len(SPECIAL)))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder / "vocab.txt"


@pytest.fixture
def source(tmp_path):
    """A function that writes one of `FILES` and gives its path and its tensors."""

    def made(kind, seed=0, **changes):
        tensors = drawn(FILES[kind][0](), seed) | changes
        return save(tmp_path / f"{kind}.safetensors", tensors), tensors

    return made


@pytest.fixture
def words(tmp_path):
    return vocabulary(tmp_path / "words")


def flat(folder):
    from flax import traverse_util

    return traverse_util.flatten_dict(cir_jax.load(folder).params, sep="/")


# ---- names and counts ----


@pytest.mark.parametrize(
    ("kind", "method", "taken", "fresh"),
    [
        ("stage1", "blip_cir", 471, 0),
        ("pretrained", "blip_cir", 471, 0),
        ("retrieval", "blip_cir", 471, 0),
        ("matching", "blip_cir", 470, 1),
        ("hugging_face", "blip_cir", 470, 1),
        ("retrieval", "blip_itm", 473, 0),
        ("pretrained", "blip_itm", 473, 0),
        ("matching", "blip_itm", 472, 1),
        ("hugging_face", "blip_itm", 472, 1),
        ("stage1", "blip_rerank", 466, 6),
    ],
)
def test_every_tensor_is_taken_or_left_for_a_reason(
    kind, method, taken, fresh, source, words, tmp_path
):
    path, tensors = source(kind)
    assert len(tensors) == FILES[kind][1]
    done = convert(path, tmp_path / "model", method, tokenizer=words)
    assert done.tensors == taken and len(done.ignored) == len(tensors) - taken
    assert all(done.ignored.values())
    config = cir_jax.load(tmp_path / "model").config
    assert (config.image, config.text) == (IMAGE, WORDS)
    theirs = kind == "stage1" or method == "blip_rerank"
    assert config.inputs.image.resize == ("targetpad" if theirs else "squash")
    assert config.inputs.image.convert_first == (not theirs)
    assert (config.inputs.image.size, config.inputs.text.length) == (8, 20)
    random = [note for note in done.notes if "begin at random" in note]
    default = [note for note in done.notes if "begins at 0.07" in note]
    assert (len(random), len(default)) == (fresh == 6, fresh == 1)
    assert all(note.startswith("16 tensors") for note in random)
    if fresh == 1:
        assert cir_jax.load(tmp_path / "model").params["temperature"] == np.float32(0.07)


@dataclasses.dataclass
class Named:
    """Names and shapes where nobody reads numbers."""

    shape: tuple[int, ...]


@pytest.mark.parametrize(
    ("image", "published"),
    [
        (VIT_B16_224, 384),
        (VIT_B16_384, None),
        (VitConfig(384, 16, 1024, 24, 16), None),
        (VitConfig(224, 16, 1024, 24, 16), 384),
    ],
    ids=["B/16-224", "B/16-384", "L/16-384", "L/16-224"],
)
def test_sizes_of_the_published_models(image, published, tmp_path):
    text = dataclasses.replace(BLIP_BASE, image_width=image.width)
    shapes = golden.stage1_shapes(image, text, 256)
    source = Source(Tensors({n: Named(s) for n, s in shapes.items()}), None, {}, "", {})
    options = Options("blip_cir", str(published or "") or None)
    options = dataclasses.replace(options, tokenizer=vocabulary(tmp_path, 30522))
    plan = table.plan({"": source}, options)
    assert plan.config.image == dataclasses.replace(image, size=384)
    assert plan.config.text == text and plan.config.embed == 256
    assert plan.config.inputs.text.length == 512
    places = sized(plan.config)
    taken = {n: r.source_shape(places) for r in plan.rules for n in r.names(places)}
    assert taken == shapes
    assert any("resized" in note for note in plan.notes) == (published is not None)
    if image == VIT_B16_384:
        numbers = sum(map(math.prod, shapes.values()))
        assert (len(shapes), numbers) == (471, 223_743_233 - 512)
        assert plan.config == BlipCirConfig(inputs=plan.config.inputs)
        stage2 = golden.stage2_shapes(image, text)
        assert (len(stage2), sum(map(math.prod, stage2.values()))) == (722, 288_347_650 - 512)
        rerank = BlipRerankConfig(inputs=plan.config.inputs)
        places = sized(rerank)
        rules, _ = table.original(rerank)
        taken = {n: r.source_shape(places) for r in rules for n in r.names(places)}
        own = {n: s for n, s in shapes.items() if n.startswith("text_encoder.")}
        assert taken == stage2 | behind("stage1.", own)


def sized(config):
    from flax import traverse_util

    found = traverse_util.flatten_dict(abstract_params(config)[1], sep="/")
    return {name: tuple(x.shape) for name, x in found.items()}


# ---- the numbers ----


@pytest.fixture
def golden_files(tmp_path):
    """Both stages by formula, with the notes of an export: shapes do not tell heads that are 8 wide.

    The golden stages read pictures by different numbers, which those of one BLIP do not; here stage I has stage II's
    if it is `shared`.
    """
    one, two = golden.stage1_tensors(), golden.stage2_tensors()
    shared = one | {name: x for name, x in two.items() if name.startswith("visual_encoder.")}
    notes = table.original(BlipCirConfig(golden.IMAGE, golden.TEXT, inputs=golden.INPUTS))[1]
    notes |= {"cir_jax": "0" * 16, "text_length": "20"}
    for name, tensors in {"one": one, "two": two, "shared": shared}.items():
        whole = tensors | {"text_encoder.embeddings.position_ids": np.arange(20)[None]}
        whole = {name: np.ascontiguousarray(x) for name, x in whole.items()}
        save_file(whole, tmp_path / f"{name}.safetensors", notes)
    options = {"tokenizer": vocabulary(tmp_path / "golden", 58)}

    def converted(name, method, **more):
        more |= options
        return convert(tmp_path / f"{name}.safetensors", tmp_path / "model", method, **more)

    return tmp_path, converted


def module(kind, folder, params=None):
    model = cir_jax.load(folder)
    return golden.module(kind, model.config, params or model.params, np.float32)


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_stage1_through_a_file_gives_the_golden_numbers(golden_files):
    folder, converted = golden_files
    done = converted("one", "blip_cir")
    assert (done.tensors, done.parameters, len(done.ignored)) == (259, 151_265, 1)
    equal(cir_jax.load(folder / "model").params, golden.stage1_params(golden.stage1_tensors()))
    query, items = golden.query(np.float32), {"image": golden.candidates(np.float32)}
    run = quick(lambda m: m.query(query) @ m.item(items).T)
    close(run(module(BlipCir, folder / "model")), COSINES)


def scores(model):
    """Of the golden queries, whose fused state comes from stage I with its own picture encoder."""
    query, items = golden.query(np.float32), {"image": golden.candidates(np.float32)}
    ids = with_encode_token(query["text"], golden.TEXT)

    @quick
    def scored(first, model):
        fused = first.text(ids, query["text_mask"], first.image(query["image"]))
        return model.score_all(stage2_queries(model, fused), model.item(items))

    return scored(golden.stage1(np.float32), model)


# Scores take long to compile, and follow from equal parameters and tests/test_blip.py.
SCORED = pytest.mark.parametrize(
    "scored", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["parameters", "scores"]
)


@SCORED
def test_stage2_through_two_files_gives_the_golden_numbers(scored, golden_files):
    folder, converted = golden_files
    done = converted("two", "blip_rerank", parts={"stage1": str(folder / "shared.safetensors")})
    assert done.tensors == 422 + 212 and done.layout == "Candidate-Reranking, stage II"
    fusion = golden.stage1_params(golden.stage1_tensors())["text"]
    equal(
        cir_jax.load(folder / "model").params, golden.stage2_params(golden.stage2_tensors(), fusion)
    )
    if scored:
        close(scores(module(BlipRerank, folder / "model")), SCORES)


@SCORED
def test_stage2_from_stage1_gives_the_golden_numbers(scored, golden_files):
    folder, converted = golden_files
    done = converted("one", "blip_rerank")
    assert done.tensors == 42 + 212
    assert done.notes[0].startswith("8 tensors that no BLIP has begin at random")
    params = cir_jax.load(folder / "model").params
    given = golden.stage2_params(golden.stage2_tensors(), None)
    params["head"] = given["head"]
    params["text"]["blocks"]["linear"]["merge"] = given["text"]["blocks"]["linear"]["merge"]
    equal(params, start_from_stage1(given, golden.stage1_params(golden.stage1_tensors())))
    if scored:
        close(scores(module(BlipRerank, folder / "model", params)), DOUBLED_SCORES)


def test_stages_with_different_picture_encoders_are_refused(golden_files):
    folder, converted = golden_files
    with pytest.raises(ValueError, match=r"42 of its 42 tensors are not there or differ, such as"):
        converted("two", "blip_rerank", parts={"stage1": str(folder / "one.safetensors")})
    with pytest.raises(ValueError, match="does not hold the text encoder of stage I"):
        converted("two", "blip_rerank")
    with pytest.raises(ValueError, match="this is a stage II of Candidate-Reranking, no blip_cir"):
        converted("two", "blip_cir")
    with pytest.raises(ValueError, match=r"perhaps with stage1=SOURCE; found stage3 besides"):
        converted("two", "blip_rerank", parts={"stage3": "x"})
    with pytest.raises(ValueError, match="blip_cir is made of one source; found stage1 besides"):
        converted("one", "blip_cir", parts={"stage1": "x"})
    assert not (folder / "model").exists()


def test_what_no_blip_has_begins_as_in_a_new_model_and_alike_each_time(source, words, tmp_path):
    path, tensors = source("stage1")
    convert(path, tmp_path / "model", "blip_rerank", tokenizer=words)
    params, config = flat(tmp_path / "model"), cir_jax.load(tmp_path / "model").config
    names = [f"{part}/{leaf}" for part in PARTS_WITHOUT_START for leaf in ("kernel", "bias")]
    for name, x in initial_params(config, names).items():
        np.testing.assert_array_equal(params[name], x)
    merge = params["text/blocks/linear/merge/kernel"]
    assert merge.shape == (6, 128, 64) and 0.9 < merge.std() / (0.02 * 12**0.5) < 1.1
    # Everything else is stage I's, both branches alike.
    query = tensors["text_encoder.encoder.layer.7.attention.self.query.weight"].T
    for branch in ("fused", "text"):
        found = params[f"text/blocks/linear/{branch}/attention/query/kernel"][1]
        np.testing.assert_array_equal(found, query)
    np.testing.assert_array_equal(params["fusion/blocks/branch/attention/query/kernel"][7], query)


PARTS_WITHOUT_START = ("head/up", "head/down", "text/blocks/linear/merge")


def test_hugging_face_is_the_original_under_other_names(source, words, tmp_path):
    path, tensors = source("matching")
    renamed = {table._their_name(n): x for n, x in tensors.items() if n not in IDS}
    folder = tmp_path / "hf"
    save(folder / "model.safetensors", renamed)
    shutil.copy(words, folder / "vocab.txt")
    wrong = {"num_attention_heads": 8, "layer_norm_eps": 1e-5}
    config = {"vision_config": wrong, "text_config": {"num_attention_heads": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    theirs = convert(folder, tmp_path / "theirs", "blip_itm")
    ours = convert(path, tmp_path / "ours", "blip_itm", tokenizer=words)
    assert theirs.fingerprint == ours.fingerprint
    assert cir_jax.load(tmp_path / "theirs").config.text.heads == 1
    assert theirs.notes[0] == (
        "config.json is not followed in vision_config.num_attention_heads 8 (BLIP has 1), "
        "vision_config.layer_norm_eps 1e-05 (BLIP has 1e-06), text_config.num_attention_heads 8 (BLIP has 1)"
    )


# ---- there and back ----


@pytest.mark.parametrize(
    ("kind", "method", "count"),
    [
        ("stage1", "blip_cir", 471),
        ("hugging_face", "blip_cir", 471),
        ("retrieval", "blip_itm", 473),
        ("stage2", "blip_rerank", 722 + 316),
    ],
)
def test_an_export_has_the_names_of_the_original_and_comes_back_the_same(
    kind, method, count, source, words, tmp_path
):
    path, tensors = source(kind)
    parts = {}
    if kind == "stage2":
        seen = {n: x for n, x in tensors.items() if n.startswith("visual_encoder.")}
        first, more = source("stage1", seed=1, **seen)
        parts = {"stage1": str(first)}
        tensors |= {f"stage1.{n}": x for n, x in more.items() if n.startswith("text_encoder.")}
    options = {"tokenizer": words}
    done = convert(path, tmp_path / "model", method, parts=parts, **options)
    assert export(tmp_path / "model", tmp_path / "out.safetensors") == count
    out = load_file(tmp_path / "out.safetensors")
    if kind != "hugging_face":
        assert all(np.array_equal(x, tensors[name]) for name, x in out.items())
        left = {name for name in tensors.keys() - out.keys() if not name.endswith("position_ids")}
        assert not any(n.startswith(("visual_encoder.", "text_encoder.", "cls_")) for n in left)
    if parts:
        with pytest.raises(
            ValueError, match=r"holds 316 tensors behind stage1\. itself; leave out"
        ):
            convert(tmp_path / "out.safetensors", tmp_path / "no", method, parts=parts, **options)
    again = convert(tmp_path / "out.safetensors", tmp_path / "again", method, **options)
    assert again.fingerprint == done.fingerprint and again.modules == done.modules


def test_notes_of_an_export_that_make_no_sense_are_refused(source, words, tmp_path):
    path, tensors = source("stage1")
    good = {"cir_jax": "x", "image_heads": "1", "text_heads": "1", "text_length": "20"}
    for change in (
        {"pictures": "{"},
        {"pictures": "{}", "text_heads": "0"},
        {"pictures": "{}", "image_heads": "x"},
    ):
        save_file(tensors, path, good | change)
        with pytest.raises(ValueError, match="its notes are not those that --export writes"):
            convert(path, tmp_path / "model", "blip_cir", tokenizer=words)


# ---- positions ----


def test_weights_of_the_position_resize():
    weights = bicubic_weights(14, 24)
    np.testing.assert_allclose(weights[0, :3], (1.097928, -0.097928, 0), atol=5e-7)
    np.testing.assert_allclose(weights[1, :4], (0.639648, 0.426270, -0.065918, 0), atol=5e-7)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(weights[::-1, ::-1], weights, atol=1e-12)
    np.testing.assert_array_equal(bicubic_weights(5, 5), np.eye(5))


@pytest.mark.parametrize("kind", ["pretrained", "hugging_face"])
def test_positions_for_larger_pictures(kind, source, words, tmp_path):
    path, tensors = source(kind)
    name = "visual_encoder.pos_embed"
    rows = tensors[name if kind == "pretrained" else table._their_name(name)][0]
    done = convert(path, tmp_path / "model", "blip_cir", tokenizer=words, variant="16")
    assert (
        "positions of 8 pixels resized for 16 (bicubic, as BLIP does), by --variant" in done.notes
    )
    model = cir_jax.load(tmp_path / "model")
    assert model.config.image.size == model.config.inputs.image.size == 16
    found = model.params["image"]["positions"]
    weights = bicubic_weights(2, 4)
    square = np.einsum("ai,bj,ijd->abd", weights, weights, rows[1:].reshape(2, 2, -1))
    np.testing.assert_array_equal(found[0], rows[0])
    np.testing.assert_allclose(found[1:].reshape(4, 4, -1), square, atol=1e-7)
    for wrong in ("15", "large", "0"):
        with pytest.raises(ValueError, match=r"side of its pictures in pixels, a multiple of 4"):
            convert(path, tmp_path / "no", "blip_cir", tokenizer=words, variant=wrong)


def test_stage2_begins_from_pretraining_and_a_stage1_of_larger_pictures(source, words, tmp_path):
    """As its training does: both come from one BLIP, whose positions stage I has resized already."""
    path, tensors = source("pretrained")
    large = dict(tensors)
    name = "visual_encoder.pos_embed"
    large[name] = resize_positions(tensors[name][0], 4)[None] + np.float32(1e-7)
    kept = {n: x for n, x in large.items() if n in stage1_shapes()}
    trained = "text_encoder.encoder.layer.0.attention.self.key.bias"
    kept[trained] = tensors[trained] + 1
    first = save(tmp_path / "first.safetensors", kept)
    options = {"tokenizer": words, "variant": "16", "parts": {"stage1": str(first)}}
    done = convert(path, tmp_path / "model", "blip_rerank", **options)
    assert "the text encoder of stage I is that of stage1" in done.notes
    assert done.tensors == 466 + 316 and len(done.ignored) == 1272 - 466 + 472 - 316
    params = flat(tmp_path / "model")
    bias = params["fusion/blocks/branch/attention/key/bias"][0]
    np.testing.assert_array_equal(bias, tensors[trained] + 1)
    bias = params["text/blocks/mean/text/attention/key/bias"][0]
    np.testing.assert_array_equal(bias, tensors[trained])
    kept[name] = kept[name] + np.float32(0.01)
    save(first, kept)
    with pytest.raises(ValueError, match="1 of its 150 tensors are not there or differ"):
        convert(path, tmp_path / "no", "blip_rerank", **options)


# ---- faults ----


@pytest.mark.parametrize(
    ("kind", "method", "change", "message"),
    [
        ("stage1", "blip_cir", ("text_proj.bias", None), "1 fault:\n  missing text_proj.bias"),
        ("stage1", "blip_cir", ("temp", None), "1 fault:\n  missing temp"),
        ("retrieval", "blip_itm", ("temp", None), "1 fault:\n  missing temp"),
        ("stage1", "blip_cir", ("extra", (2,)), "1 fault:\n  left over extra"),
        (
            "stage1",
            "blip_itm",
            ("text_proj.bias", (64,)),
            "there is no itm_head.weight, which says",
        ),
        (
            "stage1",
            "blip_rerank",
            ("text_encoder.encoder.layer.3.output.dense.weight", (64, 9)),
            r"1 fault:\n  text_encoder.encoder.layer.3.output.dense.weight: found shape \[64, 9\], expected",
        ),
        (
            "hugging_face",
            "blip_itm",
            ("vision_model.encoder.layers.11.layer_norm2.bias", None),
            "1 fault:\n  missing vision_model.encoder.layers.11.layer_norm2.bias",
        ),
        (
            "stage1",
            "blip_cir",
            ("visual_encoder.pos_embed", (1, 7, 64)),
            "visual_encoder.pos_embed has 7 rows, expected 1 and a square",
        ),
        (
            "stage1",
            "blip_cir",
            ("visual_encoder.patch_embed.proj.weight", (65, 3, 4, 4)),
            "a width of 65 does not tell the heads",
        ),
        (
            "stage1",
            "blip_cir",
            ("visual_encoder.cls_token", None),
            "this is no BLIP in a known layout",
        ),
        (
            "hugging_face",
            "blip_cir",
            ("text_encoder.embeddings.word_embeddings.weight", None),
            "missing text_encoder.embeddings.word_embeddings.weight, from which the sizes are read",
        ),
    ],
)
def test_one_change_is_one_fault(kind, method, change, message, source, words, tmp_path):
    path, tensors = source(kind)
    name, shape = change
    tensors.pop(name, None)
    save(path, tensors | ({} if shape is None else {name: np.zeros(shape, np.float32)}))
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / "model", method, tokenizer=words)
    assert not (tmp_path / "model").exists()


def test_a_missing_tensor_of_stage2_is_one_fault(source, words, tmp_path):
    path, tensors = source("stage2")
    seen = {n: x for n, x in tensors.items() if n.startswith("visual_encoder.")}
    first, _ = source("stage1", **seen)
    name = "text_encoder.encoder.layer.6.crossattention.output.merge_layer.bias"
    save(path, {n: x for n, x in tensors.items() if n != name})
    with pytest.raises(ValueError, match=f"1 fault:\n  missing {name}"):
        convert(
            path, tmp_path / "model", "blip_rerank", tokenizer=words, parts={"stage1": str(first)}
        )


def test_vocabularies(source, words, tmp_path):
    path, _ = source("stage1")
    with pytest.raises(ValueError, match=r"give the vocab\.txt of bert-base-uncased"):
        convert(path, tmp_path / "model", "blip_cir")
    for count in (12, 15):
        wrong = vocabulary(tmp_path / str(count), count)
        with pytest.raises(
            ValueError, match=f"15 rows, expected the {count} ids of .* and two more"
        ):
            convert(path, tmp_path / "model", "blip_cir", tokenizer=wrong)
    # [DEC] is BLIP's; models trained here do without.
    for name, count in (("blip", 13), ("ours", 14)):
        convert(
            path, tmp_path / name, "blip_cir", tokenizer=vocabulary(tmp_path / f"v{name}", count)
        )
    model = cir_jax.load(tmp_path / "blip")
    assert int(with_encode_token(np.zeros((1, 3), np.int32), model.config.text)[0, 0]) == 14


def test_positions_in_half_precision_are_resized_in_full(source, words, tmp_path):
    path, tensors = source("stage1")
    name = "visual_encoder.pos_embed"
    for kind in (np.float16, ml_dtypes.bfloat16):
        half = tensors[name].astype(kind)
        save(path, tensors | {name: half})
        convert(path, tmp_path / kind.__name__, "blip_cir", tokenizer=words, variant="16")
        found = cir_jax.load(tmp_path / kind.__name__).params["image"]["positions"]
        np.testing.assert_array_equal(found, resize_positions(half[0].astype(np.float32), 4))
