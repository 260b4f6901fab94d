"""FTI4CIR, Pic2Word, SEARLE, LinCIR, MagicLens against PyTorch: losses, every gradient, a search for words, whole models.

FTI4CIR's code has no licence, so the modules are stated again here with `torch.nn` and the published names of tensors;
FTI4CIR's must give the printed numbers of the released one first. CLIP is `open_clip`'s. Needs the extra `[parity]`.
"""

import pickle
import sys
import types

import golden_inversion as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_fti4cir
from flax import nnx, serialization, traverse_util
from reference import photo
from test_convert_inversion import drawn, magiclens_shapes
from test_parity_convert import open_clip_model, run, shaken, small, there_and_back

import cir_jax
from cir_jax.conversion import inversion, rules
from cir_jax.data.inputs import prepare_batch
from cir_jax.data.text import TextSpec, tokenizer
from cir_jax.methods import oti
from cir_jax.methods.inversion import FROZEN
from cir_jax.methods.magiclens import Fusion
from cir_jax.training import optim

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:  # the tests are not selected then
    torch = None

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def close(found, expected, tolerance=1e-6, least=1.0):
    """Within `tolerance` of the largest number, which counts as at least `least`."""
    expected = expected.detach().numpy() if torch.is_tensor(expected) else np.asarray(expected)
    atol = tolerance * max(least, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=atol)


def ids(*texts):
    return torch.from_numpy(tokenizer(TextSpec())(texts)[0]).long()


# ---- the modules, stated again ----


def phi(inputs, hidden, outputs):
    """SEARLE's, LinCIR's and FTI4CIR's."""
    stack = [nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(0.5), nn.Linear(hidden, hidden)]
    stack += [nn.GELU(), nn.Dropout(0.5), nn.Linear(hidden, outputs)]
    whole = nn.Module()
    whole.layers = nn.Sequential(*stack)
    whole.forward = lambda x: whole.layers(x)
    return whole


def im2text(inputs, hidden, outputs):
    """Pic2Word's."""
    whole = nn.Module()
    sizes = ((inputs, hidden), (hidden, hidden))
    blocks = [nn.Sequential(nn.Linear(*each), nn.Dropout(0.1), nn.ReLU()) for each in sizes]
    whole.layers, whole.fc_out = nn.Sequential(*blocks), nn.Linear(hidden, outputs)
    whole.forward = lambda x: whole.fc_out(whole.layers(x))
    return whole


def img2text(width, embed, word, count, layers, hidden, heads=1):
    """FTI4CIR's: (module, function of tokens that gives the candidates)."""
    whole = nn.Module()
    whole.templates = nn.Parameter(torch.randn(1, count, width))
    whole.phi_s, whole.phi_a = phi(embed, hidden, word), phi(embed, hidden, word)
    whole.local_atte_fc = nn.Sequential(nn.Linear(width, embed), nn.Sigmoid())
    whole.transformer = nn.Module()
    whole.transformer.layers = nn.ModuleList(layer(width) for _ in range(layers))

    def candidates(tokens):
        x = torch.cat([whole.templates.expand(len(tokens), -1, -1), tokens], 1)
        for each in whole.transformer.layers:
            x = x + attended(each.attn, each.norm1(x), heads)
            x = x + each.mlp.fc2(F.relu(each.mlp.fc1(each.norm2(x))))
        return whole.local_atte_fc(x[:, :count])

    whole.candidates = candidates
    return whole


def layer(width):
    made = nn.Module()
    # In the order of the published state dict, by which the golden numbers go.
    made.norm1, made.attn = nn.LayerNorm(width), nn.Module()
    made.norm2, made.mlp = nn.LayerNorm(width), nn.Module()
    made.attn.to_queries = nn.Linear(width, width, bias=False)
    made.attn.to_keys_values = nn.Linear(width, 2 * width, bias=False)
    made.attn.project = nn.Linear(width, width)
    made.mlp.fc1, made.mlp.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
    return made


def attended(p, x, heads):
    split = lambda y: y.unflatten(-1, (heads, -1)).transpose(1, 2)
    keys, values = map(split, p.to_keys_values(x).chunk(2, -1))
    mixed = F.scaled_dot_product_attention(split(p.to_queries(x)), keys, values)
    return p.project(mixed.transpose(1, 2).flatten(2))


def salient(candidates, features, kept, threshold):
    """Unit rows of the attributes that stand out, and how many of each picture count."""
    shares = torch.softmax((candidates @ features[..., None])[..., 0], 1)
    rows, counts = [], []
    for share in shares:
        order = share.argsort(descending=True, stable=True)[:kept]
        count = min(max(int((share > threshold).sum()), 1), kept)
        rows.append(torch.cat([order[:count].sort().values, order[count:]]))
        counts.append(count)
    rows = torch.stack(rows)
    return F.normalize(candidates[torch.arange(len(rows))[:, None], rows], dim=-1), counts, rows


def read(clip, prompts, places, words):
    """Features of prompts at whose places (row by row) words stand."""
    x = clip.token_embedding(prompts).clone()
    for row, columns in enumerate(places):
        x[row, columns] = words[row][: len(columns)]
    x = clip.transformer(x + clip.positional_embedding, attn_mask=clip.attn_mask)
    last = clip.ln_final(x)[torch.arange(len(x)), prompts.argmax(1)]
    return last @ clip.text_projection


def towers(clip, pixels):
    """(features, all tokens before the last norm) of pictures, without gradient."""
    kept = []
    hook = clip.visual.transformer.register_forward_hook(lambda *x: kept.append(x[2]))
    with torch.no_grad():
        features = clip.encode_image(pixels)
    hook.remove()
    return features, kept[0]


def apart(x, y):
    return nn.CosineEmbeddingLoss()(x, y, torch.ones(1, dtype=x.dtype))


def nt_xent(x, y, temperature):
    joint = F.normalize(torch.cat([x, y]), dim=1)
    scores = (joint @ joint.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(scores, torch.arange(len(joint)).roll(len(x)))


# ---- printed numbers ----


@pytest.mark.parametrize("heads", test_fti4cir.CANDIDATES)
def test_the_restated_module_gives_the_printed_numbers(heads):
    model = img2text(16, 8, 8, 6, 2, 32, heads).double().eval()
    filled = golden.filled(golden.fti4cir_shapes(16, 8, 6, 2, 32))
    assert list(model.state_dict()) == list(filled)
    model.load_state_dict({name: torch.from_numpy(x) for name, x in filled.items()})
    tokens, features = map(torch.from_numpy, test_fti4cir.golden_inputs(np.float64))
    candidates = model.candidates(tokens)
    total, first = test_fti4cir.CANDIDATES[heads]
    close(candidates.sum().item(), total)
    close(candidates[0, 0, :4].detach(), first)
    if heads == 1:
        chosen, counts, rows = salient(candidates, features, 4, 0.16862)
        assert counts == [2, 1] and rows.tolist() == [[0, 3, 4, 1], [2, 5, 3, 0]]
        close((chosen * torch.arange(1, 5)[:, None]).sum().item(), 56.490723209)
        close(model.phi_s(features).sum().item(), -1.431494224)
        chosen, *_ = salient(candidates, features, 4, 0.15)
        close(model.phi_a(chosen).sum().item(), 3.903996650)
        close(F.mse_loss(chosen @ chosen.mT, torch.eye(4).expand(2, 4, 4)).item(), 0.748608109)
    sine = lambda *x: torch.from_numpy(golden.sine(*x))
    close(nt_xent(sine((4, 8), 0.1, 0.3), sine((4, 8), 0.2, 1.0), 0.2).item(), 6.006351092646)
    close(apart(sine((3, 5), 0.4, 0.1), sine((3, 5), 0.9, 0.2)).item(), 0.944838827375)


# ---- losses and gradients, through the real command ----

KEPT, THRESHOLD = 4, 0.17
CAPTIONS = [("a fox", "on snow"), ("two red apples", "in a bowl"), ("the sun", ""), ("a *", "by *")]


def made(name, width, embed, word):
    """A restated network with random weights, large enough to matter."""
    torch.manual_seed(1)
    if name == "fti4cir":
        return shaken(img2text(width, embed, word, 6, 2, 4 * embed))
    return shaken((im2text if name == "pic2word" else phi)(embed, 4 * embed, word))


def converted(name, network, clip, folder, **notes):
    """The model that the command makes of both."""
    from safetensors.torch import save_file

    torch.save(clip.state_dict(), folder / "clip.pt")
    save_file(
        network.state_dict(), folder / "network.safetensors", {k: str(x) for k, x in notes.items()}
    )
    source, beside = folder / "network.safetensors", f"clip={folder / 'clip.pt'}"
    said = ["--method", name, "--activation", "quick_gelu"]
    run(source, beside, folder / "model", *said)
    return cir_jax.load(folder / "model")


def settings():
    values = {name: value for name, (_, value) in inversion.ATTRIBUTES.items()}
    return values | {"topk": KEPT, "epsilon": THRESHOLD}


def pixels(count=4, size=64):
    return np.random.default_rng(5).normal(size=(count, size, size, 3))


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """By name: (restated network and open_clip's CLIP in float64, our model)."""

    def make(name):
        clip = small()
        with torch.no_grad():  # else prompts hardly depend on their words
            clip.token_embedding.weight.mul_(20)
        network = made(name, 128, 64, 128)
        notes = settings() if name == "fti4cir" else {}
        model = converted(name, network, clip, tmp_path_factory.mktemp(name), **notes)
        frozen = clip.double().requires_grad_(False)
        return network.double(), frozen, model

    return make


def fti4cir_loss(network, clip, images, captions=CAPTIONS):
    features, tokens = towers(clip, images)
    chosen, counts, _ = salient(network.candidates(tokens), features, KEPT, THRESHOLD)
    words = torch.cat([network.phi_s(features)[:, None], network.phi_a(chosen)], 1)
    stars = ["* " * r for r in counts]
    subjects, attributes = zip(*captions)
    first = [[4]] * len(counts)
    runs = [[*range(6, 6 + r)] for r in counts]
    both = [a + b for a, b in zip(first, runs)]
    whole = read(clip, ids(*(f"a photo of * with {x}" for x in stars)), both, words)
    subject = read(clip, ids(*(f"a photo of * with {x}" for x in attributes)), first, words)
    texts = [f"a photo of {s} with {x}" for s, x in zip(subjects, stars)]
    # The first star behind "with": that of a caption is no place of a word here (the original would take it).
    starts = [len(tokenizer(TextSpec()).content([f"a photo of {s} with"])[0]) + 1 for s in subjects]
    runs = [[*range(n, n + r)] for n, r in zip(starts, counts)]
    attribute = read(clip, ids(*texts), runs, words[:, 1:])
    plain = clip.encode_text(ids(*(f"a photo of {s} with {a}" for s, a in captions)))
    identity = torch.eye(KEPT, dtype=chosen.dtype).expand(len(chosen), -1, -1)
    square = F.mse_loss(chosen @ chosen.mT, identity)
    near = sum(apart(x, plain) for x in (subject, attribute, whole))
    return nt_xent(features, whole, 0.2) + square + 1.4 * near


def pic2word_loss(network, clip, images):
    features, _ = towers(clip, images)
    prompts = read(
        clip, ids(*["a photo of *"] * len(images)), [[4]] * 4, network(features)[:, None]
    )
    scores = F.normalize(features, dim=1) @ F.normalize(prompts, dim=1).T * clip.logit_scale.exp()
    labels = torch.arange(len(images))
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


STARRY = ["the $ in a tree", "a $ on a $", "$ and $", "no star"]
PLAIN = ["the owl in a tree", "a cat on a cat", "sun and sun", "no star"]


def places(texts):
    return [np.flatnonzero(row == 259).tolist() for row in ids(*texts).numpy()]


def repeated(words, where):
    """One word for every place of its row."""
    return [word.expand(max(1, len(row)), -1) for word, row in zip(words, where)]


def searle_loss(network, clip, images):
    features, _ = towers(clip, images)
    words = network(features)
    found = torch.from_numpy(np.random.default_rng(6).normal(size=words.shape))
    starry = read(clip, ids(*STARRY), places(STARRY), repeated(words, places(STARRY)))
    return nt_xent(found, words, 0.25) + 0.75 * apart(clip.encode_text(ids(*PLAIN)), starry)


def lincir_loss(network, clip, images):
    features = clip.encode_text(ids(*PLAIN))
    where = places(STARRY)
    starry = read(clip, ids(*STARRY), where, repeated(network(features), where))
    return F.mse_loss(starry, features)


LOSSES = {
    "fti4cir": fti4cir_loss,
    "pic2word": pic2word_loss,
    "searle": searle_loss,
    "lincir": lincir_loss,
}


def written(captions):
    """Captions as ours reads them."""
    return [" | ".join(each) if each[1] else each[0] for each in captions]


def our_batch(name, width):
    texts = lambda rows: tokenizer(TextSpec())(rows)[0]
    if name == "fti4cir":
        return {"query": {"text": texts(written(CAPTIONS))}, "item": {"image": pixels()}}
    if name == "pic2word":
        return {"query": {"text": texts(PLAIN)}, "item": {"image": pixels()}}
    batch = {"query": {"text": texts(STARRY)}, "item": {"text": texts(PLAIN)}}
    if name == "searle":
        found = np.random.default_rng(6).normal(size=(4, width))
        batch["item"] |= {"image": pixels(), "token": found}
    return batch


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_every_gradient(name, system, capsys):
    network, clip, model = system(name)
    value = LOSSES[name](network, clip, torch.from_numpy(pixels().transpose(0, 3, 1, 2).copy()))
    value.backward()
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, np.float64), model.params)
        own, clip = optim.split_frozen(params, FROZEN)
        batch = our_batch(name, 128)

        @jax.jit
        def computed(own, clip):
            loss = lambda own: nnx.merge(model.graph, optim.join(own, clip)).loss(batch, None)[0]
            return jax.value_and_grad(loss)(own)

        found, gradient = computed(own, clip)
    close(found, value.item())
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, gradient), sep="/")
    back = {key: make() for key, _, make in rules.original(flat, inversion.NETWORKS[name].rules())}
    expected = {key: x.grad for key, x in network.named_parameters()}
    assert back.keys() == expected.keys()
    worst = 0.0
    for key, x in expected.items():
        assert x.abs().max() > 0, key
        close(back[key], x, least=float(x.abs().max()))
        worst = max(worst, float(np.abs(back[key] - x.numpy()).max() / x.abs().max()))
    with capsys.disabled():
        print(
            f"\n{name}: loss {value.item():.6f}, gradients apart by at most {worst:.1e} of their largest"
        )


def pickled(network, monkeypatch, **attributes):
    """The network as its authors save it: a whole module of their classes, functions and attributes included."""

    def become(module, path):
        where, _, name = path.rpartition(".")
        if where not in sys.modules:
            monkeypatch.setitem(sys.modules, where, types.ModuleType(where))
        kinds = vars(sys.modules[where])
        module.__class__ = kinds.setdefault(name, type(name, (nn.Module,), {"__module__": where}))
        for key in ("forward", "candidates"):  # ours
            module.__dict__.pop(key, None)

    tower = network.transformer
    become(tower, "MHTransformer.Transformer")
    tower.enc_dec = False
    for each in tower.layers:
        become(each, "MHTransformer.TransformerLayer")
        become(each.attn, "MHTransformer.MultiHeadAttention")
        become(each.mlp, "MHTransformer.MlpTransformer")
        each.attn.num_heads, each.attn.scale = 1, 128**-0.5
        each.mlp.act, each.mlp.dropout, each.attn.dropout = F.relu, nn.Dropout(0.0), nn.Dropout(0.0)
    for each in (network.phi_s, network.phi_a):
        become(each, "i2t_model.Phi")
    become(network, "i2t_model.IMG2TEXT")
    network.cosine_criterion, network.ortho_loss = nn.CosineEmbeddingLoss(), nn.MSELoss()
    network.criterion_target, network.num_k = torch.as_tensor([1]), 6
    for name, value in attributes.items():
        setattr(network, name, value)
    return network


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_module_is_its_state_dict(legacy, tmp_path, monkeypatch):
    """As FTI4CIR's file is: nothing of it runs, its settings come from the object."""
    network, clip = made("fti4cir", 128, 64, 128), small()
    expected = converted("fti4cir", network, clip, tmp_path, **settings())
    own = {name: x for name, x in settings().items() if "." not in name}
    network = pickled(network, monkeypatch, **own)
    torch.save(network, tmp_path / "whole.pth", _use_new_zipfile_serialization=not legacy)
    said = ["--method", "fti4cir", "--activation", "quick_gelu"]
    out = run(tmp_path / "whole.pth", f"clip={tmp_path / 'clip.pt'}", tmp_path / "whole", *said)
    assert expected.fingerprint in out
    assert f"topk {KEPT}, epsilon {THRESHOLD}, num_heads 1" in out


# ---- words found by optimisation ----


def test_words_found_by_optimisation(system):
    """A few steps with PyTorch's AdamW; the templates and phrases that are drawn are ours."""
    _, clip, model = system("searle")
    images = torch.from_numpy(pixels().transpose(0, 3, 1, 2).copy())
    features, _ = towers(clip, images)
    phrases = [[("an owl sits", "owl"), ("the owl of owls", "owl")], [("a red hat", "hat")]] * 2
    steps, key = 6, jax.random.key(3)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, np.float64), model.params)
        method = nnx.merge(model.graph, params)
        given = jnp.asarray(features.numpy())
        start = np.asarray(oti.invert(method, given, key, phrases, steps=0))
        found = np.asarray(oti.invert(method, given, key, phrases, steps=steps))
    counts = np.array([len(each) for each in phrases])
    words = torch.tensor(start, requires_grad=True)
    mean, optimizer = words.detach().clone(), torch.optim.AdamW([words], 2e-2, weight_decay=0.01)
    for step in range(1, steps + 1):
        first, second = jax.random.split(jax.random.fold_in(key, step))
        with jax.enable_x64(True):
            which = np.asarray(jax.random.randint(first, (4,), 0, 24))
            said = np.asarray(jax.random.randint(second, (4,), 0, counts))
        texts = [oti.TEMPLATES[n].format(" $ ") for n in which]
        pairs = [each[n] for each, n in zip(phrases, said)]
        starry = [text.replace(concept, " $ ", 1) for text, concept in pairs]
        near = apart(read(clip, ids(*texts), places(texts), words[:, None]), features)
        plain = clip.encode_text(ids(*(text for text, _ in pairs)))
        near = near + 0.5 * apart(read(clip, ids(*starry), places(starry), words[:, None]), plain)
        optimizer.zero_grad()
        (near / 1.5).backward()
        optimizer.step()
        mean = 0.99 * mean + 0.01 * words.detach()
    assert np.abs(found - start).max() > 1e-3
    close(found, mean, tolerance=1e-6, least=0.01)


# ---- MagicLens ----


def fused(t, x, heads, layers):
    """What MagicLens does with features of a picture and a text, by its own names and shapes of tensors."""

    def norm(name, x):
        return (
            F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + t[f"{name}/scale"]) + t[f"{name}/bias"]
        )

    def attention(name, x, y, scale):
        project = lambda part, x: (
            torch.einsum("btd,dnh->btnh", x, t[f"{name}/{part}/w"]) + t[f"{name}/{part}/b"]
        )
        query, key, value = project("query", x) * scale, project("key", y), project("value", y)
        logits = 50 * torch.tanh(torch.einsum("btnh,bsnh->bnts", query, key) / 50)
        mixed = torch.einsum("bnts,bsnh->btnh", logits.softmax(-1), value)
        return torch.einsum("btnh,dnh->btd", mixed, t[f"{name}/post/w"]) + t[f"{name}/post/b"]

    width = x.shape[-1]
    for n in range(layers):
        at = f"multimodal_encoder/x_layers_{n}"
        normed = norm(f"{at}/layer_norm", x)
        x = x + attention(f"{at}/self_attention", normed, normed, (width // heads) ** -0.5)
        dense = lambda k, x, at=at: (
            x @ t[f"{at}/ff_layer/ffn_layer{k}/linear/w"] + t[f"{at}/ff_layer/ffn_layer{k}/bias/b"]
        )
        x = x + dense(2, F.relu(dense(1, norm(f"{at}/ff_layer/layer_norm", x))))
    at, inner = "contrastive_multimodal_pooler", 4 * width // heads
    scale = 1.442695041 / inner**0.5 * F.softplus(t[f"{at}/pool_attn/per_dim_scale/per_dim_scale"])
    query = t[f"{at}/pooling_attn_query"].expand(len(x), 1, width)
    pooled = norm(f"{at}/pool_attn_ln", attention(f"{at}/pool_attn", query, x, scale))[:, 0]
    return pooled / (pooled.square().sum(-1, keepdim=True) + 1e-12).sqrt()


@pytest.mark.parametrize("width, heads, layers", [(24, 2, 2), (512, 8, 4)])
def test_fusion_of_magiclens(width, heads, layers):
    from cir_jax.conversion.magiclens import _fusion
    from cir_jax.methods.magiclens import MagicLensConfig

    tensors = drawn(magiclens_shapes(width, 4 * width, heads, layers))
    tensors = {name: np.float64(x) * 5 / width**0.5 for name, x in tensors.items()}
    x = np.random.default_rng(1).normal(size=(3, 2, width))
    leaves = {name: torch.from_numpy(y).requires_grad_() for name, y in tensors.items()}
    expected = fused(leaves, torch.from_numpy(x), heads, layers)
    direction = np.random.default_rng(2).normal(size=expected.shape)
    (expected * torch.from_numpy(direction)).sum().backward()
    table = _fusion(MagicLensConfig(fusion_heads=heads, fusion_layers=layers))
    with jax.enable_x64(True):
        graph, state = nnx.split(
            nnx.eval_shape(lambda: Fusion(width, layers, heads, rngs=nnx.Rngs(0)))
        )
        shapes = {
            k: y.shape
            for k, y in traverse_util.flatten_dict(nnx.to_pure_dict(state), sep="/").items()
        }
        dotted = golden.Tensors({name.replace("/", "."): y for name, y in tensors.items()})
        params, _ = rules.convert(dotted, rules.Plan(None, table, "MagicLens"), shapes, "float64")
        params = traverse_util.unflatten_dict(params, sep="/")

        @jax.jit
        def computed(params, x):
            value = lambda params: nnx.merge(graph, params)(x)
            found, back = jax.vjp(value, params)
            return found, back(jnp.asarray(direction))[0]

        found, gradient = computed(params, x)
    close(found, expected)
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, gradient), sep="/")
    for key, _, make in rules.original(flat, table):
        reference = leaves[key.replace(".", "/")].grad
        # The keys' bias moves all logits of a query alike: but for their cap it would have no gradient.
        close(make(), reference, least=max(1e-3, float(reference.abs().max())))


def test_a_hidden_id(system):
    """Scenic's text tower takes the id 0 for padding wherever it stands; in CLIP's vocabulary it is a "!" before another sign."""
    _, clip, model = system("searle")
    texts = ["wow !~ a red one", "no !~ no !~ no"]
    rows, expected = ids(*texts), []
    for row in rows:
        mask = clip.attn_mask.masked_fill(row == 0, -torch.inf)
        x = (clip.token_embedding(row) + clip.positional_embedding)[None]
        last = clip.ln_final(clip.transformer(x, attn_mask=mask))[0, row.argmax()]
        expected.append(last @ clip.text_projection)
    assert (rows[:, :5] == 0).any(1).all()
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, np.float64), model.params)
        tower = nnx.merge(model.graph, params).clip.text
        found, plain = tower(rows.numpy(), hidden=0), tower(rows.numpy())
    close(found, torch.stack(expected))
    assert np.abs(np.asarray(found - plain)).max() > 1e-3


# ---- whole models in their published sizes ----


@pytest.mark.slow
def test_fti4cir_of_published_size(tmp_path, capsys):
    """ViT-B/32 with random numbers: a picture and a sentence, an export, and the same again."""
    clip = open_clip_model("ViT-B-32-quickgelu")
    with torch.no_grad():
        clip.token_embedding.weight.mul_(20)
    network = shaken(img2text(768, 512, 512, 24, 3, 2048))
    assert len(network.state_dict()) == 51
    notes = {name: value for name, (_, value) in inversion.ATTRIBUTES.items()}
    model = converted("fti4cir", network, clip, tmp_path, **notes)
    query = [{"image": photo(), "text": "is shiny and silver"}]
    vector = model.encode("query", query)
    images = prepare_batch(query, model.config.inputs)["image"]
    with torch.no_grad():
        features, tokens = towers(clip, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        chosen, (count,), _ = salient(network.candidates(tokens), features, 12, 0.05)
        words = torch.cat([network.phi_s(features)[:, None], network.phi_a(chosen)], 1)
        text = ids(f"a photo of * with {'* ' * count}but is shiny and silver")
        expected = F.normalize(read(clip, text, [[4, *range(6, 6 + count)]], words), dim=1)
    with capsys.disabled():
        print(
            f"\nfti4cir B/32: {count} attributes, apart by {np.abs(vector - expected.numpy()).max():.1e}"
        )
    close(vector, expected, 1e-5)
    there_and_back(tmp_path, "fti4cir", model.fingerprint)


@pytest.mark.slow
def test_magiclens_of_published_size(tmp_path):
    from cir_jax.checkpoint import abstract_params
    from cir_jax.conversion import magiclens
    from cir_jax.methods.magiclens import MagicLensConfig

    config = MagicLensConfig.paper("base")
    _, tree = abstract_params(config)
    shapes = {k: x.shape for k, x in traverse_util.flatten_dict(tree, sep="/").items()}
    names = {
        tuple(name.split(".")): each.source_shape(shapes)
        for each in magiclens.original(config)[0]
        for name in each.names(shapes)
    }
    draw = np.random.default_rng(0)
    value = lambda shape: 0.02 * draw.standard_normal(shape, np.float32)
    tree = traverse_util.unflatten_dict({name: value(shape) for name, shape in names.items()})
    with open(tmp_path / "magic_lens_clip_base.pkl", "wb") as file:
        pickle.dump(serialization.to_bytes(tree), file)
    del tree
    run(tmp_path / "magic_lens_clip_base.pkl", tmp_path / "model", "--method", "magiclens")
    model = cir_jax.load(tmp_path / "model")
    vectors = model.encode(
        "query", [{"image": photo(), "text": text} for text in ("red", "in snow")]
    )
    assert vectors.shape == (2, 512) and np.abs(vectors[0] - vectors[1]).max() > 1e-6
    there_and_back(tmp_path, "magiclens", model.fingerprint)
