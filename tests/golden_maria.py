"""Names and shapes of the original's checkpoints (maria.md 6), and its picture tower in plain numpy."""

import numpy as np


def text_shapes(width=768, layers=12, hidden=3072, words=30522, length=512):
    """BERT as `transformers` names it, pooler included."""
    shapes = {
        "embeddings.word_embeddings.weight": (words, width),
        "embeddings.position_embeddings.weight": (length, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        **_norm_shapes("embeddings.LayerNorm", width),
        **_linear_shapes("pooler.dense", width, width),
    }
    for n in range(layers):
        at = f"encoder.layer.{n}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _linear_shapes(f"{at}.attention.{name}", width, width)
        shapes |= _norm_shapes(f"{at}.attention.output.LayerNorm", width)
        shapes |= _linear_shapes(f"{at}.intermediate.dense", width, hidden)
        shapes |= _linear_shapes(f"{at}.output.dense", hidden, width)
        shapes |= _norm_shapes(f"{at}.output.LayerNorm", width)
    return shapes


def image_shapes(layers=(3, 4, 23, 3), width=64, groups=32, group_width=8):
    """ResNeXt as torchvision names it, without `fc` and counters."""
    shapes, inputs = _convolution_shapes("conv1", "bn1", 3, width, 7), width
    for stage, blocks in enumerate(layers):
        inner, outputs = groups * group_width * 2**stage, 4 * width * 2**stage
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            shapes |= _convolution_shapes(f"{at}.conv1", f"{at}.bn1", inputs, inner, 1)
            shapes |= _convolution_shapes(f"{at}.conv2", f"{at}.bn2", inner // groups, inner, 3)
            shapes |= _convolution_shapes(f"{at}.conv3", f"{at}.bn3", inner, outputs, 1)
            if block == 0:
                down = f"{at}.downsample"
                shapes |= _convolution_shapes(f"{down}.0", f"{down}.1", inputs, outputs, 1)
            inputs = outputs
    return shapes


def head_shapes(sizes, names):
    """The layers of a head; `names` are those of the original: `mlp.linears.0` …, or `mlp.0` and `mlp.3`."""
    shapes = {}
    for name, inputs, outputs in zip(names, sizes, sizes[1:]):
        shapes |= _linear_shapes(name, inputs, outputs)
    return shapes


def shapes(text=None, image=None, hidden=(1024, 1024), embed=512, text_layers=4, token=False):
    """A whole checkpoint; `text` and `image` are other sizes than the published ones."""
    texts, images = text_shapes(**(text or {})), image_shapes(**(image or {}))
    width = texts["embeddings.LayerNorm.weight"][0]
    features = 32 * images["conv1.weight"][0]
    names = ("mlp.0", "mlp.3") if token else ("mlp.linears.0", "mlp.linears.1", "mlp.linears.2")
    return {
        **_behind("lang_model.backbone.", texts),
        **_behind("lang_model.", head_shapes((text_layers * width, *hidden, embed), names)),
        **_behind("visn_model.backbone.", images),
        **_behind("visn_model.", head_shapes((features, *hidden, embed), names)),
    }


def filled(shapes, seed=0):
    """Random tensors, small enough for every activation to stay near one; variances are positive."""
    rng = np.random.default_rng(seed)
    return {name: _value(name, rng.standard_normal(shape)) for name, shape in shapes.items()}


def _value(name, x):
    if name.endswith("running_var"):
        x = 1 + 0.5 * np.tanh(x)
    elif x.ndim == 1 and name.endswith("weight"):
        x = 1 + 0.1 * x
    else:
        x = x / np.sqrt(np.prod(x.shape[1:])) if x.ndim > 1 else 0.1 * x
    return x.astype(np.float32)


def features(t, images, layers, groups):
    """The picture tower in numpy: `[B, 3, H, W]` -> `[B, features]`."""
    x = np.maximum(_convolved(t, images, "conv1", "bn1", stride=2), 0)
    x = _most(x)
    for stage, blocks in enumerate(layers):
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            stride = 2 if stage and block == 0 else 1
            y = np.maximum(_convolved(t, x, f"{at}.conv1", f"{at}.bn1"), 0)
            y = np.maximum(_convolved(t, y, f"{at}.conv2", f"{at}.bn2", stride, groups), 0)
            y = _convolved(t, y, f"{at}.conv3", f"{at}.bn3")
            down = f"{at}.downsample"
            x = x if block else _convolved(t, x, f"{down}.0", f"{down}.1", stride)
            x = np.maximum(x + y, 0)
    return x.mean(axis=(2, 3))


def _convolved(t, x, name, normed, stride=1, groups=1):
    kernel = t[f"{name}.weight"].astype(x.dtype)
    outputs, each, side, _ = kernel.shape
    pad = side // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    h, w = ((n - side) // stride + 1 for n in x.shape[2:])
    y = np.zeros((len(x), outputs, h, w), x.dtype)
    wide = outputs // groups
    for g in range(groups):
        seen, out = x[:, g * each : (g + 1) * each], slice(g * wide, (g + 1) * wide)
        for i in range(side):
            for j in range(side):
                part = seen[:, :, i : i + stride * h : stride, j : j + stride * w : stride]
                y[:, out] += np.einsum("bchw,oc->bohw", part, kernel[out, :, i, j])
    names = ("weight", "bias", "running_mean", "running_var")
    scale, bias, mean, variance = (t[f"{normed}.{n}"][:, None, None] for n in names)
    factor = scale / np.sqrt(variance.astype(x.dtype) + 1e-5)
    return y * factor + (bias - mean * factor)


def _most(x):
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    h, w = ((n - 3) // 2 + 1 for n in x.shape[2:])
    parts = [x[:, :, i : i + 2 * h : 2, j : j + 2 * w : 2] for i in range(3) for j in range(3)]
    return np.max(parts, axis=0)


def _behind(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


def _convolution_shapes(name, normed, inputs, outputs, side):
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {
        f"{name}.weight": (outputs, inputs, side, side),
        **{f"{normed}.{each}": (outputs,) for each in vectors},
    }


def _linear_shapes(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm_shapes(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
